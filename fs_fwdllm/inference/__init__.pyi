from .generation import Conversation, Sampling
from .merging import merge
from .prediction import Prediction
from .trained import TrainedModel, load

__all__ = [
    "Conversation",
    "Prediction",
    "Sampling",
    "TrainedModel",
    "load",
    "merge",
]
