"""Bytes that nobody meant end in a typed error, or are what they say they are: the first of ``benchmarks/fuzz.py``.

An error of another type fails its test as it is; the number in the message is the seed with which to try it again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fuzzing.configurations import configuration, try_configuration
from benchmarks.fuzzing.files import try_checkpoint, try_h5
from benchmarks.fuzzing.frames import frame, records, try_frame
from fs_fwdllm.core.wire import encode

pytestmark = pytest.mark.slow

#: Longest that one input may take; by the process's own time, as other processes may be at work.
_LONGEST_S = 2.0


def outcomes(attempt: Callable[[int], str], count: int) -> Counter[str]:
    """How the first ``count`` inputs end."""
    found: Counter[str] = Counter()
    for seed in range(count):
        started = time.process_time()
        try:
            found[attempt(seed)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert time.process_time() - started < _LONGEST_S, f"seed {seed} takes too long"
    return found


def test_the_records_that_are_meddled_with_are_right_before() -> None:
    """Of every kind, so that a mutation may reach what stands behind the checks."""
    ends = {type(record).__name__: try_frame(encode(record)) for record in records()}
    followed = {"RoundUpdate", "DenseState"}  # they do not lead to the digest they name
    assert ends == {name: "DivergenceError" if name in followed else name for name in ends}
    assert len(ends) == 10


def test_frames() -> None:
    found = outcomes(lambda seed: try_frame(frame(seed)), 20_000)
    assert found["WireError"] > 10_000
    assert {"ScalarUpdate", "DenseUpdate", "DivergenceError", "BlockValues", "BlockAssignment"} <= set(found)


def test_configurations(tmp_path: Path) -> None:
    found = outcomes(lambda seed: try_configuration(tmp_path, configuration(seed)), 2000)
    assert set(found) == {"ConfigError", "accepted"} and found["accepted"] > 20


def test_checkpoints(tmp_path: Path) -> None:
    found = outcomes(lambda seed: try_checkpoint(tmp_path, seed), 500)
    assert found["CheckpointError"] > 200


def test_h5_files(tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="the extra 'data' is not installed")
    found = outcomes(lambda seed: try_h5(tmp_path, seed), 500)
    assert found["DataError"] > 100 and found["accepted"] > 20
