"""The table of methods: what is known of each without running it. Nothing here imports PyTorch or the schema.

A method is chosen by two words of FederatedScope's, ``federate.method`` (the protocol) and ``trainer.type`` (the local
trainer; empty follows the protocol), in any case: ``FedAvg`` with ``mezotrainer`` is how the published FedMeZO files
spell MeZO. Reading a configuration, loading a model, a host, a forecast and a report all need to know something of the
method: whether clients run forward passes only, who takes the steps, whether the model's own blocks are trained, what
it is called. Each asks the method's row; no other file spells a method's or a trainer's name.

How a method works (its worker and its server) is its *recipe* (:class:`fs_fwdllm.method.parts.Recipe`), which a row
only names, so that the table is free of everything heavy. Another package adds a method by an entry point of the group
``fs_fwdllm.methods`` that leads to its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fs_fwdllm.core.registry import Registry
from fs_fwdllm.errors import ConfigError, nearest

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "MethodFacts",
    "default_trainer",
    "examples_of",
    "facts_for",
    "is_ours",
    "register_method",
]


@dataclass(frozen=True)
class MethodFacts:
    """One federated method.

    Attributes:
        name: canonical name, in messages and tables.
        title: what a report calls it.
        spellings: pairs ``(federate.method, trainer.type)`` that choose it, in any case (kept in lower case); the first
            one is how it is recommended.
        recipe: the :class:`~fs_fwdllm.method.parts.Recipe`, or where it is: ``"module:attribute"``.
        measures_slopes: clients measure slopes along seeded directions, by forward passes unless
            ``fwdllm.estimator`` or ``fwdllm.parts`` name another source, and send those.
        clients_step: clients move at a learning rate of their own; otherwise the server takes the steps, and with
            ``measures_slopes`` it pools slopes (gate, directed sampling, step control, momentum).
        trains_blocks: blocks of the model's own weights take turns. Such a method has no adapter, keeps the weights in
            the model's dtype with float32 masters elsewhere, leaves nothing frozen that could be cached, and names the
            clients of a round itself.
    """

    name: str
    title: str
    spellings: tuple[tuple[str, str], ...]
    recipe: Any
    measures_slopes: bool = False
    clients_step: bool = False
    trains_blocks: bool = False

    def __post_init__(self) -> None:
        lowered = tuple((method.lower(), trainer.lower()) for method, trainer in self.spellings)
        object.__setattr__(self, "spellings", lowered)

    @property
    def pools_slopes(self) -> bool:
        """Whether the server builds its steps from slopes of all clients at one point."""
        return self.measures_slopes and not self.clients_step


#: What ``federate.method`` is where a file does not say, as in FederatedScope.
DEFAULT_METHOD = "FedAvg"

#: Words of FederatedScope, which mean something there without us; with two of them a run inside it is not ours.
_WORDS_OF_THE_HOST = frozenset({"fedavg", "fedsgd", "", "general", "llmtrainer"})

METHODS: Registry[MethodFacts] = Registry(
    "federate.method",
    "fs_fwdllm.methods",
    {
        facts.name: facts
        for facts in (
            MethodFacts(
                name="mezo",
                title="MeZO",
                spellings=(("fedmezo", "mezotrainer"), ("fedmezo", ""), ("fedavg", "mezotrainer")),
                recipe="fs_fwdllm.method.mezo.recipe:RECIPE",
                measures_slopes=True,
                clients_step=True,
            ),
            MethodFacts(
                name="forward_gradient",
                title="forward gradient",
                spellings=(
                    ("fedfwd", "fwdtrainer"),
                    ("fedfwd", ""),
                    ("fwdllm", "fwdtrainer"),
                    ("fwdllm", ""),
                    ("fedavg", "fwdtrainer"),
                ),
                recipe="fs_fwdllm.method.forward.recipe:RECIPE",
                measures_slopes=True,
            ),
            MethodFacts(
                name="fedavg",
                title="FedAvg",
                spellings=(("fedavg", "llmtrainer"), ("fedavg", ""), ("fedavg", "general")),
                recipe="fs_fwdllm.method.first_order.recipe:AVERAGING",
                clients_step=True,
            ),
            MethodFacts(
                name="fedsgd",
                title="FedSGD",
                spellings=(("fedsgd", "llmtrainer"), ("fedsgd", ""), ("fedsgd", "general")),
                recipe="fs_fwdllm.method.first_order.recipe:GRADIENTS",
            ),
            MethodFacts(
                name="cybgd",
                title="cycle block descent",
                spellings=(("fedcybgd", "cybgdtrainer"), ("fedcybgd", ""), ("fedavg", "cybgdtrainer")),
                recipe="fs_fwdllm.method.cybgd.recipe:RECIPE",
                clients_step=True,
                trains_blocks=True,
            ),
        )
    },
    kind=MethodFacts,
)


def register_method(facts: MethodFacts) -> None:
    """Add a method. Raises ``ValueError`` if its name or a spelling is taken."""
    clash = sorted(set(_by_spelling()).intersection(facts.spellings))
    if facts.name in METHODS or clash:
        raise ValueError(f"method {facts.name!r} or one of its spellings {clash} is registered already")
    METHODS.register(facts.name, facts)


def _rows() -> list[MethodFacts]:
    return [METHODS[name] for name in METHODS]


def _by_spelling() -> dict[tuple[str, str], MethodFacts]:
    """Every method by its spellings. Raises :class:`~fs_fwdllm.errors.ConfigError` if two methods claim one."""
    found: dict[tuple[str, str], MethodFacts] = {}
    for facts in _rows():
        for spelling in facts.spellings:
            other = found.setdefault(spelling, facts)
            if other is not facts:
                raise ConfigError(
                    f"federate.method {spelling[0]!r} with trainer.type {spelling[1]!r}: both method {other.name!r} "
                    f"and method {facts.name!r} claim these words; remove the package of one of them"
                )
    return found


def facts_for(method: str, trainer: str) -> MethodFacts:
    """The row of the method that ``federate.method`` and ``trainer.type`` choose.

    Raises:
        ConfigError: unknown ``federate.method`` or ``trainer.type``, or a pair that does not go together.
    """
    spellings, words = _by_spelling(), (method.lower(), trainer.lower())
    if words in spellings:
        return spellings[words]
    known = sorted({protocol for protocol, _ in spellings})
    if words[0] not in known:
        raise ConfigError(f"federate.method {method!r}: allowed are {known}{nearest(words[0], known)}")
    trainers = sorted(kind for protocol, kind in spellings if protocol == words[0])
    raise ConfigError(
        f"trainer.type {trainer!r} does not go with federate.method {method!r}: allowed are {trainers}"
        f"{nearest(words[1], trainers)}"
    )


def default_trainer(protocol: str) -> str:
    """The ``trainer.type`` that a ``federate.method`` means when none is given; empty for one that is not known."""
    facts = _by_spelling().get((protocol.lower(), ""))
    spellings = () if facts is None else facts.spellings
    return next((trainer for known, trainer in spellings if known == protocol.lower() and trainer), "")


def is_ours(protocol: str, trainer: str) -> bool:
    """Whether these two words, in any case, ask for one of our methods inside FederatedScope.

    One word that only we know is enough: a mistake in the other is then ours to report, and the host never trains
    something else in silence.
    """
    own = {word for spelling in _by_spelling() for word in spelling} - _WORDS_OF_THE_HOST
    return protocol.lower() in own or trainer.lower() in own


def examples_of(wanted: Callable[[MethodFacts], bool]) -> str:
    """How methods with a property are spelt, for messages: ``federate.method: fedmezo or fedavg``."""
    return "federate.method: " + " or ".join(facts.spellings[0][0] for facts in _rows() if wanted(facts))
