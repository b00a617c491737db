"""Models: loading them, choosing what is trained, and writing what was trained."""

from fs_fwdllm.core.trainables import public_name
from fs_fwdllm.model.bottleneck import load_bottleneck
from fs_fwdllm.model.loading import LoadedModel, load_model, load_tokenizer
from fs_fwdllm.model.saving import save_trained

__all__ = ["LoadedModel", "load_bottleneck", "load_model", "load_tokenizer", "public_name", "save_trained"]
