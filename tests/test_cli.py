"""The command: arguments reach the package unchanged, errors are one message and an exit code, ``--help`` is quick."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fs_fwdllm._version import __version__
from fs_fwdllm.cli import doctor
from fs_fwdllm.cli.main import app
from fs_fwdllm.config import Config, load_config, parse_config
from fs_fwdllm.errors import ConfigError, DataError, HostError
from fs_fwdllm.host.hosts import HOSTS, Host
from fs_fwdllm.report import RunFolder, RunReporter

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``stand_in(name, function=...)`` puts a module with these functions in the place of ``fs_fwdllm.<name>``."""
    assert [HOSTS[name] for name in HOSTS], "what hosts say is read before a module of theirs is replaced"

    def put(name: str, **functions: Any) -> None:
        module = ModuleType(f"fs_fwdllm.{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


@pytest.fixture
def cfg(tmp_path: Path) -> Path:
    path = tmp_path / "example.yaml"
    path.write_text("seed: 1\n", encoding="utf-8")
    return path


def reading(run: Callable[[Config], Any]) -> Callable[[Path, list[str]], Any]:
    """What a host offers the command: it reads the file itself."""
    return lambda cfg, overrides: run(load_config(cfg, overrides))


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_module_is_the_command() -> None:
    done = python("-m", "fs_fwdllm", "--version")
    assert (done.returncode, done.stdout) == (0, f"fs-fwdllm {__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plan", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy_and_takes_at_most_half_a_second(arguments: list[str]) -> None:
    """Seconds of the processor, and the least of three, so that a busy machine does not matter."""
    code = (
        f"import sys, time; from fs_fwdllm.cli.main import app; app({arguments}, standalone_mode=False); "
        "print([m for m in ('torch', 'numpy', 'matplotlib', 'transformers', 'peft') if m in sys.modules]); "
        "print(time.process_time())"
    )
    for _ in range(3):
        *lines, heavy, seconds = python("-c", code).stdout.splitlines()
        if float(seconds) <= 0.5:
            break
    assert heavy == "[]" and float(seconds) <= 0.5
    assert "Usage" in "".join(lines) and ("--cfg" in "".join(lines) or len(arguments) == 1)


def test_run_hands_over_the_configuration_with_overrides_anywhere(
    call: Callable[..., Result], stand_in: Callable[..., None], cfg: Path
) -> None:
    given: list[Config] = []
    stand_in("running.local", run_file=reading(given.append))
    overrides = ("federate.sample_client_num", "-1", "train.optimizer.lr", "1e-3", "data.splitter", "")
    call("run", "--cfg", cfg, *overrides)
    call("run", *overrides, "--cfg", cfg, "--host", "local")
    call("run", "--cfg", cfg, *overrides[:2], "--host", "local", *overrides[2:])
    assert len(given) == 3
    assert given[0] == given[1] == given[2]
    assert (given[0].seed, given[0].federate.sample_client_num, given[0].train.optimizer.lr) == (1, -1, 1e-3)
    assert given[0].expname == "example"


def test_fedmls_file_reaches_its_host_as_it_was_given(
    call: Callable[..., Result], stand_in: Callable[..., None], cfg: Path
) -> None:
    given: list[Any] = []
    stand_in("host.fedml", run_file=lambda *arguments: given.append(arguments))
    done = call("run", "--host", "fedml", "--cf", cfg, "comm_round", "3", "data.root", "x")
    assert done.exit_code == 0, done.stderr
    assert given == [(cfg, ["comm_round", "3", "data.root", "x"])]


def test_resuming_goes_to_the_host_that_made_the_run(
    call: Callable[..., Result], stand_in: Callable[..., None], tmp_path: Path
) -> None:
    given: list[str] = []
    for host in ("local", "fedml"):
        stand_in(
            "running.local" if host == "local" else f"host.{host}", resume=lambda run, host=host: given.append(host)
        )
    call("resume", tmp_path)
    (tmp_path / HOSTS["fedml"].marker).touch()
    call("resume", tmp_path)
    assert given == ["local", "fedml"]


def test_a_run_made_inside_federatedscope_is_continued_there(call: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / HOSTS["federatedscope"].marker).touch()
    done = call("resume", tmp_path)
    assert done.exit_code == 2
    assert f"run its file again with federate.restore_from {tmp_path}" in done.stderr


@pytest.fixture
def throw_away(stand_in: Callable[..., None]) -> Iterator[list[tuple[object, ...]]]:
    """A host of another package; what it was asked to do."""
    asked: list[tuple[object, ...]] = []
    stand_in(
        "throw_away",
        run_file=lambda *given: asked.append(("run", *given)),
        resume=lambda run: asked.append(("go", run)),
    )
    host = Host("mine", "fs_fwdllm.throw_away", marker="mine.txt", framework=lambda: "framework 7 found")
    HOSTS.register("mine", host)
    yield asked
    HOSTS.unregister("mine")


def test_a_host_of_another_package_runs_resumes_and_is_examined(
    call: Callable[..., Result], throw_away: list[tuple[object, ...]], cfg: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").touch()
    assert call("run", "--host", "mine", "--cfg", cfg, "seed", "7").exit_code == 0
    assert call("resume", tmp_path).exit_code == 0
    assert throw_away == [("run", cfg, ["seed", "7"]), ("go", tmp_path)]
    assert re.search(r"host mine\s+ready; framework 7 found", call("doctor").stdout)
    assert "mine" in call("run", "--host", "mein", "--cfg", cfg).stderr
    assert call("run", "--host", "mine", "--cf", cfg).exit_code == 2


def test_a_host_says_why_it_cannot_be_used_or_continued(call: Callable[..., Result], tmp_path: Path) -> None:
    def missing() -> str:
        raise HostError("pip install it")

    HOSTS.register("mine", Host("mine", "nowhere", marker="m", resume_advice="ask {run}", framework=missing))
    try:
        (tmp_path / "m").touch()
        assert f"{tmp_path}: ask {tmp_path}" in call("resume", tmp_path).stderr
        assert re.search(r"host mine\s+not usable here\s+pip install it", call("doctor").stdout)
    finally:
        HOSTS.unregister("mine")


def test_a_host_names_its_file_by_an_option_of_the_command() -> None:
    with pytest.raises(ConfigError, match=r"host mine: option '--toml'; allowed are --cfg, --cf"):
        Host("mine", "nowhere", option="--toml")


def test_a_negative_number_reaches_the_range_check(call: Callable[..., Result], cfg: Path) -> None:
    done = call("plan", "--cfg", cfg, "train.optimizer.lr", "-1e-3")
    assert done.exit_code == 2
    assert "train.optimizer.lr" in done.stderr and "-0.001" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--host", "locl"], ["--host 'locl'", "'federatedscope', 'fedml', 'local'", "did you mean 'local'?"]),
        (["seed"], ["'seed' stands alone"]),
        (["sed", "3"], ["sed: unknown key", "'seed'"]),
        (["--hots", "local"], ["--hots", "did you mean '--host'?"]),
        (["--cf", "fedml.yaml"], ["--cfg FILE: is what --host local reads", "--cf goes with --host fedml"]),
        (["--host", "fedml"], ["--cf FILE: is what --host fedml reads"]),
    ],
)
def test_mistakes_are_one_message_on_stderr(
    call: Callable[..., Result], stand_in: Callable[..., None], cfg: Path, arguments: list[str], fragments: list[str]
) -> None:
    stand_in("running.local", run_file=reading(lambda config: pytest.fail("must not run")))
    done = call("run", "--cfg", cfg, *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    for fragment in fragments:
        assert fragment in done.stderr


def test_missing_file_exits_with_2(call: Callable[..., Result], stand_in: Callable[..., None], tmp_path: Path) -> None:
    stand_in("running.local", run_file=reading(lambda config: None))
    done = call("run", "--cfg", tmp_path / "absent.yaml")
    assert done.exit_code == 2
    assert "absent.yaml" in done.stderr


def test_errors_of_a_run_keep_their_brackets_and_have_no_traceback(
    call: Callable[..., Result], stand_in: Callable[..., None], cfg: Path
) -> None:
    def fail(config: Config) -> None:
        raise DataError("rows [red]3[/red]: no label")

    stand_in("running.local", run_file=reading(fail))
    done = call("run", "--cfg", cfg)
    assert (done.exit_code, done.stderr) == (2, "error: rows [red]3[/red]: no label\n")


def test_a_defect_is_not_hidden(call: Callable[..., Result], stand_in: Callable[..., None], cfg: Path) -> None:
    def fail(config: Config) -> None:
        raise ZeroDivisionError

    stand_in("running.local", run_file=reading(fail))
    assert isinstance(call("run", "--cfg", cfg).exception, ZeroDivisionError)


@pytest.mark.parametrize("command", ["run", "resume"])
def test_interrupting_exits_130_and_says_how_to_go_on(
    call: Callable[..., Result], stand_in: Callable[..., None], cfg: Path, command: str
) -> None:
    def interrupt(argument: object) -> None:
        raise KeyboardInterrupt

    stand_in("running.local", run_file=lambda cfg, overrides: interrupt(cfg), resume=interrupt)
    done = call(*(["run", "--cfg", cfg] if command == "run" else ["resume", "runs/x"]))
    assert done.exit_code == 130
    assert "fs-fwdllm resume" in done.stderr


def test_resume_hands_over_the_folder(call: Callable[..., Result], stand_in: Callable[..., None]) -> None:
    given: list[Path] = []
    stand_in("running.local", resume=given.append)
    assert call("resume", "runs/x").exit_code == 0
    assert given == [Path("runs/x")]


def test_plan_prints_the_rows(call: Callable[..., Result], stand_in: Callable[..., None], cfg: Path) -> None:
    @dataclass
    class Plan:
        seed: int
        remarks: tuple[str, ...] = ("warning: [nothing] is done with it",)
        advice: tuple[str, ...] = ("advice: [spread] them",)

        def rows(self) -> list[tuple[str, str]]:
            return [("seed of [it]", str(self.seed)), ("upload per round", "42 B")]

    stand_in("forecast.plan", make_plan=lambda config: Plan(config.seed))
    done = call("plan", "--cfg", cfg, "seed", "77")
    assert done.exit_code == 0
    assert re.search(r"seed of \[it\]\s+77", done.stdout)
    assert re.search(r"upload per round\s+42 B", done.stdout)
    assert "warning: [nothing] is done with it" in done.stdout
    assert "advice: [spread] them" in done.stdout


def test_plot_and_compare_draw_from_the_folder(call: Callable[..., Result], tmp_path: Path) -> None:
    config = parse_config({"outdir": str(tmp_path), "expname": "small"})
    folder = RunFolder.create(config)
    with RunReporter(folder, config, total_rounds=1, start_round=1) as reporter:
        reporter.round({"round": 1, "seconds": 1.0, "train_loss": 0.25, "upload_bytes": 2048, "download_bytes": 1})
    done = call("plot", folder.path)
    assert done.exit_code == 0 and str(folder.report_path) in done.stdout
    assert folder.report_path.exists()
    output = tmp_path / "picture.png"
    done = call("compare", folder.path, folder.path, "--output", output)
    assert done.exit_code == 0 and output.exists()
    assert done.stdout.count("2.0 KiB") == 2
    done = call("compare", folder.path, tmp_path / "nothing", "--output", tmp_path / "other.png")
    assert done.exit_code == 2 and "no such run folder" in done.stderr
    assert not (tmp_path / "other.png").exists()


def test_doctor_tells_what_is_found_and_what_to_do_about_the_rest(
    call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = call("doctor")
    assert done.exit_code == 0
    for name in ("Python", "torch", "transformers", "peft", "numpy", "accelerator", "torch threads", "host local"):
        assert name in done.stdout
    assert re.search(r"extra wandb\s+not found\s+pip install 'fs-fwdllm\[wandb\]'", done.stdout)


def test_doctor_works_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    accelerator = next(finding for finding in doctor.examine() if finding.name == "accelerator")
    assert accelerator.found == "unknown" and "torch" in accelerator.hint
