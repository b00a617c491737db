"""The configuration: what is written is what is read, and every mistake is named with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.config import Config, dump_config, load_config, parse_config
from fs_fwdllm.config.yaml_text import dump_yaml, parse_yaml
from fs_fwdllm.errors import ConfigError

#: Every key that FederatedScope's published instruction-tuning experiments with MeZO set, in their notation.
PUBLISHED_STYLE = """
use_gpu: True
device: 0
early_stop:
  patience: 0
federate:
  mode: standalone
  client_num: 3
  total_round_num: 500
  save_to: "alpaca.ckpt"
  save_freq: 100
  share_local_model: True
  online_aggr: False
data:
  root: data/
  type: 'alpaca@llm'
  splits: [0.998, 0.001, 0.001]
  splitter: 'lda'
  splitter_args: [{'alpha': 0.5}]
llm:
  tok_len: 1000
  chat:
    max_len: 2000
  adapter:
    use: True
    args: [ { 'adapter_package': 'peft', 'adapter_method': 'lora', 'r': 128, 'lora_alpha': 256, 'lora_dropout': 0.05 } ]
dataloader:
  batch_size: 1
model:
  type: 'openlm-research/open_llama_3b_v2@huggingface_llm'
train:
  local_update_steps: 30
  batch_or_epoch: batch
  train_strategy: frozen
  optimizer:
    lr: 1e-5
    weight_decay: 0.0
  is_enable_half: True
criterion:
  type: CrossEntropyLoss
trainer:
  type: mezotrainer
eval:
  freq: 10
  metrics: ['loss']
  split: ['test']
  best_res_update_round_wise_key: test_loss
  count_flops: False
wandb:
  use: False
  name_user: someone
  name_project: somewhere
  online_track: True
  client_train_info: True
