"""However a method is spelt, and whether the trainer is named or follows: one file, one digest, on every host."""

from __future__ import annotations

from pathlib import Path

import pytest

from fs_fwdllm.config import load_config
from fs_fwdllm.running import local
from tests.host.federatedscope.federation import Federation, Outcome, outcome_of, write_config
from tests.host.federatedscope.participants import Starter
from tests.host.fixtures import models, world
from tests.host.small import World

__all__ = ["models", "world"]

#: ``{method: spellings}`` as people write them.
SPELLINGS = {
    "forward gradient": [
        ("fwdllm", ""), ("fwdllm", "fwdtrainer"), ("FwdLLM", "FwdTrainer"), ("fedfwd", ""), ("FedAvg", "FwdTrainer"),
    ],
    "mezo": [("fedmezo", ""), ("FedMeZO", "MeZOTrainer"), ("fedavg", "mezotrainer")],
}  # fmt: skip
#: The spellings that are also run with every participant in a process of its own, which takes longest.
APART = [("fwdllm", ""), ("FedMeZO", "MeZOTrainer")]
CASES = [(method, *words, batch) for batch in (1, 4) for method, found in SPELLINGS.items() for words in found]


def settings_of(world: World, protocol: str, trainer: str, probes_per_batch: int) -> dict[str, object]:
    """A classifier with dropped-in attention, which is where spellings used to part ways."""
    named = {"trainer.type": trainer} if trainer else {}
    return {
        "federate.method": protocol, **named, "federate.total_round_num": 2, "data.type": f"{world.texts()}@text",
        "data.root": str(world.root), "train.local_update_steps": 1, "fwdllm.probes": 4,
        "fwdllm.probes_per_batch": probes_per_batch,
    }  # fmt: skip


def reference(world: World, method: str, probes_per_batch: int, root: Path) -> Outcome:
    """The first spelling on ``local``."""
    settings = settings_of(world, *SPELLINGS[method][0], probes_per_batch)
    cfg = write_config(world, settings, language_model=False)
    return outcome_of(local.run(load_config(cfg, ["outdir", str(root / "reference")])))


@pytest.mark.parametrize(("method", "protocol", "trainer", "probes_per_batch"), CASES)
def test_every_spelling_is_one_method_on_every_host(
    method: str, protocol: str, trainer: str, probes_per_batch: int, world: World, launcher: Starter, tmp_path: Path
) -> None:
    expected = reference(world, method, probes_per_batch, tmp_path)
    settings = settings_of(world, protocol, trainer, probes_per_batch)
    federation = Federation(write_config(world, settings, language_model=False), tmp_path, launcher)
    assert federation.local() == expected
    assert federation.standalone() == expected
    if (protocol, trainer) in APART:
        assert federation.distributed() == expected
