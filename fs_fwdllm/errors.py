"""Every error a user can meet, as types.

One root, :class:`FwdLLMError`, so that a program embedding the package can catch "anything of ours" in one clause; one
type per *kind of remedy*, so that a caller can tell a mistake in a file (fix the file) from a client that lies (drop
the client) from a run that has diverged (lower the learning rate). Messages name the key or file, the value that was
found, what is allowed and, where there is one, the nearest valid choice: :func:`nearest` writes that last part.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "EstimatorError",
    "FwdLLMError",
    "HostError",
    "ModelError",
    "TrainingStalledError",
    "UpdateRejected",
    "WireError",
    "nearest",
    "shown",
]


class FwdLLMError(Exception):
    """Root of every error raised on purpose by this package."""


class ConfigError(FwdLLMError):
    """A configuration key, value or combination is not usable. The remedy is to edit the file or the override."""


class DataError(FwdLLMError):
    """A data file is missing, malformed, or cannot be split as asked."""


class ModelError(FwdLLMError):
    """A model or tokenizer cannot be loaded, or does not have the part that should be trained."""


class EstimatorError(FwdLLMError):
    """A slope cannot be estimated with this model under these settings."""


class WireError(FwdLLMError):
    """Received bytes are not a frame of ours: random bytes, truncation, an unknown version, an oversized payload."""


class UpdateRejected(FwdLLMError):
    """A well-formed update that must not be used. ``reason`` is a short stable word for logs and tests."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class DivergenceError(FwdLLMError):
    """Two replicas that must hold the same bytes do not."""


class TrainingStalledError(FwdLLMError):
    """No client delivered a usable update for as many rounds as the configuration tolerates."""


class HostError(FwdLLMError):
    """What carries a run failed: a framework is absent, a process died, or an answer did not come in time."""


class CheckpointError(FwdLLMError):
    """A checkpoint is absent, truncated, or belongs to another configuration."""


def nearest(value: object, allowed: Iterable[object]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest allowed spelling, or an empty string when none is close."""
    text = value if isinstance(value, str) else shown(value)
    matches = difflib.get_close_matches(text[:200], [str(choice) for choice in allowed], n=1, cutoff=0.55)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def shown(value: object, most_characters: int = 200) -> str:
    """``repr`` of a value for a message: cut where it is long, and never an error of its own."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, a structure within itself, somebody's own repr
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= most_characters else f"{text[:most_characters]}... ({len(text):,} characters)"
