"""A shipped configuration, as shipped, ends with one digest on ``local`` and inside FederatedScope."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.host.federatedscope.participants import Starter
from tests.host.fixtures import models, world
from tests.host.shipped import ROUNDS, SHIPPED, digests_in, local_digests, made_up, real
from tests.host.small import World

__all__ = ["models", "world"]

_ROUNDS = ["federate.total_round_num", str(ROUNDS)]


def _inside(launcher: Starter, root: Path, name: str, place: list[str], *more: str) -> list[str]:
    arguments = ["--cfg", name, *place, *_ROUNDS, "outdir", str(root), "expname", "inside", *more]
    launcher.start(arguments, root, name="host").succeed()
    return digests_in(root / "inside" / "fwdllm")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_has_one_digest(name: str, world: World, launcher: Starter, tmp_path: Path) -> None:
    place = made_up(world)
    assert _inside(launcher, tmp_path, name, place) == local_digests(name, place, tmp_path)


def test_a_shipped_configuration_on_real_data(
    launcher: Starter, tmp_path: Path, shared_data: Callable[[str], Path]
) -> None:
    place = real(tmp_path, shared_data)
    assert _inside(launcher, tmp_path, "mezo_alpaca", place) == local_digests("mezo_alpaca", place, tmp_path)


def test_who_wants_the_hosts_reader_gets_it(world: World, launcher: Starter, tmp_path: Path) -> None:
    """It deals the rows otherwise, so that the run is another; a reader that nobody knows is refused."""
    place = made_up(world)
    inside = _inside(launcher, tmp_path, "mezo_alpaca", place, "fwdllm.data.reader", "host")
    assert inside[1:] != local_digests("mezo_alpaca", place, tmp_path)[1:]
    wrong = launcher.start(["--cfg", "mezo_alpaca", *place, "fwdllm.data.reader", "hst"], tmp_path, name="wrong")
    assert wrong.wait() != 0
    assert "error: ConfigError: fwdllm.data.reader" in wrong.text and "'host'" in wrong.text


#: Says how many threads the first client works with.
_THREADS = """
import torch
import fs_fwdllm.host.federatedscope.run_state as module
torch.set_num_threads({process})
real = module.assemble_worker
def assemble_worker(*arguments):
    print("threads:", torch.get_num_threads())
    return real(*arguments)
module.assemble_worker = assemble_worker
"""


@pytest.mark.parametrize(("chosen", "expected"), [("0", 3), ("2", 2)])
def test_threads_mean_the_same_inside_the_host(
    chosen: str, expected: int, world: World, launcher: Starter, tmp_path: Path
) -> None:
    """The number of threads can change last bits, and the host sets it to one of its own accord."""
    arguments = ["--cfg", "mezo_alpaca", *made_up(world), *_ROUNDS, "outdir", tmp_path, "threads", chosen]
    run = launcher.start(arguments, tmp_path, name="host", before=_THREADS.format(process=3))
    assert f"threads: {expected}\n" in run.succeed()
