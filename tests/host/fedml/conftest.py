"""FedML's own home is a temporary folder, and its tests run where FedML is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.host.fedml.federation import FedMLWorld
from tests.host.fixtures import models
from tests.host.small import World

__all__ = ["models"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("fedml") is None:
        for item in items:
            if item.get_closest_marker("fedml"):
                item.add_marker(pytest.mark.skip(reason="FedML is not installed here; scripts/test has .venv-fedml"))


@pytest.fixture
def world(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> FedMLWorld:
    """A small world whose current folder and home are empty folders of the test's own."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    monkeypatch.chdir(tmp_path / "here")
    return FedMLWorld(World(tmp_path, models))
