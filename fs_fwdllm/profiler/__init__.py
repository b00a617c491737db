"""Which parameters should a device train without backpropagation? Measured before a federation is started.

A forward gradient of ``K`` probes has cosine about ``sqrt(K / (K + d))`` to the true gradient, ``d`` being the number
of trainable parameters: fewer parameters, a better direction, but less that can be learnt. FwdLLM (ATC 2024) resolves
this trade-off offline, per model, by the similarity of the two gradients; the tool for it was announced and not
released. Here every candidate is measured for three things: the similarity, what it costs (parameters, memory, bytes),
and, since a similar direction in a useless space is useless, what a short trial by forward gradients makes of the
evaluation loss. The trial decides.
"""

from fs_fwdllm.profiler.candidates import Candidate, candidates_for
from fs_fwdllm.profiler.measure import Budget, Measured, measure, rank
from fs_fwdllm.profiler.run import TRIAL_KEYS, Profile, run_profile, run_rate_search

__all__ = [
    "TRIAL_KEYS",
    "Budget",
    "Candidate",
    "Measured",
    "Profile",
    "candidates_for",
    "measure",
    "rank",
    "run_profile",
    "run_rate_search",
]
