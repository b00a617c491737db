"""A configuration is found by its path or, from any folder, by the name it has in the package."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fs_fwdllm.cli.main import app
from fs_fwdllm.config import load_config
from fs_fwdllm.config.load import CONFIGS, find_config
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.host.federatedscope.command_line import with_found_file
from fs_fwdllm.host.fedml.settings import read_settings

NAMES = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_found_from_any_folder_in_every_spelling(name: str) -> None:
    for spelling in (name, f"{name}.yaml", f"configs/{name}", f"configs/{name}.yaml"):
        assert find_config(spelling) == CONFIGS / f"{name}.yaml"


def test_the_name_of_the_run_is_the_last_part() -> None:
    assert load_config("fwdllm/agnews_fwd").expname == "agnews_fwd"


def test_a_file_that_exists_wins_and_a_folder_does_not(elsewhere: Path) -> None:
    (elsewhere / "demo").mkdir()
    assert find_config("demo") == CONFIGS / "demo.yaml"
    (elsewhere / "demo.yaml").write_text("seed: 77")
    assert load_config("demo.yaml").seed == 77
    assert find_config("demo") == CONFIGS / "demo.yaml"


@pytest.mark.parametrize(
    ("option", "given", "near"),
    [
        ("--cfg", "dmeo", "demo"),
        ("--cfg", "fwdllm/agnews_fdw.yaml", "fwdllm/agnews_fwd"),
        ("--cfg", "configs/mezo_alpca.yaml", "mezo_alpaca"),
        ("--cf", "fwd_agnews_sp", "fedml/fwd_agnews_sp"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_the_nearest(option: str, given: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} {given}: cannot be read .*did you mean '{near}'") as caught:
        find_config(given, option)
    assert str(CONFIGS) in str(caught.value)


@pytest.mark.parametrize("given", ["../configs/demo", "/demo", "", ".", "fwdllm", "cybgd/"])
def test_what_only_resembles_a_name_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="no name of a packaged configuration"):
        find_config(given)


@pytest.mark.slow
def test_the_command_takes_a_name() -> None:
    result = CliRunner().invoke(app, ["plan", "--cfg", "demo", "federate.total_round_num", "2"])
    assert result.exit_code == 0, result.output


def test_a_packaged_file_without_its_data_says_what_to_give() -> None:
    for name, wanted in (("fwd_agnews", "data/ag_news"), ("fwdllm/agnews_fwd", "data build")):
        result = CliRunner().invoke(app, ["run", "--cfg", name])
        assert result.exit_code == 2
        assert wanted in result.stderr and "set data.root" in result.stderr


def test_fedmls_files_find_ours_by_path_and_by_name(elsewhere: Path) -> None:
    packaged = read_settings(Path("fedml/fwd_agnews_sp"))
    assert packaged.config.expname == "fwd_agnews_sp" and packaged.args["backend"] == "sp"
    own = elsewhere / "own.yaml"
    shutil.copy(CONFIGS / "fedml" / "fwd_agnews_sp.yaml", own)
    with pytest.raises(ConfigError, match=r"fwdllm_config ../fwd_agnews.yaml: cannot be read.*'fwd_agnews'"):
        read_settings(own)
    given = ["fwdllm_config", "fwd_agnews", "expname", "fwd_agnews_sp"]
    assert read_settings(own, given).config == packaged.config


def test_federatedscope_is_given_the_path() -> None:
    path = str(CONFIGS / "demo.yaml")
    assert with_found_file(["--cfg", "demo", "seed", "1"]) == ["--cfg", path, "seed", "1"]
    assert with_found_file(["--cfg=demo"]) == [f"--cfg={path}"]
    assert with_found_file(["--help"]) == ["--help"]
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        with_found_file(["--cfg", "demoo"])
