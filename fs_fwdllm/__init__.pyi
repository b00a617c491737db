from ._version import __version__
from .config import Config, load_config
from .model.bottleneck import load_bottleneck
from .running.local import resume, run

__all__ = [
    "Config",
    "__version__",
    "load_bottleneck",
    "load_config",
    "resume",
    "run",
]
