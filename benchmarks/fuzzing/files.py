"""Checkpoints and data files after an accident, or after somebody was at them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fs_fwdllm.data.h5.builders import RECIPES, build
from fs_fwdllm.data.h5.files import import_h5py, read_h5_data
from fs_fwdllm.errors import FwdLLMError
from fs_fwdllm.running.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from fs_fwdllm.running.state_file import read_state, write_state

from .damage import damaged

__all__ = ["try_checkpoint", "try_h5"]

_ROWS = 20


def _a_checkpoint() -> Checkpoint:
    return Checkpoint(
        next_round=3,
        tensors={
            "trainable.0": torch.arange(60, dtype=torch.float32).view(20, 3),
            "optimizer.step.0": torch.tensor(3.0),
            "catch_up.1": torch.tensor([1, 2, 255], dtype=torch.uint8),
        },
        numbers={"failed_rounds": 0, "known_round": [[1, 2], [3, 4]], "complete_from": 0},
        counters={"seconds": 0.3, "upload_bytes": 10},
        fingerprint="f" * 32,
        inputs={"data": "0" * 32},
        evaluations=[0.5, 0.25],
        total_rounds=9,
    )


def _made(path: Path, make: Callable[[], None]) -> Path:
    """A file that every input starts from, made once; it keeps its name with another ending."""
    original = path.with_suffix(".original")
    if not original.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make()
        shutil.move(path, original)
    return original


def try_checkpoint(folder: Path, seed: int) -> str:
    """Read a checkpoint with damaged bytes, or with odd facts under a right checksum.

    Raises:
        AssertionError: bytes were damaged, and what is read is neither refused nor what was written.
    """
    draw, path = random.Random(seed), folder / "state.safetensors"
    original = _made(path, lambda: write_checkpoint(folder, _a_checkpoint()))
    told = draw.random() < 0.4
    if told:
        shutil.copy(original, path)
        about, tensors = read_state(path)
        write_state(path, facts(about, seed), {name: tensor.clone() for name, tensor in tensors.items()}, "")
    else:
        path.write_bytes(damaged(original.read_bytes(), draw))
    try:
        found = read_checkpoint(folder)
    except FwdLLMError as error:
        return type(error).__name__
    assert told or _same(found, _a_checkpoint()), "damage was read as something else"
    return "accepted" if told else "the same"


def _same(one: Checkpoint, other: Checkpoint) -> bool:
    if {**vars(one), "tensors": 0} != {**vars(other), "tensors": 0} or one.tensors.keys() != other.tensors.keys():
        return False
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def _write_h5(path: Path) -> None:
    rows = (f'"{1 + row % 3}","title","words of row {row}"' for row in range(_ROWS))
    (path.parent / "rows.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    build(RECIPES["agnews"], path, path.parent / "rows.csv", None, 0.2, 0)


def try_h5(folder: Path, seed: int) -> str:
    """Read a data file with damaged bytes, or with odd facts in its attributes."""
    draw, path = random.Random(seed), folder / "rows_data.h5"
    original = _made(path, lambda: _write_h5(path))
    if draw.random() < 0.4:
        shutil.copy(original, path)
        with import_h5py().File(path, "a") as file:
            about = json.loads(file["attributes"][()])
            del file["attributes"]
            file["attributes"] = json.dumps(facts(about, seed)).encode("utf-8", "surrogatepass")
    else:
        path.write_bytes(damaged(original.read_bytes(), draw))
    try:
        read_h5_data(path)
        return "accepted"
    except FwdLLMError as error:
        return type(error).__name__


def facts(about: dict[str, Any], seed: int) -> dict[str, Any]:
    """A JSON object with one to three odd values, at any depth."""
    draw = random.Random(seed)
    changed: dict[str, Any] = json.loads(json.dumps(about))
    for _ in range(draw.randint(1, 3)):
        node: Any = changed
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw.choice(keys)
            if not (isinstance(node[key], dict | list) and node[key]) or draw.random() < 0.4:
                _change(draw, node, key)
                break
            node = node[key]
    return changed


def _change(draw: random.Random, node: Any, key: Any) -> None:
    if draw.random() < 0.2:
        del node[key]
    elif isinstance(node, dict) and draw.random() < 0.1:
        node["odd"] = 1
    else:
        node[key] = draw.choice((None, True, -1, 0, 1, 2**70, 0.5, 1e308, "", "x", "7", "\0", "../x", [], {}, [[]],
        [1], ["x"],
                                 {"0": 1}, [[1, 2], [3]], [None], {"x": None}))  # fmt: skip
