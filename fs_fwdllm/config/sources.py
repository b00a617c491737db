"""Where a configuration's slopes come from: part by part, and client by client.

``fwdllm.estimator`` and ``fwdllm.probes`` say it for all trainables and all clients. ``fwdllm.parts`` divides the
trainables, ``fwdllm.fleet`` the clients. Whoever needs to know (loading, plan, worker, server, report) asks here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from fs_fwdllm.config.own_sections import FROZEN, PartConfig, SourceConfig
from fs_fwdllm.config.registries import ESTIMATORS
from fs_fwdllm.config.schema import Config
from fs_fwdllm.core.division import Division
from fs_fwdllm.core.trainables import public_name
from fs_fwdllm.errors import ConfigError

__all__ = [
    "Source",
    "check_fleet",
    "counts_of",
    "describe_sources",
    "division_of",
    "estimators_of",
    "groups_of_sources",
    "sources_of",
]


@dataclass(frozen=True)
class Source:
    """Where the slopes of one part come from.

    Attributes:
        slopes: a word of ``fwdllm.estimator``, or ``frozen``.
        probes: directions per step; 0 for a part that is frozen.
    """

    slopes: str
    probes: int

    @property
    def estimator(self) -> Any:
        """The estimator's class; ``None`` for a part that is frozen."""
        return None if self.slopes == FROZEN else ESTIMATORS[self.slopes]


def sources_of(config: Config, client: int = 0) -> tuple[Source, ...]:
    """The sources of ``client``, one for each part; without a client's number those of clients in no group of a fleet.

    Raises:
        ConfigError: numbers or words of ``fwdllm.parts`` or ``fwdllm.fleet`` contradict each other.
    """
    own = _of_parts(config, config.fwdllm.parts, "fwdllm.parts")
    group = _group_of(config, client)
    if group is None:
        return own
    chosen, key = config.fwdllm.fleet[group], f"fwdllm.fleet[{group}]"
    if chosen.parts:
        _require_same_parts(config, chosen.parts, key)
        return _of_parts(config, chosen.parts, f"{key}.parts")
    one = _source(config, chosen, key)
    return tuple(source if source.slopes == FROZEN else one for source in own)


def counts_of(config: Config, client: int = 0) -> tuple[int, ...]:
    """Directions of a step of ``client``, part by part."""
    return tuple(source.probes for source in sources_of(config, client))


def groups_of_sources(config: Config) -> list[tuple[Source, ...]]:
    """The sources of clients in no group of a fleet, and of those in each group."""
    return [sources_of(config, client) for client in (0, *_first_of_groups(config))]


def check_fleet(config: Config, clients: Collection[int]) -> None:
    """Refuse a group that none of ``clients``, those that hold data, is in. Raises ``ConfigError``."""
    for index, members in enumerate(_members(config)):
        if not set(members).intersection(clients):
            raise ConfigError(
                f"fwdllm.fleet[{index}].clients {config.fwdllm.fleet[index].clients!r}: stands for clients "
                f"{min(members)} to {max(members)}, and none of them holds data; the clients that do are "
                f"{min(clients)} to {max(clients)}"
            )


def estimators_of(config: Config) -> dict[str, Any]:
    """The classes of all estimators that some client uses for some part, by their words."""
    everybody = [source for sources in groups_of_sources(config) for source in sources]
    return {source.slopes: source.estimator for source in everybody if source.slopes != FROZEN}


