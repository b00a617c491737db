"""The table of hosts: light to ask, open to other packages, and asked by nobody below."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fs_fwdllm.host.hosts import HOSTS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fs_fwdllm"

#: A host of a package of its own, as it may be installed beside ours.
_HOST = """
from pathlib import Path
from fs_fwdllm.host.hosts import Host
HOST = Host("elsewhere", __name__, marker="elsewhere.txt", framework=lambda: "its framework found")
def run_file(cfg, overrides):
    print("ran", cfg.name, overrides)
def resume(run):
    print("went on with", run.name)
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, text=True, capture_output=True, timeout=120
    )


def test_asking_every_host_for_its_facts_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from fs_fwdllm.host.hosts import HOSTS; [HOSTS[name] for name in HOSTS]; "
        "import fs_fwdllm.host.supervise, fs_fwdllm.host.placement; "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'fedml', 'federatedscope', 'mpi4py') if m in sys.modules])"
    )
    done = python(tmp_path, "-c", code)
    assert done.stdout == "[]\n", done.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder of installed packages with one that announces a host."""
    (tmp_path / "elsewhere.py").write_text(_HOST)
    about = tmp_path / "elsewhere-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[fs_fwdllm.hosts]\nelsewhere = elsewhere:HOST\n")
    return tmp_path


def test_a_host_of_an_installed_package_is_one_of_ours(installed: Path) -> None:
    (installed / "run").mkdir()
    (installed / "run" / "elsewhere.txt").touch()
    said = {
        ("run", "--help"): "elsewhere",
        ("run", "--host", "elsewhere", "--cfg", "c.yaml", "seed", "3"): "ran c.yaml ['seed', '3']",
        ("resume", "run"): "went on with run",
        ("doctor",): "ready; its framework found",
    }
    for arguments, text in said.items():
        done = python(installed, "-m", "fs_fwdllm", *arguments)
        assert done.returncode == 0 and text in done.stdout, done.stderr


def test_a_host_that_cannot_be_imported_is_named_and_stands_in_no_other_hosts_way(installed: Path) -> None:
    (installed / "elsewhere.py").write_text("import no_such_framework\n")
    done = python(installed, "-m", "fs_fwdllm", "doctor")
    assert "no_such_framework" in done.stdout.replace("\n", "") and "host local" in done.stdout
    done = python(installed, "-m", "fs_fwdllm", "run", "--host", "elsewhere", "--cfg", "c.yaml")
    assert done.returncode == 2 and "elsewhere announces it as 'elsewhere:HOST'" in done.stderr
    done = python(installed, "-m", "fs_fwdllm", "run", "--cfg", "absent.yaml")
    assert "absent.yaml" in done.stderr and "elsewhere" not in done.stderr


def test_nothing_below_knows_a_host() -> None:
    """Also not inside functions."""
    above = {PACKAGE / "host", PACKAGE / "cli"}
    for path in PACKAGE.rglob("*.py"):
        if not above & {*path.parents}:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
            assert not [module for module in modules if module.startswith("fs_fwdllm.host")], path


def test_every_host_of_ours_says_its_own_name() -> None:
    assert {HOSTS[name].name for name in ("local", "federatedscope", "fedml")} == {"local", "federatedscope", "fedml"}
    assert all(HOSTS[name].name == name for name in HOSTS)
