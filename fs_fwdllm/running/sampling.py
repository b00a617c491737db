"""Who takes part in a round: a pure function of (seed, round), so that every host and a resumed run agree."""

from __future__ import annotations

from collections.abc import Sequence

from fs_fwdllm.config import Config
from fs_fwdllm.core.seeding import seeded_permutation
from fs_fwdllm.errors import ConfigError

__all__ = ["clients_asked", "clients_per_round", "sample_clients"]


def clients_per_round(config: Config, available: int) -> int:
    """How many clients a round asks, by FederatedScope's rule on every host.

    A ``sample_client_rate`` above zero goes before ``sample_client_num``; of ``rate x clients`` the fraction is
    dropped, and at least one client is asked.

    Raises:
        ConfigError: more clients than hold training data, or none.
    """
    rate, wanted = config.federate.sample_client_rate, config.federate.sample_client_num
    if rate <= 0 and wanted > available:
        raise ConfigError(
            f"federate.sample_client_num {wanted}: only {available} clients hold training samples; allowed are 1 to "
            f"{available}, or -1 for all"
        )
    if rate <= 0 and wanted == 0:
        raise ConfigError(f"federate.sample_client_num 0: allowed are 1 to {available}, or -1 for all")
    return clients_asked(config, available)


def clients_asked(config: Config, available: int) -> int:
    """As :func:`clients_per_round` in a run that has begun: all, where a host has refused so many that too few are
    left."""
    rate, wanted = config.federate.sample_client_rate, config.federate.sample_client_num
    if rate > 0:
        return max(1, int(rate * available))
    return min(wanted, available) if wanted > 0 else available


def sample_clients(seed: int, round_index: int, clients: Sequence[int], count: int) -> list[int]:
    """``count`` of ``clients`` without replacement, in ascending order."""
    if count >= len(clients):
        return sorted(clients)
    order = seeded_permutation(len(clients), "client sampling", seed, round_index)
    return sorted(clients[index] for index in order[:count])
