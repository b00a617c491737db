"""Pieces of a text come together again whatever way they come, and nothing else is taken for a whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.core.wire import from_text, to_text
from fs_fwdllm.errors import WireError
from fs_fwdllm.host.chunks import Joiner, split

LIMIT = 100


def some_text(length: int, seed: int = 0) -> str:
    return to_text(np.random.default_rng(seed).bytes(length))[:length]


@given(st.text(st.characters(codec="ascii"), max_size=700), st.integers(80, 200), st.randoms(use_true_random=False))
def test_pieces_give_the_text_in_any_order_and_fit(text: str, limit: int, random: object) -> None:
    pieces = split(text, limit)
    assert all(len(piece.encode()) <= limit for piece in pieces)
    assert (pieces == [text]) == (len(text) <= limit)
    random.shuffle(pieces)  # type: ignore[attr-defined]
    joiner = Joiner()
    assert [joiner.add(1, piece) for piece in pieces] == [None] * (len(pieces) - 1) + [text]
    assert joiner.held_bytes == 0


def test_a_frame_survives_the_way(small: int = 5000) -> None:
    frame = np.random.default_rng(1).bytes(small)
    joiner, whole = Joiner(), None
    for piece in split(to_text(frame), 300):
        assert whole is None
        whole = joiner.add("client", piece)
    assert whole is not None and from_text(whole) == frame


def test_senders_do_not_mix_and_a_repeated_piece_changes_nothing() -> None:
    texts = {sender: some_text(300, sender) for sender in (1, 2)}
    pieces = {sender: split(text, LIMIT) for sender, text in texts.items()}
    joiner, done = Joiner(), {}
    for ours, theirs in zip(pieces[1], pieces[2], strict=True):
        for sender, piece in ((1, ours), (2, theirs)):
            done[sender] = joiner.add(sender, piece)
            if done[sender] is None:
                assert joiner.add(sender, piece) is None
    assert done == texts


def test_a_new_text_replaces_an_unfinished_one() -> None:
    joiner = Joiner()
    first, second = split(some_text(300, 1), LIMIT), split(some_text(300, 2), LIMIT)
    joiner.add(1, first[0])
    assert [joiner.add(1, piece) for piece in second][-1] == some_text(300, 2)
    joiner.add(1, first[0])
    assert joiner.add(1, "short") == "short" and joiner.held_bytes == 0
    assert joiner.add(1, first[1]) is None, "the first piece was dropped"


def test_what_is_kept_of_a_sender_is_bounded() -> None:
    joiner = Joiner()
    with pytest.raises(WireError, match="the limit is 400 bytes"):
        joiner.add(1, split(some_text(500), LIMIT)[0], 400)
    head = split(some_text(300), LIMIT)[0][:72]
    fat = head[: head.rindex(" 300 ")] + " 300 " + "x" * 301
    with pytest.raises(WireError, match="have more"):
        joiner.add(0, fat)
    assert joiner.held_bytes == 0


def test_pieces_are_counted_with_what_they_take_beside_their_characters() -> None:
    """A text of a megabyte in pieces of one character would take two hundred times its length."""
    joiner, length = Joiner(), 100_000
    held = 0
    with pytest.raises(WireError, match="too many pieces"):
        for number in range(length):
            joiner.add(1, f"fwdllm-piece {'0' * 32} {number} {length} {length} x", length)
            held = max(held, joiner.held_bytes)
    assert held <= length + length // 16 + (8 << 10) and joiner.held_bytes == 0


def test_an_empty_piece_is_refused() -> None:
    joiner = Joiner()
    with pytest.raises(WireError, match="is empty"):
        joiner.add(1, f"fwdllm-piece {'0' * 32} 0 2 300 ")
    assert joiner.held_bytes == 0


def test_no_sender_makes_another_be_forgotten() -> None:
    joiner, texts = Joiner(), {sender: some_text(300, sender) for sender in range(5000)}
    pieces = {sender: split(text, 250) for sender, text in texts.items()}
    assert all(joiner.add(sender, first) is None for sender, (first, _) in pieces.items())
    assert {sender: joiner.add(sender, second) for sender, (_, second) in pieces.items()} == texts


def test_what_is_no_longer_waited_for_is_dropped() -> None:
    joiner = Joiner()
    joiner.add(1, split(some_text(300), LIMIT)[0])
    joiner.forget()
    assert joiner.held_bytes == 0


@pytest.mark.parametrize(
    "piece",
    [
        "fwdllm-piece",
        "fwdllm-piece  0 2 300 abc",
        f"fwdllm-piece {'g' * 32} 0 2 300 abc",
        f"fwdllm-piece {'0' * 32} 2 2 300 abc",
        f"fwdllm-piece {'0' * 32} -1 2 300 abc",
        f"fwdllm-piece {'0' * 32} 0 0 300 abc",
        f"fwdllm-piece {'0' * 32} 0 400 300 abc",
        f"fwdllm-piece {'0' * 32} 0 2 9999999999999 abc",
        f"fwdllm-piece {'0' * 32} 0 1 3 abc",
    ],
)
def test_a_malformed_piece_is_refused(piece: str) -> None:
    with pytest.raises(WireError):
        Joiner().add(1, piece)


def test_pieces_that_contradict_each_other_are_refused_and_forgotten() -> None:
    pieces = split(some_text(300), LIMIT)
    for bad, message in (
        (pieces[0][:-1] + "!", "came twice"),
        (pieces[1].replace(" 300 ", " 299 "), "disagree"),
    ):
        joiner = Joiner()
        joiner.add(1, pieces[0])
        with pytest.raises(WireError, match=message):
            joiner.add(1, bad)
        assert joiner.held_bytes == 0
    joiner = Joiner()
    with pytest.raises(WireError, match="do not give the text"):
        for piece in (*pieces[:-1], pieces[-1][:-1] + "!"):
            joiner.add(1, piece)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="head alone"):
        split("x" * 200, 50)
    with pytest.raises(WireError, match="begins like a piece"):
        split("fwdllm-piece and more", LIMIT)
