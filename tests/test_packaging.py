"""What is published: the wheel works alone and from any folder, the source distribution has all that a checkout has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Mapping, Sequence
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "fs_fwdllm" / "configs"
NAMES = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))

#: Prints where every name given leads, and where the package is.
_FIND = """
import json, sys, fs_fwdllm
from fs_fwdllm.config.load import find_config
print(json.dumps([fs_fwdllm.__file__, {name: str(find_config(name)) for name in sys.argv[1:]}]))
"""


def tracked_files() -> list[str]:
    """The checkout's files, those included that are not committed yet; skips where there is no checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout of the project")
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_symlink() or (ROOT / name).exists()]


def run(command: Sequence[object], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """The standard output of a command that must succeed."""
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution. They are made elsewhere, since building leaves traces."""
    folder = tmp_path_factory.mktemp("built")
    for name in tracked_files():
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy, follow_symlinks=False)
    build = "from setuptools import build_meta as backend; import sys; getattr(backend, sys.argv[1])(sys.argv[2])"
    for what in ("build_wheel", "build_sdist"):
        run([sys.executable, "-c", build, what, folder], folder / "source")
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment that has the wheel, and borrows what the wheel needs from this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    programs = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", programs / "python"]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], folder)
    # Lines of a .pth file come after the environment's own packages, and the .pth files of an editable installation
    # that lie in those folders are not read.
    (own,) = folder.glob("lib/python*/site-packages")
    borrowed = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (own / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    return programs


@pytest.fixture
def alone() -> dict[str, str]:
    """Environment variables that lead to no other copy of the package."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


@pytest.mark.slow
def test_an_installed_wheel_runs_the_demonstration_from_an_empty_folder(
    installed: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    rounds = ["federate.total_round_num", 2, "eval.freq", 2, "fwdllm.checkpoint_every", 1]
    small = ["federate.sample_client_num", 2, "fwdllm.probes", 4, "fwdllm.probes_per_batch", 4, "data.subsample", 0.2]
    run([installed / "fs-fwdllm", "run", "--cfg", "demo", *rounds, *small], tmp_path, alone)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    folder = tmp_path / "runs" / "demo"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["round"] for line in lines if not line.get("final")][-2:] == [1, 2] and lines[-1]["final"]
    assert {"config.yaml", "bytes.csv", "console.log", "report.png", "checkpoint", "model"} <= {
        path.name for path in folder.iterdir()
    }


@pytest.mark.slow
def test_an_installed_wheel_finds_every_configuration_by_name(
    installed: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    package, found = json.loads(run([installed / "python", "-c", _FIND, *NAMES], tmp_path, alone))
    place = Path(package).parent
    assert place.is_relative_to(installed.parent)
    for name in NAMES:
        assert found[name] == str(place / "configs" / f"{name}.yaml")
        assert Path(found[name]).read_bytes() == (CONFIGS / f"{name}.yaml").read_bytes()


@pytest.mark.slow
def test_an_installed_wheel_hooks_a_federatedscope_checkout(
    installed: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    place = tmp_path / "federatedscope" / "contrib" / "configs"
    place.mkdir(parents=True)
    (tmp_path / "federatedscope" / "register.py").touch()
    run([installed / "fs-fwdllm", "hook", "install", tmp_path], tmp_path, alone)
    (hook,) = place.iterdir()
    assert hook.read_bytes() == (ROOT / "registry.py").read_bytes()


@pytest.mark.slow
def test_the_wheel_has_the_package_only_and_says_where_the_project_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = Parser().parsestr(archive.read(metadata).decode())
    ours = {name for name in names if ".dist-info/" not in name}
    assert ours == {name for name in tracked_files() if name.startswith("fs_fwdllm/")}
    links = {entry.partition(", ")[0] for entry in described.get_all("Project-URL", [])}
    assert links == {"Homepage", "Source", "Issues", "Changelog"}


@pytest.mark.slow
def test_the_source_distribution_is_complete(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        files = {member.name.partition("/")[2]: member for member in archive.getmembers() if not member.isdir()}
    assert all(member.isfile() for member in files.values()), "links break where they are unpacked without the rest"
    missing = {name for name in tracked_files() if name not in files and name != "configs"}
    assert not missing, "MANIFEST.in does not name them"
    assert {f"configs/{name}.yaml" for name in NAMES} <= set(files)
    assert files["scripts/test"].mode & 0o100


def test_scripts_are_executable_and_what_they_source_is_not() -> None:
    for path in (ROOT / "scripts").rglob("*"):
        if path.is_file():
            assert os.access(path, os.X_OK) == (path.suffix != ".sh"), path


@pytest.mark.parametrize("processes", ["0", "2"])
@pytest.mark.slow
def test_the_last_line_says_which_cases_did_not_run(processes: str, tmp_path: Path) -> None:
    file = "tests/host/federatedscope/test_conformance.py"
    notice = tmp_path / "notice"
    given = {"FEDERATEDSCOPE_HOME": "/nowhere", "FS_FWDLLM_NOTICE_FILE": str(notice), "PYTHONPATH": str(ROOT)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    said = run([sys.executable, "-m", "pytest", "-n", processes, "-p", "no:cacheprovider", file], ROOT, kept | given)
    *_, closing, last = said.splitlines()
    assert "skipped" in closing
    number, _, rest = last.partition(" ")
    assert int(number) > 0 and rest.startswith("FEDERATEDSCOPE CASES DID NOT RUN")
    assert "SET FEDERATEDSCOPE_HOME TO A CLONE OF BRANCH llm" in rest
    assert notice.read_text(encoding="utf-8").strip() == last
