from ._version import __version__
from .config import Config, load_config
from .inference import Conversation, Prediction, Sampling, TrainedModel, load, merge
from .model.bottleneck import load_bottleneck
from .running.result import RunResult, resume, run

__all__ = [
    "Config",
    "Conversation",
    "Prediction",
    "RunResult",
    "Sampling",
    "TrainedModel",
    "__version__",
    "load",
    "load_bottleneck",
    "load_config",
    "merge",
    "resume",
    "run",
]
