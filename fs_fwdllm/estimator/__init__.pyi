from .backprop import Backprop
from .base import Estimator, Footprint, Passes, Slopes, make_estimator
from .closed_form import ClosedForm
from .differences import CentralDifference, OneSidedDifference, Radius
from .exact import ExactSlopes, Gradient, Projected
from .forward_mode import ForwardMode
from .parted import PartedEstimator, make_parted_estimator, passes_of_step, reads_of_step

__all__ = [
    "Backprop",
    "CentralDifference",
    "ClosedForm",
    "Estimator",
    "ExactSlopes",
    "Footprint",
    "ForwardMode",
    "Gradient",
    "OneSidedDifference",
    "PartedEstimator",
    "Passes",
    "Projected",
    "Radius",
    "Slopes",
    "make_estimator",
    "make_parted_estimator",
    "passes_of_step",
    "reads_of_step",
]
