"""What all sections of a configuration have in common: how they take values, and which fields only the host reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

__all__ = ["Section", "host_only", "is_host_only", "known_word"]


class Section(BaseModel):
    """A section: unknown keys are errors, assignment is validated, types are not coerced (an int may be a float)."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=True, validate_default=True
    )


def host_only(default: Any) -> Any:
    """A field that is accepted for FederatedScope's sake, with its default there."""
    return Field(default, description="host only", json_schema_extra={"host_only": True})


def is_host_only(field: FieldInfo) -> bool:
    """Whether ``field`` means something to FederatedScope only."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("host_only"))


def known_word(registry: Iterable[str], value: str) -> str:
    """``value``, refused as a literal would be if it is none of the registry's names."""
    names = [repr(name) for name in sorted(registry)]
    if repr(value) not in names:
        expected = f"{', '.join(names[:-1])} or {names[-1]}"
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
    return value
