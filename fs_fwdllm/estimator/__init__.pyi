from .backprop import Backprop
from .base import Estimator, Slopes
from .differences import CentralDifference, OneSidedDifference, Radius
from .forward_mode import ForwardMode
from .making import make_estimator

__all__ = [
    "Backprop",
    "CentralDifference",
    "Estimator",
    "ForwardMode",
    "OneSidedDifference",
    "Radius",
    "Slopes",
    "make_estimator",
]
