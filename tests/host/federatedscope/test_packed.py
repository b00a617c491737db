"""A packed base, and one on the disk, is the same base on every host: one digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from fs_fwdllm.config import load_config
from fs_fwdllm.running import local
from tests.host.federatedscope.federation import Federation, outcome_of, write_config
from tests.host.federatedscope.participants import Starter
from tests.host.federatedscope.test_spellings import settings_of
from tests.host.fixtures import models, world
from tests.host.small import World
from tests.model.tiny_gguf import save_tiny_gguf

__all__ = ["models", "world"]


def test_a_base_on_the_disk_ends_with_one_digest(world: World, launcher: Starter, tmp_path: Path) -> None:
    settings = {**settings_of(world, "FedMeZO", "", 4), "fwdllm.base.stream": True}
    settings["llm.adapter.args"] = [{"adapter_method": "lora", "r": 2}]
    federation = Federation(write_config(world, settings, language_model=False), tmp_path, launcher)
    expected = federation.local()
    assert federation.standalone() == expected
    assert federation.distributed() == expected


@pytest.mark.parametrize("method", ["fwdllm", "FedMeZO"])
def test_a_packed_base_ends_with_one_digest(method: str, world: World, launcher: Starter, tmp_path: Path) -> None:
    settings = settings_of(world, method, "", 1)
    plain = outcome_of(local.run(load_config(write_config(world, settings, language_model=False))))
    settings |= {"fwdllm.base.quantise": "int4", "fwdllm.base.group": 16}
    cfg = write_config(world, settings, language_model=False)
    federation = Federation(cfg, tmp_path, launcher)
    expected = federation.local()
    assert expected != plain  # it is another base
    assert federation.standalone() == expected
    if method == "FedMeZO":
        assert federation.distributed() == expected


def test_a_gguf_file_on_the_disk_ends_with_one_digest(world: World, launcher: Starter, tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "tiny.gguf", "Q4_K", settings={"llama.context_length": 512})
    settings = {
        "federate.method": "FedMeZO", "federate.total_round_num": 2, "model.type": f"{file}@huggingface_llm",
        "llm.tok_len": 512, "fwdllm.probes": 4, "fwdllm.probes_per_batch": 4, "fwdllm.base.stream": True,
        "data.root": str(world.root), "llm.adapter.args": [{"adapter_method": "lora", "r": 2}],
    }  # fmt: skip
    federation = Federation(write_config(world, settings), tmp_path, launcher)
    expected = federation.local()
    assert federation.standalone() == expected
    assert federation.distributed() == expected