"""


def write(folder: Path, text: str, name: str = "example.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return str(caught.value)


def test_published_style_file_is_read_as_it_stands(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, PUBLISHED_STYLE))
    assert config.train.optimizer.lr == 1e-5
    assert config.llm.adapter.args[0]["r"] == 128
    assert config.data.splitter_args == [{"alpha": 0.5}]
    assert config.federate.total_round_num == 500
    assert config.expname == "example"


def test_host_only_keys_that_a_file_sets_are_listed_and_survive_the_round_trip(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, PUBLISHED_STYLE))
    ignored = config.ignored_keys()
    assert "federate.online_aggr" in ignored and "federate.save_freq" not in ignored
    assert "llm.chat.max_len" in ignored
    assert "train.optimizer.lr" not in ignored
    again = load_config(write(tmp_path, dump_config(config), "again.yaml"))
    assert again == config
    assert again.ignored_keys() == ignored


def test_dump_shows_what_was_left_to_its_default() -> None:
    tree = parse_yaml(dump_config(parse_config({})))
    assert tree["federate"]["total_round_num"] == 50
    assert tree["fwdllm"]["radius"] == 1e-3
    assert "online_aggr" not in tree["federate"]


@pytest.mark.parametrize(
    ("tree", "named", "remedy"),
    [
        ({"fedrate": {}}, "fedrate", "'federate'"),
        ({"federate": {"client_nmu": 3}}, "federate.client_nmu", "'federate.client_num'"),
        ({"train": {"optimizer": {"lrr": 1.0}}}, "train.optimizer.lrr", "'train.optimizer.lr'"),
        ({"lr": 0.1}, "lr", ""),
        ({"fwdllm": {"data": {"lable": "x"}}}, "fwdllm.data.lable", "'fwdllm.data.label'"),
    ],
)
def test_unknown_key_is_named_at_every_depth_with_the_nearest(tree: dict, named: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        parse_config(tree)
    assert str(caught.value).startswith(f"{named}: ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("federate.total_round_num", "many"),
        ("federate.total_round_num", "2.5"),
        ("federate.total_round_num", "2.0"),
        ("federate.total_round_num", "1e2"),
        ("federate.total_round_num", "true"),
        ("federate.total_round_num", "0"),
        ("federate.total_round_num", "null"),
        ("federate.total_round_num", "[3]"),
        ("train.optimizer.lr", "fast"),
        ("train.optimizer.lr", "-0.1"),
        ("train.optimizer.lr", ".nan"),
        ("train.optimizer.lr", ".inf"),
        ("train.optimizer.lr", "true"),
        ("train.optimizer.momentum", "1"),
        ("fwdllm.radius", "0"),
        ("data.splits", "[0.5, 0.5]"),
        ("data.splits", "[0.9, 0.2, -0.1]"),
        ("use_gpu", "1"),
        ("use_gpu", "maybe"),
        ("llm.adapter.args", "lora"),
        ("federate", "3"),
        ("seed", "-1"),
    ],
)
def test_wrong_type_or_range_names_key_and_value(tmp_path: Path, override: str, value: str) -> None:
    message = error_of(tmp_path, "", override, value)
    assert message.startswith(override)
    assert f"but the value is {parse_yaml(value)!r}" in message


def test_a_wrong_element_of_a_list_is_named_by_its_position(tmp_path: Path) -> None:
    message = error_of(tmp_path, "data: {splits: [0.9, b, 0.1]}")
    assert message.startswith("data.splits.1: ") and "'b'" in message


def test_a_choice_that_does_not_exist_lists_the_choices_and_the_nearest(tmp_path: Path) -> None:
    message = error_of(tmp_path, "", "fwdllm.estimator", "centrl")
    assert "'one_sided'" in message
    assert "did you mean 'central'?" in message


def test_two_mistakes_are_both_reported(tmp_path: Path) -> None:
    message = error_of(tmp_path, "", "seed", "x", "federate.client_num", "-2")
    assert "seed: " in message and "federate.client_num: " in message


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "", "fwd_agnews.yaml")
    with pytest.raises(ConfigError, match=r"fwd_agnew\.yaml.*did you mean '.*fwd_agnews\.yaml'"):
        load_config(tmp_path / "fwd_agnew.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "no" / "such.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("a: [1", "is not YAML"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("just words", "must be a mapping"),
        ("seed: 1\nseed: 2\n", "'seed' stands twice"),
        ("train:\n  optimizer:\n    lr: 1.0\n    lr: 2.0\n", "'lr' stands twice"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, text: str, fragment: str) -> None:
    assert fragment in error_of(tmp_path, text)


def _bomb(levels: int) -> str:
    """Ten times as many values with every level."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join([*lines, f"data: {{args: *a{levels - 1}}}"])


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!int x", "seed: !!float x", "seed: !!bool maybe", "seed: !!timestamp x", "seed: !!binary x",
        "seed: !!python/object/apply:os.getcwd []", f"seed: {'[' * 5000}{']' * 5000}", f"seed: 0x{'f' * 5000}",
        "seed: &s [*s]", "data: {args: &a [*a]}", _bomb(6), _bomb(40), 'outdir: "a\\0b"', 'outdir: "\\ud800"',
        "seed: {1: 2}", "? [a]\n: 1", "? {a: 1}\n: 2", "a: 1\n---\nb: 2", "seed: 1e999", f"seed: '{'x' * 10**6}'",
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_whatever_is_wrong_with_a_file_is_one_kind_of_error_that_can_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 2000
    override = text.partition(": ")[2]
    if text.startswith("seed: "):
        with pytest.raises(ConfigError) as caught:
            load_config(_empty(tmp_path), ["seed", override])
        assert len(str(caught.value)) < 2000


def _empty(folder: Path) -> Path:
    (folder / "empty.yaml").write_text("")
    return folder / "empty.yaml"


