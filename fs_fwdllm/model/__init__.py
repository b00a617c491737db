"""Models: loading them, choosing what is trained, and writing what was trained."""

from fs_fwdllm.model.bottleneck import load_bottleneck
from fs_fwdllm.model.loading import LoadedModel, load_model, load_tokenizer
from fs_fwdllm.model.saving import save_trained
from fs_fwdllm.trainables import public_name

__all__ = ["LoadedModel", "load_bottleneck", "load_model", "load_tokenizer", "public_name", "save_trained"]
