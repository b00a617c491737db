"""Whom a server believes, and how far: what stands between the answers of a round and its step."""

from fs_fwdllm.guard.lengths import LengthGuard, root_mean_square, scaled
from fs_fwdllm.guard.reports import believed_losses, believed_samples
from fs_fwdllm.guard.statistics import Statistic, outvoted_by_distance, vote

__all__ = [
    "LengthGuard",
    "Statistic",
    "believed_losses",
    "believed_samples",
    "outvoted_by_distance",
    "root_mean_square",
    "scaled",
    "vote",
]
