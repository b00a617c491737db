"""Our one file in a checkout: placed, taken out, refused."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fs_fwdllm.cli.doctor import examine
from fs_fwdllm.cli.main import app
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.host.federatedscope.hook import HOOK_FILE, install, remove
from tests.host.federatedscope.federation import outcome_of, presplit, write_config
from tests.host.fixtures import models, world
from tests.host.small import World

__all__ = ["models", "world"]

_ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the hook looks for in a checkout, and nothing else."""
    folder = tmp_path / "checkout" / "federatedscope" / "contrib" / "configs"
    folder.mkdir(parents=True)
    (folder.parents[1] / "register.py").touch()
    return tmp_path / "checkout"


def test_the_file_is_placed_once_and_taken_out(checkout: Path) -> None:
    path = install(checkout)
    assert path == checkout / "federatedscope" / "contrib" / "configs" / HOOK_FILE
    assert path.read_bytes() == (_ROOT / "registry.py").read_bytes(), "the checkout's root has the same file"
    written = path.stat().st_mtime_ns
    assert install(checkout) == path and path.stat().st_mtime_ns == written
    path.write_text("# fs_fwdllm, an older version\n")
    assert install(checkout).read_bytes() == (_ROOT / "registry.py").read_bytes()
    assert remove(checkout) == path and not path.exists()
    assert remove(checkout) is None


def test_what_is_no_checkout_or_not_ours_is_left_alone(checkout: Path, tmp_path: Path) -> None:
    for call in (install, remove):
        with pytest.raises(ConfigError, match="is no FederatedScope checkout"):
            call(tmp_path)
    foreign = install(checkout)
    foreign.write_text("print('mine')\n")
    for call in (install, remove):
        with pytest.raises(ConfigError, match="is not ours"):
            call(checkout)
    assert foreign.read_text() == "print('mine')\n"


def test_the_commands_do_the_same(checkout: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["hook", "install", str(checkout)]).exit_code == 0
    assert (checkout / "federatedscope" / "contrib" / "configs" / HOOK_FILE).is_file()
    assert "removed" in runner.invoke(app, ["hook", "remove", str(checkout)]).output
    assert "nothing of ours" in runner.invoke(app, ["hook", "remove", str(checkout)]).output
    assert runner.invoke(app, ["hook", "install", str(checkout / "nowhere")]).exit_code == 2


def test_without_the_package_the_file_only_says_so(checkout: Path) -> None:
    command = [sys.executable, "-c", f"import runpy, sys; sys.path = [p for p in sys.path if {str(_ROOT)!r} not in p]; "
               f"sys.modules['fs_fwdllm'] = None; runpy.run_path({str(install(checkout))!r})"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=checkout)
    assert "its trainers and methods are not registered" in done.stderr


def test_the_documented_commands_run(world: World, hooked_tree: Path, host_home: Path, tmp_path: Path) -> None:
    """Real processes, as a user starts them, beside the forked ones of the other tests: all three give one digest."""
    settings = {"federate.method": "fedmezo", "data.type": presplit(world), "federate.total_round_num": 2}
    cfg = write_config(world, settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDERATEDSCOPE_HOME": str(host_home)}
    ours, theirs = str(_ROOT), os.pathsep.join([str(hooked_tree), str(_ROOT)])
    ways = {
        "module": (["-m", "fs_fwdllm.host.federatedscope", "--cfg", str(cfg)], ours, tmp_path),
        "main": (["federatedscope/main.py", "--cfg", str(cfg)], theirs, hooked_tree),
        "command": (["-m", "fs_fwdllm", "run", "--host", "federatedscope", "--cfg", str(cfg)], ours, tmp_path),
    }
    outcomes = []
    for name, (command, path, folder) in ways.items():
        out = ["outdir", str(tmp_path / name), "expname", "run"]
        done = subprocess.run(
            [sys.executable, *command, *out], env={**environment, "PYTHONPATH": path}, cwd=folder,
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        outcomes.append(outcome_of(tmp_path / name / "run" / "fwdllm"))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_the_doctor_says_where_the_host_is(host_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if importlib.util.find_spec("federatedscope") is not None:
        pytest.skip("FederatedScope is installed here, so nothing is looked for")

    def found() -> tuple[str, str]:
        (finding,) = (finding for finding in examine() if finding.name == "host federatedscope")
        return finding.found, finding.hint

    monkeypatch.setenv("FEDERATEDSCOPE_HOME", str(host_home))
    assert found()[0] == f"ready; checkout in {host_home}"
    monkeypatch.setenv("FEDERATEDSCOPE_HOME", str(tmp_path))
    assert found()[0] == "not usable here" and "FEDERATEDSCOPE_HOME" in found()[1]
