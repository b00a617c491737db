"""Every packaged configuration says at its top whether its rate is known to learn, and the demo does learn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fs_fwdllm import load_config, run
from fs_fwdllm.config.load import CONFIGS
from fs_fwdllm.report.record import RunRecord

FILES = sorted(CONFIGS.rglob("*.yaml"))
#: Learns, with a figure; does not; is not known to; whose rate it is; or that it is too short to learn.
_SAYS = re.compile(
    r"Learns at this rate: .*\d|Does not learn: |Not known to learn: |The rate (is|of) |rounds show that"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_the_first_comment_says_whether_it_learns(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and _SAYS.search(first), first


@pytest.mark.slow
def test_the_demo_learns_in_a_few_passes(tmp_path: Path) -> None:
    """A seventh of its rounds, at the rate that the run finds."""
    shortened = ["federate.total_round_num", "15", "eval.freq", "-1", "outdir", str(tmp_path), "threads", "1"]
    run(load_config("demo", shortened))
    summary = RunRecord.load(tmp_path / "demo").summary()
    assert summary.final is not None and summary.majority is not None
    assert summary.final > summary.majority + 0.2
    assert not summary.backward_passes
    assert summary.forward_passes is not None
    assert 15 * 10 < summary.forward_passes < 15 * 10 * 51, "most clients take one pass, some take 51"


@pytest.mark.slow
def test_mezo_learns_from_installed_packages_alone(tmp_path: Path) -> None:
    """A third of the demo's rounds: enough to see, in seconds."""
    shortened = ["federate.total_round_num", "20", "eval.freq", "-1", "outdir", str(tmp_path), "threads", "1"]
    run(load_config("mezo_demo", shortened))
    summary = RunRecord.load(tmp_path / "mezo_demo").summary()
    assert summary.final is not None and summary.majority is not None
    assert summary.final > summary.majority + 0.1
    assert not summary.backward_passes
