from .bottleneck import load_bottleneck
from .facts import SavedFacts, find_saved
from .loading import LoadedModel, load_model
from .reloading import load_saved
from .saving import save_trained
from .tokenizer import load_tokenizer

__all__ = [
    "LoadedModel",
    "SavedFacts",
    "find_saved",
    "load_bottleneck",
    "load_model",
    "load_saved",
    "load_tokenizer",
    "save_trained",
]
