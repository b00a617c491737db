"""``doctor --slopes`` tells slopes from noise, and says what to do."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from fs_fwdllm.cli.main import app
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.profiler.slopes import check_slopes
from tests.host.federatedscope.federation import write_config
from tests.host.small import METHODS, World


def checks(world: World, language_model: bool = False, **settings: Any) -> list[Any]:
    config = world.config({**METHODS["forward_gradient"], **settings}, language_model=language_model)
    return check_slopes(config, probes=12)


@pytest.mark.parametrize("estimator", ["central", "one_sided", "forward_mode", "projected"])
@pytest.mark.parametrize("base", [{}, {"quantise": "int4", "group": 16}])
def test_slopes_in_float32_are_kept(world: World, estimator: str, base: dict[str, Any]) -> None:
    (found,) = checks(world, **{"fwdllm.estimator": estimator, "fwdllm.base": base})
    assert found.is_enough and found.correlation > 0.999 and found.relative_error < 0.05
    assert not found.other_radii


def test_differences_in_bfloat16_are_noise_and_forward_mode_is_not(world: World) -> None:
    half = {"fwdllm.base": {"compute_dtype": "bfloat16"}, "fwdllm.radius": 1e-4, "fwdllm.radius_scale": "relative"}
    (noise,) = checks(world, True, **half, **{"fwdllm.estimator": "central"})
    assert not noise.is_enough and noise.relative_error > 0.2
    assert [round(radius / 1e-4, 3) for radius, _ in noise.other_radii] == [0.1, 10, 100]
    (exact,) = checks(world, True, **half, **{"fwdllm.estimator": "forward_mode"})
    assert exact.is_enough


def test_a_radius_that_is_too_small_names_a_better_one(world: World, tmp_path: Any) -> None:
    settings = {**METHODS["forward_gradient"], "fwdllm.estimator": "central", "fwdllm.radius": 1e-8}
    (found,) = check_slopes(world.config(settings), probes=12)
    assert not found.is_enough
    assert max(correlation for _, correlation in found.other_radii) > found.correlation


def test_every_part_and_every_group_of_a_fleet_is_measured(world: World) -> None:
    parts = [{"match": "classifier", "slopes": "closed_form"}, {"match": "*", "slopes": "one_sided"}]
    fleet = [{"clients": 1, "slopes": "projected"}]
    found = checks(world, **{"fwdllm.parts": parts, "fwdllm.fleet": fleet})
    assert {(check.slopes, check.match) for check in found} == {
        ("closed_form", "classifier"), ("one_sided", "*"), ("projected", "classifier"), ("projected", "*"),
    }  # fmt: skip
    assert all(check.is_enough for check in found)


def test_a_method_without_slopes_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="nothing is to check"):
        check_slopes(world.config(METHODS["fedavg"]))


def test_the_command(world: World) -> None:
    cfg = str(write_config(world, {**METHODS["forward_gradient"], "data.root": str(world.root)}, language_model=False))

    def call(*words: str) -> Any:
        return CliRunner().invoke(app, ["doctor", *words], env={"COLUMNS": "200", "NO_COLOR": "1"})

    kept = call("--slopes", "--cfg", cfg, "--probes", "8")
    assert kept.exit_code == 0 and "keep" in kept.output, kept.output
    noise = call("--slopes", cfg, "fwdllm.radius", "1e-8", "fwdllm.estimator", "central", "--probes", "8")
    assert noise.exit_code == 1 and "change" in noise.output and "fwdllm.radius" in noise.output, noise.output
    stray = call("--cfg", cfg)
    assert stray.exit_code == 2 and "--slopes only" in stray.output
