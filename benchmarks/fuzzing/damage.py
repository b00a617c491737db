"""Bytes that were meddled with."""

from __future__ import annotations

import random

__all__ = ["damaged"]


def damaged(data: bytes, draw: random.Random, most: int = 4) -> bytes:
    """``data`` with up to ``most`` places overwritten, cut out, cut off, repeated, moved or added to."""
    raw = bytearray(data)
    for _ in range(draw.randint(1, most)):
        start = draw.randrange(len(raw) + 1)
        end = min(len(raw), start + draw.choice((1, 1, 2, 4, 8, 64, 500)))
        change = draw.randrange(8)
        if change == 0:
            raw[start:end] = draw.randbytes(end - start)
        elif change == 1 and start < len(raw):
            raw[start] ^= 1 << draw.randrange(8)
        elif change == 2:
            del raw[start:end]
        elif change == 3:
            del raw[start:]
        elif change == 4:
            raw[start:start] = raw[start:end]
        elif change == 5:
            raw[start:end] = bytes([draw.choice((0, 0x7F, 0x80, 0x90, 0x91, 0xC0, 0xDD, 0xFF))]) * (end - start)
        elif change == 6:
            raw[start:start] = draw.randbytes(draw.randrange(1, 9))
        else:
            other = draw.randrange(len(raw) + 1)
            raw[other:other] = raw[start:end]
    return bytes(raw)
