"""Fixtures for every folder of tests that runs small federations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.host.small import World

__all__ = ["models", "world"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny models are kept for the session."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def world(tmp_path: Path, models: Path) -> World:
    return World(tmp_path, models)
