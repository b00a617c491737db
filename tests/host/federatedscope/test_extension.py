"""A method of another package inside the host: by our workers, never by the host's default one with a warning."""

from __future__ import annotations

from pathlib import Path

from tests.host.federatedscope.federation import outcome_of
from tests.host.fixtures import models, world
from tests.host.small import World
from tests.test_plugin import command, configuration, environment

__all__ = ["environment", "models", "world"]


def test_a_plugin_ends_with_the_same_bits_as_on_local(
    world: World, environment: dict[str, str], host_home: Path
) -> None:
    environment = {**environment, "FEDERATEDSCOPE_HOME": str(host_home)}
    changes = {"fwdllm.ext": {"fzoo": {"floor": 1e-6}}, "data.root": str(world.root), "use_gpu": False}
    cfg = configuration(world, **changes)
    local = command(environment, "run", "--cfg", cfg)
    assert local.returncode == 0, local.stderr
    inside = command(
        environment, "run", "--host", "federatedscope", "--cfg", cfg, "outdir", world.root / "inside", "expname", "run"
    )
    assert inside.returncode == 0, inside.stdout + inside.stderr
    expected = outcome_of(world.root / "runs" / "small")
    assert outcome_of(world.root / "inside" / "run" / "fwdllm") == expected
    assert len(set(expected.digests)) == len(expected.digests) - 1, "every round moves the parameters"
