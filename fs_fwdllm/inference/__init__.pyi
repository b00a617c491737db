from .merging import merge
from .prediction import Prediction
from .trained import TrainedModel, load

__all__ = [
    "Prediction",
    "TrainedModel",
    "load",
    "merge",
]
