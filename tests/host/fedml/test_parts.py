"""The small parts of the FedML host, none of which needs FedML: payloads, placement, watchdog, installation."""

from __future__ import annotations

import copy
import math
import pickle
import re
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.errors import DataError, WireError
from fs_fwdllm.host.fedml.cluster import explain_failure
from fs_fwdllm.host.fedml.dataset import SiloData, make_dataset
from fs_fwdllm.host.fedml.installation import HOW_TO_INSTALL, REPLACEMENTS, why_it_cannot_be_installed
from fs_fwdllm.host.fedml.payload import Orders, pack_answers, pack_orders, unpack_answers, unpack_orders
from fs_fwdllm.host.fedml.watchdog import Watchdog
from fs_fwdllm.host.placement import Placement
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running.session import Session
from tests.host.fedml.federation import FedMLWorld

FRAMES = st.dictionaries(st.integers(1, 1000), st.binary(max_size=40), max_size=5)


@given(FRAMES, st.binary(max_size=9), st.booleans(), st.text(max_size=9))
def test_payloads_survive_what_fedml_does_to_them(
    frames: dict[int, bytes], state: bytes, is_last: bool, refusal: str
) -> None:
    orders = Orders(frames, state, is_last, refusal)
    down, up = pack_orders(orders), pack_answers(frames)
    for change in (copy.deepcopy, lambda payload: pickle.loads(pickle.dumps(payload))):
        assert unpack_orders(change(down)) == orders
        assert unpack_answers(change(up)) == frames
    assert type(down) is OrderedDict and type(up) is dict  # the two types FedML lets through, each in its direction


@pytest.mark.parametrize(
    "payload",
    [
        b"random bytes", None, 3, {}, {"fs_fwdllm": None}, {"weight": 1.0}, {"fs_fwdllm": (), "more": 1},
        {"fs_fwdllm": ((1, "text"),)}, {"fs_fwdllm": ((True, b""),)}, {"fs_fwdllm": ((1, b"", b""),)},
        {"fs_fwdllm": [(1, b"")]}, {"fs_fwdllm": ((1, b""), 2)},
        {"fs_fwdllm": ((), b"", False)}, {"fs_fwdllm": ((), b"", False, None)}, {"fs_fwdllm": ((), b"", False, b"no")},
    ],
)  # fmt: skip
def test_what_is_not_ours_is_refused(payload: Any) -> None:
    with pytest.raises(WireError):
        unpack_answers(payload)
    with pytest.raises(WireError):
        unpack_orders(payload)


def test_the_dataset_counts_samples(world: FedMLWorld) -> None:
    session = Session.open(world.config("mezo"))
    dataset = make_dataset(session, Placement(2))
    assert len(dataset) == 8
    train, test, _, batches, local_counts, local_train, local_test, classes = dataset
    assert train == sum(session.client_samples.values()) == sum(local_counts.values())
    assert test == len(session.data.test) == sum(map(len, batches))
    assert list(local_counts) == list(local_train) == list(local_test) == [0, 1]
    assert {silo: len(data) for silo, data in local_train.items()} == local_counts
    assert local_train[1].of(2) is session.data.clients[2].train
    assert classes == 3


def test_a_silo_has_no_data_of_another() -> None:
    with pytest.raises(DataError, match=r"client 2 does not live in this silo, which holds \[1, 3\]"):
        SiloData({1: [], 3: []}).of(2)


def test_a_watchdog_calls_once_and_says_what_was_missing() -> None:
    called: list[str] = []
    rang = threading.Event()

    def note(text: str) -> None:
        called.append(text)
        rang.set()

    watchdog = Watchdog(note)
    watchdog.arm(60, lambda: "the first")
    watchdog.arm(0.05, lambda: "the second")
    assert rang.wait(10)
    time.sleep(0.05)
    assert called == ["the second"]


def test_a_disarmed_watchdog_is_silent() -> None:
    called: list[str] = []
    watchdog = Watchdog(called.append)
    for _ in range(50):
        watchdog.arm(0.2, lambda: "too late")
        watchdog.disarm()
    watchdog.arm(math.inf, lambda: "never")
    watchdog.wind_down()
    time.sleep(0.3)
    assert called == []


@pytest.mark.parametrize(("version", "installs"), [((3, 10), True), ((3, 11), True), ((3, 12), False)])
def test_newer_pythons_are_told_why(version: tuple[int, int], installs: bool) -> None:
    reason = why_it_cannot_be_installed(version)
    assert (reason == "") == installs
    if not installs:
        assert f"{version[0]}.{version[1]}" in reason and "pathtools" in reason and "3.11" in reason


@pytest.mark.parametrize(
    ("failed", "said_first"),
    [
        ({"client process (rank 1)": 2, "server (rank 0)": -9}, "server (rank 0): was killed by SIGKILL"),
        ({"server (rank 0)": 2, "client process (rank 1)": 2}, "client process (rank 1): no answer"),
        ({"mpiexec": -9}, "client process (rank 1): no answer"),
    ],
)
def test_the_cause_is_shown_and_not_what_it_caused(tmp_path: Path, failed: dict[str, int], said_first: str) -> None:
    """A client may leave its error before anybody has noticed that the server was killed."""
    folder = RunFolder(tmp_path)
    (tmp_path / "processes").mkdir()
    assert explain_failure(folder, {"mpiexec": 1}, ["no such host"]).startswith(
        "mpiexec: ended with exit code 1\nno such"
    )
    (tmp_path / "processes" / "rank-1.error").write_text("client process (rank 1): no answer\n")
    assert "resume" not in explain_failure(folder, failed), "there is nothing to go on with"
    folder.checkpoint_path.mkdir()
    said = explain_failure(folder, failed)
    assert said.startswith(f"{said_first};") and f"fs-fwdllm resume {tmp_path}" in said


_ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("file", ["README.md", "setup.cfg", "scripts/environment.sh", "constraints-fedml.txt"])
def test_every_place_that_says_how_to_install_fedml_says_the_same(file: str) -> None:
    text = (_ROOT / file).read_text(encoding="utf-8")
    assert " ".join(REPLACEMENTS) in text
    names = "|".join(pinned.split("==")[0] for pinned in REPLACEMENTS)
    pins = set(re.findall(rf"(?<!^)\b(?:{names})==[\d.]+\d", text, re.MULTILINE))  # not the constraints, to be replaced
    assert pins == set(REPLACEMENTS)


def test_the_advice_installs_what_the_readme_and_the_tests_do() -> None:
    (extras,) = set(re.findall(r"-c constraints-fedml\.txt -e '\.\[([\w,]+)\]'", (_ROOT / "README.md").read_text()))
    assert f"-c constraints-fedml.txt -e '.[{extras}]'" in HOW_TO_INSTALL
    assert f"pip install --no-deps {' '.join(REPLACEMENTS)}" in HOW_TO_INSTALL
    assert f"ensure_environment {extras},dev" in (_ROOT / "scripts" / "test").read_text()
