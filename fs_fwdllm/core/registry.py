"""Registries: the members of a part of the algebra by the word that a configuration uses for them.

Every part that a user chooses by name (estimator, distribution, method, host) has one registry. A member carries its
own facts, and whoever needs one asks the member; nobody keeps a list of names. There are three ways in:

* a member of this package stands in the registry's own table, as ``"module:attribute"``, so that asking for names
  imports nothing heavy;
* another package announces one as an entry point of the registry's group (``[project.entry-points."GROUP"]`` with
  ``name = "module:attribute"``), which is found without an import, too;
* a program or a test calls :meth:`Registry.register`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import metadata
from typing import Any, Generic, TypeVar, cast

from fs_fwdllm.errors import ConfigError, nearest

__all__ = ["Registry"]

Member = TypeVar("Member")


class Registry(Generic[Member]):
    """Members by name.

    Args:
        key: the configuration's key that names a member, for messages.
        group: the entry-point group in which other packages announce members.
        members: our own, each as the object itself or as ``"module:attribute"``.
        kind: what a member of another package must be an instance or a subclass of, likewise.
    """

    def __init__(self, key: str, group: str, members: Mapping[str, Member | str], kind: type | str = object) -> None:
        self.key = key
        self.group = group
        self.kind = kind
        self._members: dict[str, Member | str] = dict(members)

    def names(self) -> list[str]:
        """Every name that can be asked for, sorted. Imports no member."""
        return sorted({*self._members, *self._announced})

    def __contains__(self, name: object) -> bool:
        return name in self._members or name in self._announced

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __getitem__(self, name: str) -> Member:
        """The member of that name, imported if it has not been.

        Raises:
            ConfigError: there is none, or the package that announces it cannot be imported.
        """
        if name not in self._members:
            if name not in self._announced:
                raise ConfigError(f"{self.key} {name!r}: allowed are {self.names()}{nearest(name, self.names())}")
            self._members[name] = self._load(name)
        member = self._members[name]
        if isinstance(member, str):
            member = self._members[name] = cast(Member, _imported(member))
        return member

    def register(self, name: str, member: Member | str) -> None:
        """Add a member. Raises ``ValueError`` if the name is taken by another."""
        if name in self and self._members.get(name) != member:
            raise ValueError(f"{self.key} {name!r} is registered already; its members are {self.names()}")
        self._members[name] = member

    def unregister(self, name: str) -> None:
        """Take out what :meth:`register` added. Raises ``KeyError`` if there is no such member."""
        del self._members[name]

    @cached_property
    def _announced(self) -> dict[str, metadata.EntryPoint]:
        """What other packages announce, by name; a name that two claim is nobody's guess."""
        found: dict[str, metadata.EntryPoint] = {}
        for point in metadata.entry_points(group=self.group):
            other = found.setdefault(point.name, point)
            if point.name in self._members or other.value != point.value:
                owner = "fs_fwdllm" if point.name in self._members else _owner(other)
                raise ConfigError(
                    f"{self.key} {point.name!r}: {_owner(point)} announces it as {point.value!r}, but it is "
                    f"{owner}'s already; remove one of them"
                )
        return found

    def _load(self, name: str) -> Member:
        point = self._announced[name]
        announced = f"{self.key} {name!r}: {_owner(point)} announces it as {point.value!r}"
        try:
            member: Any = point.load()
        except Exception as error:  # another package's module may fail in any way
            raise ConfigError(
                f"{announced}, which cannot be imported ({type(error).__name__}: {error}); install {_owner(point)} "
                "anew, or remove it"
            ) from error
        kind = _imported(self.kind) if isinstance(self.kind, str) else self.kind
        if not (isinstance(member, kind) or (isinstance(member, type) and issubclass(member, kind))):
            raise ConfigError(f"{announced}, which is no {kind.__name__} (it is of type {type(member).__name__})")
        lacking = sorted(getattr(member, "__abstractmethods__", ())) if isinstance(member, type) else []
        if lacking:
            raise ConfigError(f"{announced}, a {kind.__name__} that lacks {', '.join(lacking)}")
        return cast(Member, member)


def _imported(place: str) -> Any:
    """What stands at ``"module:attribute"``."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _owner(point: metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "a package"
