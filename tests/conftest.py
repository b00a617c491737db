"""Fixtures every test may use. Real data is optional: a test that asks for an absent file skips and names it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.host.federatedscope.checkouts import MissingCheckouts

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Shared machines are noisy: a slow example is not a failing one. Examples are derived from the code, not from chance.
settings.register_profile("fs_fwdllm", deadline=None, derandomize=True)
settings.load_profile("fs_fwdllm")

# Workers of pytest-xdist share the cores; a thread pool in each would only make them wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


#: Who asks for one of these needs real data, or starts processes of a framework.
_SLOW_FIXTURES = {"shared_data", "host_home", "peer_home"}


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(MissingCheckouts())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What cannot be fast is marked slow; single tests that took long when they were measured say so themselves.

    Files of slow tests alone come first, then those with the most of them: a long test that began last would leave the
    other process without work.
    """
    slow: dict[Path, list[bool]] = {}
    for item in items:
        if _SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())) or item.get_closest_marker("fedml"):
            item.add_marker("slow")
        slow.setdefault(item.path, []).append(item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: (not all(slow[item.path]), -sum(slow[item.path]), str(item.path)))


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """``shared_data("ag_news/train_10k.jsonl")`` is that file's path, or skips the test when it is absent.

    The folder is ``$FS_FWDLLM_DATA``, else ``shared/data`` beside the checkout.
    """
    root = Path(os.environ.get("FS_FWDLLM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

    def find(name: str) -> Path:
        path = root / name
        if not path.exists():
            pytest.skip(f"real data file {name} is absent; set FS_FWDLLM_DATA to the folder that has it")
        return path

    return find