def test_a_date_is_a_name_and_an_alias_is_a_value(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("expname: 2026-11-26\nseed: &s 3\ndevice: *s\n")
    config = load_config(tmp_path / "c.yaml")
    assert (config.expname, config.seed, config.device) == ("2026-11-26", 3, 3)
    assert load_config(_empty(tmp_path), ["expname", "2026-11-26"]).expname == "2026-11-26"


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_config(path)


def test_an_empty_file_and_an_empty_section_have_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")).fwdllm == parse_config({}).fwdllm
    assert load_config(write(tmp_path, "train:\n  optimizer:\nfederate:\n")).train == parse_config({}).train
    assert load_config(write(tmp_path, "federate:\n"), ["federate.client_num", "4"]).federate.client_num == 4


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "7", 7),
        ("federate.sample_client_num", "-1", -1),
        ("federate.sample_client_rate", "-1", -1.0),
        ("train.optimizer.lr", "1e-5", 1e-5),
        ("train.optimizer.lr", "2.5E-5", 2.5e-5),
        ("train.optimizer.lr", "+1e-05", 1e-5),
        ("train.optimizer.lr", ".5e1", 5.0),
        ("train.optimizer.lr", "1", 1.0),
        ("data.splits", "[0.9, 0.05, 0.05]", [0.9, 0.05, 0.05]),
        ("data.splitter_args", "[{'alpha': 0.5}]", [{"alpha": 0.5}]),
        ("data.splitter", "", ""),
        ("expname", "2024", "2024"),
        ("expname", "1e5", "1e5"),
        ("expname", "2024-01-31", "2024-01-31"),
        ("fwdllm.data.text", "yes", "yes"),
        ("fwdllm.data.labels", "[World, Sports]", ["World", "Sports"]),
        ("model.type", "../data/models/m@huggingface_llm", "../data/models/m@huggingface_llm"),
        ("use_gpu", "True", True),
    ],
)
def test_overrides_replace_values_of_every_kind(tmp_path: Path, key: str, text: str, value: object) -> None:
    config = load_config(write(tmp_path, "seed: 1\ndata: {splitter: lda}\n"), [key, text])
    found: object = config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)
    assert load_config(write(tmp_path, dump_config(config), "again.yaml")) == config


def test_the_last_of_two_overrides_wins(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "seed: 1"), ["seed", "2", "seed", "3"]).seed == 3


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["seed"], "'seed' stands alone"),
        (["seed", "1", "federate.client_num"], "'federate.client_num' stands alone"),
        (["seed.x", "1"], "'seed' is a value, not a section"),
        (["fwdllm.radis", "1"], "did you mean 'fwdllm.radius'?"),
        (["data.splits", "[1"], "is not YAML"),
        (["", "1"], "unknown key"),
    ],
)
def test_odd_overrides_are_errors(tmp_path: Path, overrides: list[str], fragment: str) -> None:
    assert fragment in error_of(tmp_path, "seed: 1", *overrides)


def test_assignment_is_checked_and_two_configurations_share_nothing() -> None:
    first, second = parse_config({}), parse_config({})
    first.train.optimizer.lr = 0.5
    first.llm.adapter.args.append({"r": 1})
    assert second.train.optimizer.lr == Config().train.optimizer.lr != 0.5
    assert second.llm.adapter.args == [{}]
    with pytest.raises(ValueError, match="lr"):
        first.train.optimizer.lr = -1.0


def test_parsing_leaves_the_mapping_alone() -> None:
    tree = {"federate": None, "train": {"optimizer": None}}
    parse_config(tree)
    assert tree == {"federate": None, "train": {"optimizer": None}}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.text("1e-5.+E_"),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text("a1e-5.", max_size=4), children),
    max_leaves=8,
)


@given(PLAIN)
def test_yaml_reads_back_what_it_writes(tree: object) -> None:
    assert parse_yaml(dump_yaml(tree)) == tree


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["e", "E"]), st.integers(0, 17))
def test_exponent_notation_is_a_float_as_python_reads_it(value: float, letter: str, digits: int) -> None:
    text = f"{value:.{digits}{letter}}"
    assert parse_yaml(text) == float(text)


@pytest.mark.parametrize("value", ["[]", "[tset]", "test"])
def test_splits_to_evaluate_are_splits(value: str) -> None:
    """A split that nobody has would be evaluated on nothing, without a word."""
    with pytest.raises(ConfigError, match=r"eval\.split"):
        load_config("demo", ["eval.split", value])