def division_of(config: Config, names: Sequence[str]) -> Division:
    """How tensors of these names are divided.

    Raises:
        ConfigError: a part matches no tensor, or a tensor is in none.
    """
    parts = config.fwdllm.parts
    if not parts:
        return Division.whole(len(names))
    public = [public_name(name) for name in names]
    owners = [next((index for index, part in enumerate(parts) if matches(name, part.match)), -1) for name in public]
    if missing := [name for name, owner in zip(public, owners, strict=True) if owner < 0]:
        raise ConfigError(
            f"fwdllm.parts: {missing[0]!r} is trained but in no part ({len(missing)} in all); add a part, for what is "
            f"not to move {{match: '*', slopes: {FROZEN}}}"
        )
    for index, part in enumerate(parts):
        if index not in owners:
            raise ConfigError(
                f"fwdllm.parts[{index}].match {part.match!r}: no trainable is left for it; the trained tensors are "
                f"{', '.join(map(repr, public[:4]))}{', ...' if len(public) > 4 else ''}"
            )
    return Division(tuple(owners), tuple(part.rate for part in parts))


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name has the words of ``pattern`` in a row; with ``*`` or ``?`` whether all of it fits."""
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def describe_sources(sources: Sequence[Source]) -> str:
    """In words: ``closed form, 100 scalars; one sided, 24 probes``."""
    words = []
    for source in sources:
        if source.slopes == FROZEN:
            words.append(FROZEN)
            continue
        unit = "scalar" if source.estimator.exact else "probe"
        words.append(f"{source.slopes.replace('_', ' ')}, {source.probes} {unit}{'' if source.probes == 1 else 's'}")
    return "; ".join(words)


def _of_parts(config: Config, parts: Sequence[PartConfig], key: str) -> tuple[Source, ...]:
    if not parts:
        return (Source(config.fwdllm.estimator, config.fwdllm.probes),)
    found = tuple(_source(config, part, f"{key}[{index}]") for index, part in enumerate(parts))
    if all(source.slopes == FROZEN for source in found):
        raise ConfigError(f"{key}: every part is {FROZEN}, so that nothing would be trained; give one of them slopes")
    return found


def _source(config: Config, given: SourceConfig, key: str) -> Source:
    word = given.slopes or config.fwdllm.estimator
    if word == FROZEN:
        if given.probes or given.scalars:
            raise ConfigError(f"{key}: a part that is {FROZEN} has no probes and no scalars; leave both out")
        return Source(FROZEN, 0)
    right, wrong = ("scalars", "probes") if ESTIMATORS[word].exact else ("probes", "scalars")
    if count := getattr(given, wrong):
        raise ConfigError(f"{key}.{wrong} {count}: with slopes {word!r} that number is called {right}; write {right}")
    return Source(word, getattr(given, right) or config.fwdllm.probes)


def _require_same_parts(config: Config, parts: Sequence[PartConfig], key: str) -> None:
    wanted, given = [part.match for part in config.fwdllm.parts], [part.match for part in parts]
    if wanted != given:
        raise ConfigError(f"{key}.parts: must match what fwdllm.parts does, in its order {wanted}, but has {given}")
    if any("rate" in part.model_fields_set for part in parts):
        raise ConfigError(f"{key}.parts: a part has one rate for all clients; set it in fwdllm.parts")


def _group_of(config: Config, client: int) -> int | None:
    """The number of the group in ``fwdllm.fleet`` that ``client`` is in."""
    for index, members in enumerate(_members(config)):
        if client in members:
            return index
    return None


def _first_of_groups(config: Config) -> list[int]:
    return [members[0] for members in _members(config) if members]


def _members(config: Config) -> list[Sequence[int]]:
    """Clients of each group: those that are named, or the next so many by number."""
    groups: list[Sequence[int]] = []
    following, seen = 1, set[int]()
    for index, group in enumerate(config.fwdllm.fleet):
        if isinstance(group.clients, int):
            members: Sequence[int] = range(following, following + group.clients)
            following += group.clients
        else:
            members = group.clients
        if not members or min(members) < 1:
            raise ConfigError(f"fwdllm.fleet[{index}].clients {group.clients!r}: clients are numbered from 1")
        if clash := seen.intersection(members):
            raise ConfigError(f"fwdllm.fleet[{index}].clients: client {min(clash)} is in an earlier group already")
        seen.update(members)
        groups.append(members)
    return groups
