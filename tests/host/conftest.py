"""A fresh small world for every test, and no pictures: they cost more than a small run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fs_fwdllm.report import RunFolder
from tests.host.fixtures import models, world

__all__ = ["models", "pictures", "world"]


@pytest.fixture
def pictures() -> None:
    """A test that asks for this gets real pictures."""


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("fs_fwdllm.report.reporter.plot_run", lambda path: RunFolder(Path(path)).report_path)
