"""Whom a server believes, and how far: what stands between the answers of a round and its step."""

from fs_fwdllm.guard.lengths import LengthGuard, root_mean_square, shortened
from fs_fwdllm.guard.reports import believed_losses, believed_samples

__all__ = ["LengthGuard", "believed_losses", "believed_samples", "root_mean_square", "shortened"]
