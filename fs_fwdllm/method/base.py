"""Methods by name. A method is a combination of parts: which worker, which server, which plan of work.

A configuration picks one with FederatedScope's own keys: ``federate.method`` names the protocol and ``trainer.type``
the local trainer. ``FedAvg`` with ``mezotrainer`` is how the published FedMeZO files spell MeZO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from fs_fwdllm.config.schema import Config
from fs_fwdllm.errors import ConfigError, nearest

if TYPE_CHECKING:
    from fs_fwdllm.method.client import ClientWorker
    from fs_fwdllm.method.parts import Parts
    from fs_fwdllm.method.server import RoundServer, ServerSettings

__all__ = ["METHODS", "Method", "register_method", "resolve_method"]


@dataclass(frozen=True)
class Method:
    """One federated method.

    Attributes:
        name: canonical name, used in reports.
        spellings: ``(federate.method, trainer.type)`` pairs, lower case, that select it.
        forward_only: whether clients never backpropagate.
        local_steps: whether clients step at a learning rate of their own, rather than the server.
        make_worker, make_server: assemble the two halves from shared parts.
        select: marks the parameters that are ever trained, where ``llm.adapter`` does not; it gets the names of those
            that start from random numbers. Such a method keeps weights in the model's dtype, and nothing stays frozen
            below a fixed layer, so that there is no prefix to cache.
        describe: what a user should be told about the parts before the first round.
    """

    name: str
    spellings: tuple[tuple[str, str], ...]
    forward_only: bool
    make_worker: Callable[[Parts], ClientWorker]
    make_server: Callable[[Parts, ServerSettings], RoundServer]
    local_steps: bool = False
    select: Callable[[Config, nn.Module, frozenset[str]], None] | None = None
    describe: Callable[[Parts], str] | None = None


METHODS: dict[str, Method] = {}


def register_method(method: Method) -> None:
    """Add a method. Raises ``ValueError`` if its name or a spelling is taken."""
    taken = {spelling for other in METHODS.values() for spelling in other.spellings}
    clash = taken.intersection(method.spellings)
    if method.name in METHODS or clash:
        raise ValueError(f"method {method.name!r} or one of its spellings {sorted(clash)} is registered already")
    METHODS[method.name] = method


def resolve_method(config: Config) -> Method:
    """The method a configuration selects.

    Raises:
        ConfigError: unknown ``federate.method`` or ``trainer.type``, or a pair that does not go together.
    """
    import fs_fwdllm.method.catalogue  # noqa: F401 - registers the built-in methods

    protocol, trainer = config.federate.method.lower(), config.trainer.type.lower()
    spellings = {spelling: method for method in METHODS.values() for spelling in method.spellings}
    if (protocol, trainer) in spellings:
        return spellings[protocol, trainer]
    protocols = sorted({known for known, _ in spellings})
    if protocol not in protocols:
        raise ConfigError(
            f"federate.method {config.federate.method!r}: allowed are {protocols}{nearest(protocol, protocols)}"
        )
    trainers = sorted(kind for known, kind in spellings if known == protocol)
    raise ConfigError(
        f"trainer.type {config.trainer.type!r} does not go with federate.method {config.federate.method!r}: "
        f"allowed are {trainers}{nearest(trainer, trainers)}"
    )
