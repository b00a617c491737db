"""Where the FederatedScope checkout is, and processes of it. Without a checkout every test of this folder skips."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.federatedscope.checkouts import find_checkout
from tests.host.federatedscope.participants import Starter


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder carries the marker ``federatedscope``."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker("federatedscope")


def _checkout(variable: str) -> Path:
    home = find_checkout(variable)
    for module in ("grpc", "pandas", "scipy", "pympler"):
        pytest.importorskip(module, reason=f"FederatedScope needs {module}: pip install 'fs-fwdllm[federatedscope]'")
    return home


@pytest.fixture(scope="session")
def host_home() -> Path:
    """An unmodified checkout of branch ``llm``; tests must not write into it."""
    return _checkout("FEDERATEDSCOPE_HOME")


@pytest.fixture(scope="session")
def peer_home() -> Path:
    """A checkout of branch ``FedMeZO``, whose published files are run as they are."""
    return _checkout("FEDMEZO_HOME")


@pytest.fixture(scope="session")
def hooked_tree(host_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in which our hook is installed."""
    from fs_fwdllm.host.federatedscope.hook import install

    tree = tmp_path_factory.mktemp("hooked") / "FederatedScope"
    shutil.copytree(host_home / "federatedscope", tree / "federatedscope", ignore=shutil.ignore_patterns("__pycache__"))
    install(tree)
    return tree


@pytest.fixture(scope="session")
def _launcher(host_home: Path) -> Iterator[Starter]:
    starter = Starter("launcher", host_home)
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def _hooked(hooked_tree: Path) -> Iterator[Starter]:
    starter = Starter("hooked", hooked_tree)
    yield starter
    starter.close()


@pytest.fixture
def launcher(_launcher: Starter) -> Iterator[Starter]:
    """Processes as ``python -m fs_fwdllm.host.federatedscope`` starts them; what still runs ends with the test."""
    yield _launcher
    _launcher.kill_all()


@pytest.fixture
def hooked(_hooked: Starter) -> Iterator[Starter]:
    """Processes as ``python federatedscope/main.py`` starts them in :func:`hooked_tree`."""
    yield _hooked
    _hooked.kill_all()
