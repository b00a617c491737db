"""A shipped configuration, as shipped, ends with one digest on ``local`` and inside FedML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fs_fwdllm.host.fedml import run
from tests.host.fedml.federation import FedMLWorld
from tests.host.shipped import ROUNDS, SHIPPED, digests_in, local_digests, made_up, real

pytestmark = pytest.mark.fedml


def _inside(root: Path, name: str, place: list[str], *more: str) -> list[str]:
    rounds = ["comm_round", str(ROUNDS)]
    return digests_in(run(Path("fedml") / name, [*place, *rounds, "outdir", str(root), "expname", "inside", *more]))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_has_one_digest(world: FedMLWorld, name: str) -> None:
    place = made_up(world.small)
    assert _inside(world.root, name, place) == local_digests(name, place, world.root)


def test_a_shipped_configuration_on_real_data(world: FedMLWorld, shared_data: Callable[[str], Path]) -> None:
    place = real(world.root, shared_data)
    single = ["training_type", "simulation", "backend", "sp"]
    expected = local_digests("mezo_alpaca", place, world.root)
    assert _inside(world.root, "mezo_alpaca", place, *single) == expected
