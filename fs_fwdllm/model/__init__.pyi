from .bottleneck import load_bottleneck
from .loading import LoadedModel, load_model, load_tokenizer
from .saving import save_trained

__all__ = [
    "LoadedModel",
    "load_bottleneck",
    "load_model",
    "load_tokenizer",
    "save_trained",
]
