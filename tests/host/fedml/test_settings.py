"""FedML's file and our section in it: what is said where, what wins, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fs_fwdllm.config import dump_config, load_config
from fs_fwdllm.config.yaml_text import dump_yaml
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.host.fedml.settings import FedMLSettings, dump_settings, read_settings, resolve_settings

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def settings_of(folder: Path, own: dict[str, Any] | None = None, *overrides: str, **theirs: Any) -> FedMLSettings:
    path = folder / "fedml_config.yaml"
    sections = {"common_args": {"training_type": "simulation"}, "train_args": theirs, "fwdllm_args": own or {}}
    path.write_text(dump_yaml(sections), encoding="utf-8")
    return read_settings(path, overrides)


def test_fedmls_words_are_ours(tmp_path: Path) -> None:
    config = settings_of(
        tmp_path, None, random_seed=3, comm_round=7, client_num_in_total=9, client_num_per_round=2, batch_size=5,
        epochs=2, learning_rate="1e-3", weight_decay=0.5, client_optimizer="sgd", frequency_of_the_test=4,
        partition_method="hetero", partition_alpha=0.25, using_gpu=True, gpu_id=1,
    ).config  # fmt: skip
    assert (config.seed, config.federate.total_round_num, config.eval.freq) == (3, 7, 4)
    assert (config.federate.client_num, config.federate.sample_client_num) == (9, 2)
    assert (config.dataloader.batch_size, config.train.local_update_steps) == (5, 2)
    assert config.train.batch_or_epoch == "epoch"
    assert (config.train.optimizer.lr, config.train.optimizer.weight_decay, config.train.optimizer.type) == (
        1e-3, 0.5, "SGD"
    )  # fmt: skip
    assert (config.data.splitter, config.data.splitter_args) == ("lda", [{"alpha": 0.25}])
    assert (config.use_gpu, config.device, config.expname) == (True, 1, "fedml_config")


def test_a_named_file_is_relative_to_fedmls_and_fedmls_words_go_before_it(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "base.yaml").write_text(
        "{seed: 4, use_gpu: true, federate: {method: fedmezo, total_round_num: 50}, fwdllm: {probes: 3}}"
    )
    config = settings_of(tmp_path, {"fwdllm_config": "ours/base.yaml"}, comm_round=2).config
    assert (config.seed, config.use_gpu, config.federate.method, config.fwdllm.probes) == (4, True, "fedmezo", 3)
    assert config.federate.total_round_num == 2


def test_overrides_go_before_the_named_file_and_the_command_line_before_all(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("{fwdllm: {probes: 3, radius: 0.5}}")
    own = {
        "fwdllm_config": "base.yaml",
        "fwdllm_overrides": {"fwdllm": {"probes": 4}, "llm.tok_len": 9, "data": {"splitter_args": [{"alpha": 1.5}]}},
    }
    config = settings_of(tmp_path, own).config
    assert (config.fwdllm.probes, config.fwdllm.radius, config.llm.tok_len) == (4, 0.5, 9)
    assert config.data.splitter_args == [{"alpha": 1.5}]
    settings = settings_of(
        tmp_path, own, "fwdllm.probes", "5", "comm_round", "6", "worker_num", "3", "backend", "MPI", comm_round=2
    )
    assert (settings.config.fwdllm.probes, settings.config.federate.total_round_num) == (5, 6)
    assert (settings.args["comm_round"], settings.worker_num, settings.args["backend"]) == (6, 3, "MPI")
    assert settings_of(tmp_path, own, "federate.total_round_num", "8", comm_round=2).args["comm_round"] == 8


def test_what_stands_twice_must_agree(tmp_path: Path) -> None:
    own = {"fwdllm_overrides": {"federate": {"total_round_num": 9}}}
    assert settings_of(tmp_path, own, comm_round=9).config.federate.total_round_num == 9
    with pytest.raises(ConfigError, match=r"federate.total_round_num is 9, but comm_round says 2 .* keep one"):
        settings_of(tmp_path, own, comm_round=2)


def test_there_is_a_process_for_each_client_of_a_round_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    assert settings_of(tmp_path, client_num_in_total=9, client_num_per_round=4).worker_num == 4
    assert settings_of(tmp_path, client_num_in_total=9).worker_num == 9
    share = settings_of(tmp_path, {"fwdllm_overrides": {"federate.sample_client_rate": 0.5}}, client_num_in_total=3)
    assert share.args["client_num_per_round"] == 1
    assert settings_of(tmp_path, client_num_in_total=9, worker_num=2).worker_num == 2


@pytest.mark.parametrize(
    ("own", "theirs", "fragments"),
    [
        ({"fwdllm_confg": "x"}, {}, ["fwdllm_args.fwdllm_confg", "did you mean 'fwdllm_config'?"]),
        ({"probes": 2}, {}, ["fwdllm_args.probes: unknown key", "fwdllm_overrides"]),
        ({"fwdllm_config": "absent.yaml"}, {}, ["absent.yaml", "cannot be read"]),
        ({"fwdllm_overrides": 3}, {}, ["fwdllm_overrides", "3"]),
        ({"fwdllm_overrides": {"fwdlm": {"probes": 2}}}, {}, ["fwdlm", "unknown key"]),
        ({"fwdllm_deadline_s": 0}, {}, ["fwdllm_deadline_s", "0"]),
        ({}, {"backend": "NCCL"}, ["backend: 'NCCL'", "sp, MPI"]),
        ({}, {"backend": "GRPCC", "training_type": "cross_silo"}, ["did you mean 'GRPC'?"]),
        ({}, {"training_type": "cross_device"}, ["training_type", "simulation, cross_silo"]),
        ({}, {"federated_optimizer": "FedOpt"}, ["federated_optimizer", "federate.method"]),
        ({}, {"scenario": "hierarchical"}, ["scenario", "horizontal"]),
        ({}, {"enable_tracking": True}, ["enable_tracking", "cloud"]),
        ({}, {"enable_wandb": True}, ["enable_wandb", "wandb.use"]),
        ({}, {"enable_dp": True}, ["enable_dp", "slopes"]),
        ({}, {"comm_round": 0}, ["federate.total_round_num", "comm_round"]),
        ({}, {"client_optimizer": "adam"}, ["client_optimizer", "adamw"]),
        ({}, {"partition_method": "kmeans"}, ["partition_method", "homo"]),
        ({}, {"worker_num": 0}, ["worker_num", "0"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, own: dict[str, Any], theirs: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        settings_of(tmp_path, own, **theirs)
    for fragment in fragments:
        assert fragment in str(refused.value)


def test_mistakes_on_the_command_line_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"comm_rounds: is a key of neither.*did you mean 'comm_round'"):
        settings_of(tmp_path, None, "comm_rounds", "3")
    with pytest.raises(ConfigError, match="'seed' stands alone"):
        settings_of(tmp_path, None, "seed")


@pytest.mark.parametrize("text", ["3", "common_args: 3", "common_args: {a: 1", "[1]"])
def test_a_file_that_is_not_fedmls_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"--cf .*x\.yaml"):
        read_settings(tmp_path / "x.yaml")


def test_what_a_run_keeps_reads_back_to_the_same(tmp_path: Path) -> None:
    own = {"fwdllm_overrides": {"fwdllm": {"radius": 1e-7}}, "fwdllm_deadline_s": 5}
    said = settings_of(
        tmp_path, own, "train.local_update_steps", "3", epochs=2, worker_num=2, learning_rate=1e-5, comm_round=4
    )
    (tmp_path / "config.yaml").write_text(dump_config(said.config), encoding="utf-8")
    (tmp_path / "kept.yaml").write_text(dump_settings(said, "config.yaml"), encoding="utf-8")
    again = read_settings(tmp_path / "kept.yaml")
    assert again.config == said.config == load_config(tmp_path / "config.yaml")
    assert (again.deadline_s, again.worker_num) == (5, 2)
    assert again.config.train.local_update_steps == 3


def test_arguments_that_fedml_has_read_mean_the_same_as_its_file(tmp_path: Path) -> None:
    flat = {"training_type": "simulation", "backend": "sp", "comm_round": 2, "learning_rate": "1e-3",
            "fwdllm_overrides": {"seed": 5}, "rank": 0, "yaml_config_file": "x"}  # fmt: skip
    config = resolve_settings(flat, tmp_path).config
    assert (config.seed, config.train.optimizer.lr, config.federate.total_round_num) == (5, 1e-3, 2)


@pytest.mark.parametrize("path", sorted((CONFIGS / "fedml").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_are_valid(path: Path) -> None:
    settings = read_settings(path)
    assert settings.config.federate.total_round_num <= 20
    assert settings.args["backend"] in ("sp", "MPI", "GRPC")


def test_a_deadline_of_our_file_holds_unless_fedmls_word_says_another(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text("fwdllm: {deadline_s: 7.0}\n")
    ours = {"fwdllm_config": "ours.yaml"}
    assert resolve_settings(ours, tmp_path).deadline_s == 7
    assert resolve_settings(ours, tmp_path, ["fwdllm.deadline_s", "8.0"]).deadline_s == 8
    assert resolve_settings({**ours, "fwdllm_deadline_s": 5}, tmp_path).deadline_s == 5
