"""What FedML carries for us: frames, in the two shapes that pass through it untouched.

FedML sends any object that can be pickled, but looks at its type on the way. Downwards a plain ``dict`` means "one
payload for each silo", so a silo's payload is an ``OrderedDict``; upwards a plain ``dict`` is left alone, while
anything else is taken for a state dictionary of tensors. Frames inside are bytes of :mod:`fs_fwdllm.core.wire`, never
unpickled objects of ours, and whatever does not have exactly this form is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from fs_fwdllm.errors import WireError

__all__ = ["Orders", "pack_answers", "pack_orders", "unpack_answers", "unpack_orders"]

_KEY = "fs_fwdllm"


@dataclass(frozen=True)
class Orders:
    """What the server tells a silo.

    Attributes:
        frames: ``{client: frame of its assignment}``; empty when the silo has nothing to do.
        state: a frame without work to follow first; empty unless a run was resumed.
        is_last: whether no further payload will ask for work.
        refusal: why the silo gets no work in this run; empty if it is one of those who do.
    """

    frames: dict[int, bytes] = field(default_factory=dict)
    state: bytes = b""
    is_last: bool = False
    refusal: str = ""


def pack_orders(orders: Orders) -> OrderedDict[str, object]:
    """The payload of a silo on its way down."""
    return OrderedDict({_KEY: (tuple(orders.frames.items()), orders.state, orders.is_last, orders.refusal)})


def unpack_orders(payload: object) -> Orders:
    """Inverse of :func:`pack_orders`. Raises :class:`~fs_fwdllm.errors.WireError` for anything else."""
    content = _content(payload, "server")
    if not isinstance(content, tuple) or len(content) != 4:
        raise WireError("the server's payload has not the four parts of ours")
    frames, state, is_last, refusal = content
    if not isinstance(state, bytes) or not isinstance(is_last, bool):
        raise WireError("the server's payload carries a state that is not a frame")
    if not isinstance(refusal, str):
        raise WireError(f"the server's payload carries a {type(refusal).__name__} instead of a refusal's text")
    return Orders(_frames(frames, "server"), state, is_last, refusal)


def pack_answers(frames: Mapping[int, bytes]) -> dict[str, object]:
    """The payload of a silo on its way up."""
    return {_KEY: tuple(frames.items())}


def unpack_answers(payload: object) -> dict[int, bytes]:
    """Inverse of :func:`pack_answers`. Raises :class:`~fs_fwdllm.errors.WireError` for anything else."""
    return _frames(_content(payload, "client process"), "client process")


def _content(payload: object, sender: str) -> object:
    if not isinstance(payload, dict) or set(payload) != {_KEY}:
        kind = type(payload).__name__
        raise WireError(
            f"the {sender} sent a {kind} that is not ours; both sides must run the trainer and aggregator of fs_fwdllm"
        )
    return payload[_KEY]


def _frames(pairs: object, sender: str) -> dict[int, bytes]:
    if not isinstance(pairs, tuple):
        raise WireError(f"the {sender}'s payload carries a {type(pairs).__name__} instead of frames")
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and type(pair[0]) is int and isinstance(pair[1], bytes)):
            raise WireError(f"the {sender}'s payload carries something that is not a client's frame")
    return dict(pairs)
