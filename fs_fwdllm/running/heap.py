"""Giving memory back that nobody holds any more.

The C library keeps what a program frees for its next request: after some passes a few hundred megabytes of activations
stay with the process, in pieces between what still lives. Passes reuse them; a second model does not, since its tensors
are too large for the pieces. Whoever is about to need memory of another kind asks for them to be given back.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

__all__ = ["give_back_freed_memory"]


def give_back_freed_memory() -> None:
    """Return whole free pages to the system, in some milliseconds; nothing happens where the C library is not glibc."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
