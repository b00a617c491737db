"""A run whose adapter reads activations through fixed bytes: they go on with it, and other bytes are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fs_fwdllm import Sampling, load
from fs_fwdllm.errors import CheckpointError
from fs_fwdllm.model.basis_file import basis_fingerprint
from fs_fwdllm.running.local import resume, run
from tests.host.small import CLASSES, METHODS, World
from tests.host.test_resume import interrupted_at, started
from tests.model.tiny import HIDDEN


def write_basis(file: Path, seed: int = 8) -> Path:
    save_file({"output_residual.down": torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(seed))}, file)
    return file


def settings(method: str, **arguments: Any) -> dict[str, Any]:
    return {**METHODS[method], "llm.adapter.args": [{"adapter_method": "output_residual", "rank": 4, **arguments}]}


@pytest.mark.parametrize("method", ["forward_gradient", "mezo", "fedsgd"])
def test_what_a_run_saves_is_what_it_evaluated(world: World, method: str) -> None:
    """The end of a run loads its folder and compares; a basis that is gone by then makes no difference."""
    basis = write_basis(world.root / "basis.safetensors")
    rows = load_file(basis)["output_residual.down"][:4]
    digest = basis_fingerprint(str(basis))
    path = run(world.config(settings(method, basis=str(basis), basis_digest=digest), language_model=True))
    basis.unlink()
    trained = load(path)
    short = Sampling(max_new_tokens=4)
    alone = [trained.generate([prompt], sampling=short)[0] for prompt in ("w3 w4", "w5")]
    assert trained.generate(["w3 w4", "w5"], sampling=short) == alone, "with a cache of keys and values, padded or not"
    adapter = trained.model.lm_head.output_residual
    assert torch.equal(adapter.down, rows)
    assert adapter.up.any()
    assert adapter.bias.any()


def test_classes_by_label_words(world: World) -> None:
    """Only the tokens that stand for classes compete, so that no other one's bias moves."""
    chosen = settings("fedsgd")
    chosen |= {"data.type": f"{world.texts()}@text", "fwdllm.data.label_words": ["w4", "w5", "w6"]}
    path = run(world.config(chosen, language_model=True))
    trained = load(path)
    assert {one.label for one in trained.predict(["w4 w5", "w70 w71"])} <= set(CLASSES)
    assert trained.model.lm_head.output_residual.bias.nonzero().flatten().tolist() == [4, 5, 6]


def test_an_interrupted_run_goes_on_with_the_same_bytes_only(world: World) -> None:
    basis = write_basis(world.root / "basis.safetensors")
    config = world.config(settings("forward_gradient", basis=str(basis)), language_model=True)
    whole = run(config)
    with interrupted_at(2, answers=1):
        run(config)
    path = started(config, {whole})
    write_basis(basis, seed=9)
    with pytest.raises(CheckpointError, match="the basis file changed after the checkpoint was written"):
        resume(path)
    write_basis(basis)
    resume(path)
    ours, theirs = (load_file(place / "adapter" / "output_residual_model.safetensors") for place in (path, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
