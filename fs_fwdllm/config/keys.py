"""Every key a configuration may have, and what is known of it: read off the schema, which says it once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fs_fwdllm.config.schema import Config
from fs_fwdllm.config.section import is_host_only

__all__ = ["KeyFacts", "matching_keys", "schema_keys"]

_FORMS = {"bool": "true or false", "int": "whole number", "float": "number", "str": "text"}


@dataclass(frozen=True)
class KeyFacts:
    """One key.

    Attributes:
        name: dotted, as an override has it: ``train.optimizer.lr``.
        default: its value where neither file nor override names it.
        form: what a value looks like, in words; for a choice all that may be chosen.
        description: what it means.
        hosts: who gives it a meaning.
        open: whether keys below it are not the schema's own (a mapping that a host or another package reads).
    """

    name: str
    default: Any
    form: str
    description: str
    hosts: str
    open: bool


def schema_keys() -> list[KeyFacts]:
    """All keys with a value of their own, in the order of the schema."""
    return list(_keys(Config, ""))


def matching_keys(pattern: str = "") -> list[KeyFacts]:
    """The keys whose name contains ``pattern``, or fits it where it has a wildcard (``fwdllm.*``), or, if there are
    none, those whose description contains it. Case does not matter."""
    keys, wanted = schema_keys(), pattern.lower()
    if any(sign in wanted for sign in "*?["):
        return [key for key in keys if fnmatchcase(key.name.lower(), wanted)]
    named = [key for key in keys if wanted in key.name.lower()]
    return named or [key for key in keys if wanted in key.description.lower()]


def _keys(model: type[BaseModel], prefix: str) -> Iterator[KeyFacts]:
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _keys(annotation, f"{prefix}{name}.")
        else:
            yield _facts(prefix + name, field)


def _facts(name: str, field: FieldInfo) -> KeyFacts:
    of_the_host = is_host_only(field)
    return KeyFacts(
        name=name,
        default=field.get_default(),
        form=_form(field.annotation),
        description="" if of_the_host else field.description or "",
        hosts="FederatedScope only" if of_the_host else "every host",
        open=get_origin(field.annotation) is dict,
    )


def _form(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(repr(choice) if choice == "" else str(choice) for choice in get_args(annotation))
    if origin is list:
        return "list"
    return "mapping" if origin is dict else _FORMS.get(getattr(annotation, "__name__", ""), "any value")
