"""Freed memory is given back where the C library can; elsewhere nothing happens."""

from __future__ import annotations

import ctypes

import pytest
import torch

from fs_fwdllm.running.heap import give_back_freed_memory


def test_what_lives_is_left_alone() -> None:
    held = [torch.full((1 << size,), float(size)) for size in range(4, 16)]
    del held[::2]
    give_back_freed_memory()
    assert all(bool((tensor == tensor[0]).all()) for tensor in held)


@pytest.mark.parametrize("library", [object(), None])
def test_another_c_library_is_no_error(monkeypatch: pytest.MonkeyPatch, library: object) -> None:
    """One without the function, and one that cannot be loaded."""

    def load(name: str | None) -> object:
        if library is None:
            raise OSError("no such library")
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    give_back_freed_memory()
