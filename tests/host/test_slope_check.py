"""Before a run's first round two probes are looked at, where that costs next to nothing; noise is told."""

from __future__ import annotations

from typing import Any

import pytest

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method import check_combination
from fs_fwdllm.running import slope_check
from fs_fwdllm.running.local import run
from fs_fwdllm.running.session import Session
from fs_fwdllm.running.slope_check import remark_on_slopes
from tests.host.small import World

LONG = {"federate.total_round_num": 400, "fwdllm.probes": 8, "federate.method": "fedfwd"}


def remark(world: World, own: dict[str, Any], *, language_model: bool = True) -> str | None:
    session = Session.open(world.config({**LONG, **own}, language_model=language_model))
    before = session.parts.trainables.digest()
    found = remark_on_slopes(session)
    assert session.parts.trainables.digest() == before
    return found


@pytest.mark.parametrize("language_model", [False, True])
@pytest.mark.parametrize(
    "own",
    [
        {},
        {"fwdllm.attention": "eager"},
        {"fwdllm.probes_per_batch": 4},
        {"fwdllm.estimator": "one_sided", "fwdllm.radius": 1e-3},
        {"federate.method": "fedmezo"},
        {"fwdllm.parts": [{"match": "*lora_A*", "slopes": "frozen"}, {"match": "*", "slopes": "central", "probes": 4}]},
        {"fwdllm.fleet": [{"clients": [2], "slopes": "projected", "scalars": 4}]},
    ],
    ids=["plain", "eager", "batched", "one-sided", "mezo", "parts", "fleet"],
)
def test_slopes_that_are_slopes_are_not_remarked_on(world: World, own: dict[str, Any], language_model: bool) -> None:
    assert remark(world, own, language_model=language_model) is None


@pytest.mark.parametrize(
    "own",
    [
        {"fwdllm.radius": 1e-9},
        {"fwdllm.radius": 1e-9, "fwdllm.probes_per_batch": 4},
        {"fwdllm.radius": 1e-8, "fwdllm.estimator": "one_sided"},
        {"fwdllm.radius": 1e-9, "fwdllm.parts": [
            {"match": "*lora_A*", "slopes": "forward_mode", "probes": 4},
            {"match": "*", "slopes": "central", "probes": 4}]},
        {"fwdllm.radius": 1e-9, "fwdllm.fleet": [{"clients": [1], "slopes": "projected", "scalars": 4}]},
        {"train.is_enable_half": True, "fwdllm.radius": 1e-5},
    ],
    ids=["central", "batched", "one-sided", "a part", "a fleet", "float16"],
)  # fmt: skip
def test_noise_is_told_with_its_size_and_the_way_to_find_out_more(world: World, own: dict[str, Any]) -> None:
    said = remark(world, own)
    assert said is not None and "off by" in said and "%" in said and "doctor --slopes" in said
    assert f"fwdllm.radius {own['fwdllm.radius']:g}" in said


@pytest.mark.parametrize(
    "own",
    [
        {"federate.total_round_num": 2, "fwdllm.radius": 1e-9},  # the look would be a large share of the run
        {"fwdllm.estimator": "forward_mode"},
        {"federate.method": "fedavg", "fwdllm.radius": 1e-9},
    ],
    ids=["short", "no radius", "backpropagation"],
)
def test_nothing_is_looked_at_where_there_is_nothing_to_see(
    world: World, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slope_check, "measured_slopes", None)
    assert remark(world, own) is None


def test_a_run_says_it_before_its_first_round(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**LONG, "federate.total_round_num": 40, "fwdllm.probes": 8, "fwdllm.radius": 1e-9}
    run(world.config(settings, language_model=True))
    out = " ".join(capsys.readouterr().out.split())
    assert out.index("clients would mostly send noise") < out.index("round 1/40")


def combination(world: World, **own: Any) -> None:
    keys = {"federate.method": "fedmezo", "fwdllm.base.compute_dtype": "bfloat16"}
    keys |= {name.replace("__", "."): value for name, value in own.items()}
    check_combination(world.config(keys, language_model=True))


@pytest.mark.parametrize(
    ("estimator", "radius", "way_out"),
    [
        ("central", 1e-3, r"fwdllm\.radius 0\.005 or more, or fwdllm\.base\.compute_dtype: float32"),
        ("one_sided", 1e-3, r"forward_mode, which has no radius, or fwdllm\.base"),
        ("one_sided", 1.0, r"forward_mode, which has no radius, or fwdllm\.base"),
    ],
)
def test_differences_that_bfloat16_rounds_away_are_refused(
    world: World, estimator: str, radius: float, way_out: str
) -> None:
    with pytest.raises(ConfigError, match=rf"compute_dtype 'bfloat16': slopes '{estimator}'.*{way_out}"):
        combination(world, fwdllm__estimator=estimator, fwdllm__radius=radius)
    with pytest.raises(ConfigError, match="compute_dtype 'bfloat16'"):
        parts = [{"match": "*", "slopes": estimator, "probes": 2}]
        combination(world, fwdllm__parts=parts, fwdllm__radius=radius)


def test_what_bfloat16_leaves_alone_is_not_refused(world: World) -> None:
    combination(world, fwdllm__estimator="central", fwdllm__radius=5e-3)
    combination(world, fwdllm__estimator="central", fwdllm__radius=1e-3, fwdllm__radius_scale="relative")
    combination(world, fwdllm__estimator="forward_mode", fwdllm__radius=1e-3)
    combination(world, federate__method="fedavg", fwdllm__radius=1e-3)
    head = [{"adapter_package": "fs_fwdllm", "adapter_method": "head"}]  # computes in float32, behind the base
    combination(world, fwdllm__estimator="one_sided", fwdllm__radius=1e-3, llm__adapter__args=head)
    combination(world, fwdllm__estimator="one_sided", fwdllm__radius=1e-3, llm__adapter__use=False)


def test_a_part_without_slopes_does_not_hide_the_noise_of_another(world: World) -> None:
    """LoRA's A has none while B is zero, and comes first."""
    parts = [{"match": "*lora_A*", "slopes": "central", "probes": 4}, {"match": "*", "slopes": "central", "probes": 4}]
    said = remark(world, {"fwdllm.radius": 1e-9, "fwdllm.parts": parts})
    assert said is not None and "off by" in said
    assert remark(world, {"fwdllm.parts": parts}) is None
