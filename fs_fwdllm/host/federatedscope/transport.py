"""The host's gRPC messages without spinning, without unpickling, and without waiting for ever.

The host's ``receive`` is a loop that keeps a core busy until a message comes, and its ``send`` waits as long as the
other side likes. Here a short sleep is between two looks at the queue, after each look the caller gets the chance to
see to its deadlines, and a message that cannot be delivered in time is given up. A participant that has ended is
noticed by its port: nothing answers there any more.

What arrives is read only as far as the types of our messages and theirs reach: anything else is dropped with a warning.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fs_fwdllm.core.wire import DEFAULT_LIMIT_BYTES, from_text, text_bytes
from fs_fwdllm.errors import WireError, shown
from fs_fwdllm.host.addresses import is_listening, parsed
from fs_fwdllm.host.chunks import Joiner, is_piece, split
from fs_fwdllm.host.federatedscope.intake import DROPPED
from fs_fwdllm.host.federatedscope.secure import Tls

__all__ = ["Expected", "Hello", "Sender", "dispatch", "frame_in", "next_message", "reachable"]

logger = logging.getLogger("federatedscope.fs_fwdllm")

#: From a message to how long a text it may be a piece of, in characters; 0 where none is waited for from its sender.
Expected = Callable[[Any], int]

_LOOK_EVERY_S = 0.005
_CONNECT_WITHIN_S = 5.0
_AT_ONCE = 16
_LAST_PORT = 65535


@dataclass(frozen=True)
class Hello:
    """What a client says of itself when it joins.

    Attributes:
        client: its number; 0 or less asks the server for one.
        samples: training samples it holds.
        incarnation: a number drawn when its process started; another one means that it was restarted.
        digest: of the parameters it holds.
        base: digest of its base; empty in a simulation, and where it is not known.
        settings: hashes of what determines its work (:mod:`fs_fwdllm.running.agreement`); empty in a simulation.
        host, port: where it listens; empty and 0 in a simulation.
    """

    client: int
    samples: int
    incarnation: int
    digest: bytes
    base: bytes = b""
    settings: str = ""
    host: str = ""
    port: int = 0

    def content(self) -> dict[str, int | str]:
        """As the content of a host's message."""
        return {**vars(self), "digest": self.digest.hex(), "base": self.base.hex()}

    @classmethod
    def read(cls, content: Any) -> Hello:
        """Inverse of :meth:`content`.

        Raises:
            WireError: it is something else.
        """
        try:
            numbers = {name: content[name] for name in ("client", "samples", "incarnation", "port")}
            texts = {name: content[name] for name in ("host", "settings")}
            digest, base = bytes.fromhex(content["digest"]), bytes.fromhex(content["base"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise WireError(f"a join_in message lacks or garbles a field ({type(error).__name__}: {error})") from error
        if {type(text) for text in texts.values()} != {str} or {type(number) for number in numbers.values()} != {int}:
            raise WireError("a join_in message has a field of the wrong type")
        if numbers["samples"] < 0 or not 0 <= numbers["port"] <= _LAST_PORT:
            raise WireError("a join_in message has a field that is out of range")
        return cls(**numbers, **texts, digest=digest, base=base)


def frame_in(message: Any, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> bytes:
    """The frame a message of ours carries as text.

    Raises:
        WireError: it carries something else, or a frame of more than ``limit_bytes``.
    """
    if not isinstance(message.content, str):
        raise WireError(f"a {message.msg_type} message carries a {type(message.content).__name__} instead of text")
    if len(message.content) > text_bytes(limit_bytes):
        raise WireError(
            f"a {message.msg_type} message carries a text of {len(message.content)} characters, more than a frame of "
            f"{limit_bytes} bytes has"
        )
    return from_text(message.content)


def dispatch(participant: Any, message: Any, taken: Collection[str]) -> None:
    """Let a worker of ours handle a message of a type it takes; any other, and one that is damaged, is dropped."""
    if message.msg_type not in taken:
        participant.callback_funcs_for_foreign_message(message)
        return
    try:
        participant.msg_handlers[message.msg_type](message)
    except WireError as error:
        DROPPED.say(f"dropped a message of {message.sender}: {error}")


class Sender:
    """Sends the host's messages over gRPC, each within a deadline. Takes the place of a manager's own ``_send``.

    Args:
        manager: the host's gRPC communication manager.
        deadline_s: seconds a message may take; finding the receiver may take at most five of them.
        tls: with which certificates; ``None`` sends without protection.
    """

    def __init__(self, manager: Any, deadline_s: float, tls: Tls | None) -> None:
        self._compression = manager.comp_method
        self._deadline_s = deadline_s
        self._tls = tls
        manager._send = self

    def __call__(self, address: str, message: Any) -> bool:
        """Send ``message`` to ``host:port``, a large text in pieces; whether it was delivered."""
        import grpc
        from federatedscope.core.proto.gRPC_comm_manager_pb2_grpc import gRPCComServeFuncStub

        with self._channel(address, message.receiver[0]) as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=min(self._deadline_s, _CONNECT_WITHIN_S))
                stub = gRPCComServeFuncStub(channel)
                for piece in _pieces(message):
                    stub.sendMessage(piece.transform(to_list=True), timeout=self._deadline_s)
            except (grpc.RpcError, grpc.FutureTimeoutError) as error:
                reason = error.code().name if isinstance(error, grpc.Call) else self._why_nobody(address, message)
                logger.warning("a %s message to %s was not delivered (%s)", message.msg_type, address, reason)
                return False
        return True

    def _channel(self, address: str, receiver: int) -> Any:
        import grpc

        options = (("grpc.enable_http_proxy", 0),)
        if self._tls is not None:
            return self._tls.channel(address, receiver, options, self._compression)
        return grpc.insecure_channel(address, options=options, compression=self._compression)

    def _why_nobody(self, address: str, message: Any) -> str:
        return (self._tls and self._tls.complaint(address, message.receiver[0])) or "nobody answers"

    def to_many(self, messages: Sequence[tuple[str, Any]]) -> list[bool]:
        """Send ``(address, message)`` pairs side by side, so that one dead receiver does not hold up the others."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda pair: self(*pair), messages))


def _pieces(message: Any) -> Iterator[Any]:
    """``message`` itself, or one message for each piece of its text."""
    if not isinstance(message.content, str):
        yield message
        return
    for text in split(message.content):
        piece = copy.copy(message)
        piece.content = text
        yield piece


def next_message(manager: Any, wait_s: float, joiner: Joiner, expected: Expected) -> Any:
    """The next readable message of a gRPC communication manager, ``None`` if none comes within ``wait_s`` seconds.

    Texts that came in pieces are put together by ``joiner``, as far as they are ``expected``. Pieces of others, and
    what cannot be read as a message of the host's, are dropped with a warning.
    """
    until = time.monotonic() + wait_s
    while True:
        if manager.server_funcs.msg_queue:
            message = _whole(_read(manager), joiner, expected)
            if message is not None:
                return message
        if time.monotonic() >= until:  # by the clock: what cannot be read may come without an end
            return None
        if not manager.server_funcs.msg_queue:
            time.sleep(_LOOK_EVERY_S)


def _whole(message: Any, joiner: Joiner, expected: Expected) -> Any:
    """``message`` with its whole text; ``None`` while pieces are missing."""
    if message is None or not isinstance(message.content, str):
        return message
    longest = expected(message)
    if not longest:  # nothing of it is kept, and nothing that is kept is touched
        if not is_piece(message.content):
            return message
        DROPPED.say(f"dropped a piece of a {message.msg_type} message of {message.sender}, which is not waited for")
        return None
    try:
        message.content = joiner.add((message.sender, message.msg_type), message.content, longest)
    except WireError as error:
        DROPPED.say(f"dropped a message of {message.sender}: {error}")
        return None
    return message if message.content is not None else None


def _read(manager: Any) -> Any:
    try:
        message = manager.receive()
    except Exception as error:  # whatever the bytes made the host's parser raise, they are not a message
        DROPPED.say(f"dropped a message that cannot be read ({type(error).__name__}: {shown(str(error))})")
        return None
    if type(message.msg_type) is str and type(message.sender) is int and type(message.state) is int:
        return message
    DROPPED.say("dropped a message whose type, sender or round is garbled")
    return None


def reachable(addresses: Iterable[str]) -> dict[str, bool]:
    """Whether something listens at each ``host:port``; looked up side by side."""
    wanted = list(addresses)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(wanted, pool.map(_is_reachable, wanted), strict=True))


def _is_reachable(address: str) -> bool:
    return is_listening(parsed(address), _CONNECT_WITHIN_S)
