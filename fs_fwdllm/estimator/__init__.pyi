from .backprop import Backprop
from .base import Estimator, Footprint, Slopes, make_estimator
from .differences import CentralDifference, OneSidedDifference, Radius
from .forward_mode import ForwardMode

__all__ = [
    "Backprop",
    "CentralDifference",
    "Estimator",
    "Footprint",
    "ForwardMode",
    "OneSidedDifference",
    "Radius",
    "Slopes",
    "make_estimator",
]
