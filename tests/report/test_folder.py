"""The run folder: a new name for every run, and only a run folder is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fs_fwdllm.config import Config, dump_config, parse_config
from fs_fwdllm.errors import CheckpointError, ConfigError
from fs_fwdllm.report import RunFolder


def test_names_are_numbered_and_the_configuration_reads_back(config: Config) -> None:
    folders = [RunFolder.create(config) for _ in range(3)]
    assert [folder.name for folder in folders] == ["small", "small-2", "small-3"]
    for folder in folders:
        assert RunFolder.open(folder.path).config() == config
        assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("name", ["a/b", "..", "../up", "/root"])
def test_a_name_that_leaves_the_output_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="expname"):
        RunFolder.create(parse_config({"outdir": str(tmp_path), "expname": name}))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for outdir in ("file", "file/below"):
        with pytest.raises(ConfigError, match="outdir"):
            RunFolder.create(parse_config({"outdir": str(tmp_path / outdir), "expname": "x"}))


def test_open_refuses_what_is_no_run(tmp_path: Path, config: Config) -> None:
    made = RunFolder.create(config)
    with pytest.raises(CheckpointError, match=r"no such run folder; did you mean '.*small'"):
        RunFolder.open(made.path.parent / "smal")
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        RunFolder.open(tmp_path)
    made.config_path.write_text("sed: 1\n")
    with pytest.raises(ConfigError, match="'seed'"):
        made.config()


def test_a_folder_around_a_run_says_where_the_run_is(tmp_path: Path, config: Config) -> None:
    """FederatedScope writes a config.yaml of its own into the folder that holds ours."""
    around = tmp_path / "exp" / "dist"
    for name in ("fwdllm", "sub_exp/fwdllm"):
        (around / name).mkdir(parents=True)
        (around / name / "config.yaml").write_text(dump_config(config))
        (around / name).parent.joinpath("config.yaml").write_text("federate: {}\n")
        (around / name / "metrics.jsonl").write_text('{"round": 1}\n')
    for folder in (around, around.parent):
        with pytest.raises(CheckpointError, match=rf"is not a run folder; .*: {around}/fwdllm"):
            RunFolder.open(folder)
    assert RunFolder.open(around / "fwdllm").config() == config


def test_a_run_that_has_no_round_yet_is_a_run(config: Config) -> None:
    made = RunFolder.create(config)
    (made.adapter_path / "deep").mkdir(parents=True)
    assert RunFolder.open(made.path) == made
