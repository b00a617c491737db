"""A run folder belongs to one process at a time, is left tidy by those that die, and says what a full disk has cost."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fs_fwdllm.config import dump_config
from fs_fwdllm.errors import CheckpointError
from fs_fwdllm.report import RunFolder
from fs_fwdllm.report.files import disk_errors_named
from fs_fwdllm.running.local import resume, run
from tests.host.small import METHODS, World, read_jsonl

_WAITS_S = 240.0
#: Holds the folder it is given until somebody writes to it.
_HOLD = """
import sys
from pathlib import Path
from fs_fwdllm.report import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def folder(world: World) -> RunFolder:
    return RunFolder.create(world.config(METHODS["mezo"]))


@pytest.fixture
def holder(folder: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process that works in ``folder``."""
    command = [sys.executable, "-c", _HOLD, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_by_name(folder: RunFolder, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(CheckpointError, match=rf"{folder.path}: another process is working in this run folder"):
        resume(folder.path)
    holder.communicate("end\n")
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        resume(folder.path)


def test_a_process_that_is_killed_gives_the_folder_back(folder: RunFolder, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with folder.locked():
        pass


def test_one_process_may_take_it_again(folder: RunFolder) -> None:
    with folder.locked(), RunFolder(folder.path).locked():
        assert (folder.path / ".lock").is_file()
    assert [item.name for item in folder.path.iterdir()] == ["config.yaml"], "no lock is left behind"


def test_what_a_killed_process_left_half_written_is_removed(folder: RunFolder) -> None:
    folder.checkpoint_path.mkdir()
    for name in (".config.yaml.x8s7", ".metrics.jsonl.abc", "checkpoint/.state.safetensors.4711"):
        (folder.path / name).write_text("half")
    for name in (".adapter-k2", ".model-last-z_9", ".adapter-k3-old"):
        (folder.path / name).mkdir()
        (folder.path / name / "adapter_model.safetensors").write_text(name)
    mine = (".DS_Store", ".notes.md", ".adapter", ".gitignore")
    for name in mine:
        (folder.path / name).write_text("mine")
    with folder.locked():
        names = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*")} - {".lock"}
    restored = {"adapter", "adapter/adapter_model.safetensors"}  # it was moved aside, and nothing took its place
    assert names == {"config.yaml", "checkpoint", *mine, *restored}
    assert (folder.adapter_path / "adapter_model.safetensors").read_text() == ".adapter-k3-old"


@pytest.mark.slow
def test_of_two_resumes_side_by_side_one_ends_and_one_is_refused(world: World) -> None:
    config = world.config({**METHODS["fedavg"], "federate.total_round_num": 4})
    path = run(config)
    digest = read_jsonl(path / "metrics.jsonl")[-1]["digest"]
    command = [sys.executable, "-m", "fs_fwdllm", "resume", str(path), "--rounds", "400"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        until = time.monotonic() + _WAITS_S
        while len(read_jsonl(path / "metrics.jsonl")) < 7 and time.monotonic() < until:
            time.sleep(0.05)
        second = subprocess.run(command, capture_output=True, text=True, timeout=_WAITS_S, check=False)
        assert second.returncode == 2 and "another process is working in this run folder" in " ".join(
            second.stderr.split()
        )
        first.kill()
    lines = read_jsonl(path / "metrics.jsonl")
    assert lines[4]["digest"] == digest and lines[-1]["round"] >= 6
    done = lines[-1]["round"]
    resume(path, rounds=done + 2)
    assert [line["round"] for line in read_jsonl(path / "metrics.jsonl")] == [*range(done + 3), done + 2]


#: Runs a configuration in a process that may write no file longer than so many bytes.
_LIMITED = """
import resource, sys
from pathlib import Path
from fs_fwdllm.config import load_config
from fs_fwdllm.errors import FwdLLMError
from fs_fwdllm.running import session
from fs_fwdllm.running.local import run
import fs_fwdllm.report.reporter as reporter
reporter.plot_run = lambda path: path
save = session.Session.save
def limited(self, *arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    return save(self, *arguments)
session.Session.save = limited
try:
    run(load_config(sys.argv[1]))
except FwdLLMError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    raise SystemExit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [300, 2000], ids=["the small files", "the tensors"])
def test_a_disk_that_fills_up_while_an_adapter_is_saved(world: World, limit: int) -> None:
    """What the system refuses reaches us from Python, safetensors or tokenizers, in a type of its own each."""
    config = world.config({**METHODS["fedavg"], "federate.total_round_num": 2})
    cfg = world.root / "run.yaml"
    cfg.write_text(dump_config(config))
    command = [sys.executable, "-c", _LIMITED, str(cfg), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_WAITS_S, check=False)
    path = Path(config.outdir) / "small"
    assert done.returncode == 2, done.stderr
    assert f"CheckpointError: {path / 'adapter-last'}: cannot be written (File too large)" in done.stderr
    assert f"the checkpoint is intact: make room or permission, then: fs-fwdllm resume {path}" in done.stderr
    assert "Traceback" not in done.stderr
    assert [item.name for item in path.glob(".*")] == [] and not (path / "adapter").exists()
    resume(path)
    assert (path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="this system limits no file's size")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, os.strerror(28)), "No space left on device"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (Exception("File too large (os error 27)"), "File too large"),
    ],
)
def test_what_a_system_refuses_is_one_error_in_whatever_type_it_comes(error: Exception, reason: str) -> None:
    said = rf"^here: cannot be written \({reason}\); there is room elsewhere$"
    with pytest.raises(CheckpointError, match=said), disk_errors_named(Path("here"), "there is room elsewhere"):
        raise error


def test_an_error_that_is_no_disks_passes() -> None:
    with pytest.raises(ValueError, match="a defect"), disk_errors_named(Path("here")):
        raise ValueError("a defect")
