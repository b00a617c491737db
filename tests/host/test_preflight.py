"""What can be checked before anything is loaded is checked there, on every host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fs_fwdllm.errors import FwdLLMError
from fs_fwdllm.running import local
from fs_fwdllm.running.preflight import check_beforehand
from tests.host.fixtures import models, world
from tests.host.small import World

__all__ = ["models", "world"]

#: ``{override: what is said}``
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "metric": ({"eval.metrics": ["acuracy"]}, "eval.metrics 'acuracy'.*did you mean 'accuracy'"),
    "model": (
        {"model.type": "/no/such/folder@transformers"},
        "model.type: the folder '/no/such/folder' does not exist",
    ),
    "combination": ({"federate.method": "fedmezo", "fwdllm.gate.kind": "relative"}, "fwdllm.gate.kind"),
    "output folder": ({"outdir": __file__}, "outdir: .* is a file, not a folder"),
    "name": ({"expname": "a/b"}, "expname: must be the name of one folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_is_loaded(
    mistake: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, said = MISTAKES[mistake]
    monkeypatch.setattr("fs_fwdllm.running.session.load_tokenizer", _nothing_is_loaded)
    with pytest.raises(FwdLLMError, match=said):
        local.run(world.config(settings))
    assert not (world.root / "runs").exists(), "no folder is left behind"


def _nothing_is_loaded(*_: object) -> None:
    raise AssertionError("the tokenizer was loaded before the mistake was found")


def test_an_accelerator_that_is_not_there_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_beforehand(world.config({"use_gpu": True, "device": 1}))
    with pytest.raises(FwdLLMError, match="device 7: this machine has accelerators 0 to 1"):
        check_beforehand(world.config({"use_gpu": True, "device": 7}))


def test_a_folder_nobody_may_write_to_is_named(world: World, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    config = world.config({"outdir": str(closed / "runs")})
    try:
        (closed / "probe").mkdir()
    except PermissionError:
        with pytest.raises(FwdLLMError, match=r"outdir: .* cannot be made or written"):
            local.run(config)
    else:
        pytest.skip("this user may write everywhere")
