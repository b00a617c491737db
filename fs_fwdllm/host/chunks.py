"""Large texts in pieces, for transports that limit the size of a message.

A frame that carries blocks of a model may be larger than what a host's transport lets through. :func:`split` cuts a
text into numbered pieces, each of which says what it is a piece of; :class:`Joiner` puts them together again, whatever
order they come in, and hands out a whole only if its checksum agrees::

    fwdllm-piece 1f0c...(32 hexadecimal digits) 2 5 31457280 <the piece's own text>

that is: the BLAKE2b digest of the whole, number and count of the pieces, length of the whole. A text that fits is left
as it is, so that nothing changes for methods with small frames. Both ends need the same limit only in order not to be
refused: a :class:`Joiner` takes pieces of any size, up to the length that whoever receives expects of the whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from fs_fwdllm.errors import WireError

__all__ = ["PIECE_BYTES", "WHOLE_BYTES", "Joiner", "is_piece", "split"]

#: Largest piece with its head, in characters of ASCII text: well below the 300 MiB of FederatedScope's gRPC channel.
PIECE_BYTES = 64 << 20
#: Largest text that is put together: what the largest frame is as base64 text, and a little.
WHOLE_BYTES = 24 << 30

_WORD = "fwdllm-piece"
_HEAD = re.compile(r"fwdllm-piece ([0-9a-f]{32}) (\d{1,6}) (\d{1,6}) (\d{1,12}) ")
#: What a piece takes in memory beside its characters, in a dictionary.
_PIECE_OVERHEAD_BYTES = 256
#: What all overheads of a text may come to, beside a sixteenth of the text: some pieces of a short one.
_SLACK_BYTES = 1 << 13
_HEAD_BYTES = len(_WORD) + 32 + 6 + 6 + 12 + 5


def split(text: str, piece_bytes: int = PIECE_BYTES) -> list[str]:
    """``text`` (ASCII) in pieces of at most ``piece_bytes`` bytes; itself if it fits.

    Raises:
        ValueError: ``piece_bytes`` leaves no room beside a piece's head.
        WireError: ``text`` would need more pieces than can be numbered, or begins like a piece.
    """
    room = piece_bytes - _HEAD_BYTES
    if room < 1:
        raise ValueError(f"piece_bytes {piece_bytes}: a piece's head alone takes {_HEAD_BYTES} bytes")
    if text.startswith(_WORD):
        raise WireError("a text that begins like a piece cannot be split")
    if len(text) <= piece_bytes:
        return [text]
    count = -(-len(text) // room)
    if count > 999_999:
        raise WireError(f"{len(text)} bytes would be {count} pieces of {piece_bytes} bytes, more than 999999")
    digest = _digest([text])
    return [
        f"{_WORD} {digest} {number} {count} {len(text)} {text[number * room : (number + 1) * room]}"
        for number in range(count)
    ]


def is_piece(text: str) -> bool:
    """Whether a text is, or says that it is, a piece of a longer one."""
    return text.startswith(_WORD)


def _digest(pieces: Iterable[str]) -> str:
    """Of the text that the pieces are, without putting it together."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece.encode("ascii", "replace"))
    return digest.hexdigest()


@dataclass
class _Unfinished:
    digest: str
    count: int
    length: int
    pieces: dict[int, str] = field(default_factory=dict)
    characters: int = 0

    @property
    def held(self) -> int:
        return self.characters + _PIECE_OVERHEAD_BYTES * len(self.pieces)


class Joiner:
    """Puts pieces together, one text at a time for every sender.

    A sender's new text replaces its unfinished one, and nobody's text makes another's be forgotten: what is kept is one
    text for each sender that is let in, each no longer than was expected of it (and a sixteenth, and 8 KiB). So the
    caller lets in those alone from whom it waits for something.
    """

    def __init__(self) -> None:
        self._unfinished: dict[Hashable, _Unfinished] = {}

    def add(self, sender: Hashable, text: str, whole_bytes: int = WHOLE_BYTES) -> str | None:
        """Take in what ``sender`` sent; the whole text when it is complete, ``None`` while pieces are missing.

        A text that is no piece is whole, and drops what the sender left unfinished.

        Args:
            whole_bytes: longest text that is put together.

        Raises:
            WireError: a piece is malformed or empty, contradicts the earlier ones, or the whole is too long, in too
                many pieces, or corrupted. What the sender had left unfinished is dropped.
        """
        if not is_piece(text):
            self._unfinished.pop(sender, None)
            return text
        try:
            return self._add_piece(sender, text, whole_bytes)
        except WireError:
            self._unfinished.pop(sender, None)
            raise

    def forget(self) -> None:
        """Drop what is unfinished: nobody waits for it any longer."""
        self._unfinished.clear()

    @property
    def held_bytes(self) -> int:
        """What is kept for unfinished texts takes in memory: their characters, and an overhead for each piece."""
        return sum(own.held for own in self._unfinished.values())

    def _add_piece(self, sender: Hashable, text: str, whole_bytes: int) -> str | None:
        head = _HEAD.match(text)
        if head is None:
            raise WireError(f"a piece's head is malformed: {text[:_HEAD_BYTES]!r}")
        digest, number, count, length = head[1], int(head[2]), int(head[3]), int(head[4])
        if not (number < count <= length <= whole_bytes):
            raise WireError(
                f"piece {number} of {count} of a text of {length} bytes cannot be; the limit is {whole_bytes} bytes"
            )
        own = self._unfinished_text(sender, digest, count, length)
        piece = text[head.end() :]
        if not piece:
            raise WireError(f"piece {number} of {count} is empty")
        if own.pieces.setdefault(number, piece) is piece:
            own.characters += len(piece)
        elif own.pieces[number] != piece:
            raise WireError(f"piece {number} of {count} came twice, with other contents")
        if own.characters > length:
            raise WireError(f"the pieces of a text of {length} bytes have more")
        if own.held > whole_bytes + whole_bytes // 16 + _SLACK_BYTES:
            raise WireError(f"a text of {length} bytes comes in too many pieces")
        if len(own.pieces) < count:
            return None
        del self._unfinished[sender]
        pieces = [own.pieces[index] for index in range(count)]
        if own.characters != length or _digest(pieces) != digest:
            raise WireError(f"{count} pieces do not give the text of {length} bytes that they are pieces of")
        return "".join(pieces)

    def _unfinished_text(self, sender: Hashable, digest: str, count: int, length: int) -> _Unfinished:
        own = self._unfinished.get(sender)
        if own is None or own.digest != digest:
            own = self._unfinished[sender] = _Unfinished(digest, count, length)
        if (own.count, own.length) != (count, length):
            raise WireError(f"pieces of one text disagree: {own.count} of {own.length} bytes, {count} of {length}")
        return own
