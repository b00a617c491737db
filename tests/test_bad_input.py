"""Whatever a user gets wrong ends in one message that names it, or in the outcome the documentation promises.

Everything here goes through the command, so that no error can turn into a traceback on its way out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fs_fwdllm.cli.main import app
from tests.host.fixtures import models, world
from tests.host.small import CLASSES, METHODS, World, read_jsonl
from tests.model.tiny import save_tiny_model

__all__ = ["models", "world"]

_FORWARD = {**METHODS["forward_gradient"], "federate.total_round_num": 2}
_MEZO = {**METHODS["mezo"], "federate.total_round_num": 2}


@pytest.fixture
def call(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``call(settings, *overrides)`` writes a configuration and runs it with the command."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")

    def run_command(
        settings: dict[str, Any], *overrides: str, language_model: bool = False, command: str = "run"
    ) -> Result:
        cfg = world.root / "bad.yaml"
        tree = world.tree({**_FORWARD, **settings}, language_model=language_model)
        cfg.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return CliRunner().invoke(app, [command, "--cfg", str(cfg), *overrides])

    return run_command


def assert_refused(done: Result, *fragments: str) -> None:
    """Exit code 2 and one message with every fragment; nothing that looks like a crash."""
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert done.stderr.startswith("error: ") and "Traceback" not in done.output
    for fragment in fragments:
        assert fragment in done.stderr


def finished(done: Result, world: World) -> list[dict[str, Any]]:
    """The lines of a run that was expected to finish."""
    assert done.exit_code == 0, (done.output, done.exception)
    (path,) = (world.root / "runs").iterdir()
    lines = read_jsonl(path / "metrics.jsonl")
    assert lines[-1]["final"] is True
    return lines


def asked(lines: list[dict[str, Any]]) -> set[int]:
    return {int(client) for line in lines for client in line.get("loss", {})}


CONFIG_MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown section": ({"federat.method": "fedfwd"}, ("federat: unknown key", "did you mean 'federate'")),
    "unknown key": ({"fwdllm.probe": 3}, ("fwdllm.probe: unknown key", "3", "did you mean 'fwdllm.probes'")),
    "text for a number": ({"train.optimizer.lr": "fast"}, ("train.optimizer.lr", "'fast'", "number")),
    "fraction for a count": ({"federate.total_round_num": 2.5}, ("federate.total_round_num", "2.5", "integer")),
    "number for a truth value": ({"llm.adapter.use": 1}, ("llm.adapter.use", "1")),
    "value for a section": ({"dataloader": 4}, ("dataloader", "4")),
    "negative rate": ({"train.optimizer.lr": -1.0}, ("train.optimizer.lr", "-1.0", "greater than or equal to 0")),
    "no radius": ({"fwdllm.radius": 0.0}, ("fwdllm.radius", "0.0", "greater than 0")),
    "word outside a list": ({"fwdllm.estimator": "centrl"}, ("fwdllm.estimator", "'centrl'", "did you mean 'central'")),
    "splits that are no shares": ({"data.splits": [0.5, 0.5, 0.5]}, ("data.splits", "sum to 1")),
    "unknown method": ({"federate.method": "fedmeso"}, ("federate.method 'fedmeso'", "did you mean 'fedmezo'")),
    "method and trainer at odds": (
        {"federate.method": "fedfwd", "trainer.type": "mezotrainer"},
        ("trainer.type 'mezotrainer'", "federate.method 'fedfwd'", "fwdtrainer"),
    ),
    "backpropagation by name of MeZO": (
        {"federate.method": "fedmezo", "trainer.type": "llmtrainer"},
        ("trainer.type 'llmtrainer'", "federate.method 'fedmezo'", "mezotrainer"),
    ),
    "unknown trainer": (
        {"federate.method": "FedAvg", "trainer.type": "mezotrainr"},
        ("'mezotrainr'", "did you mean 'mezotrainer'"),
    ),
    "forward mode and fused attention": (
        {"fwdllm.estimator": "forward_mode", "fwdllm.attention": "sdpa"},
        ("fwdllm.attention 'sdpa'", "forward_mode", "set fwdllm.attention: eager"),
    ),
    "more probes in a batch than probes": (
        {"fwdllm.probes_per_batch": 5},
        ("fwdllm.probes_per_batch 5", "fwdllm.probes 4", "1 to 4"),
    ),
    "batched probes of every parameter": (
        {"fwdllm.probes_per_batch": 2, "llm.adapter.use": False},
        ("fwdllm.probes_per_batch 2", "llm.adapter.use: true"),
    ),
    "momentum with MeZO": (
        {**_MEZO, "fwdllm.server_momentum": 0.9},
        ("fwdllm.server_momentum 0.9", "federate.method: fedfwd"),
    ),
    "Adam with MeZO": (
        {**_MEZO, "fwdllm.server_optimizer": "adam"},
        ("fwdllm.server_optimizer 'adam'", "federate.method: fedfwd"),
    ),
    "Adam where gradients travel": (
        {"fwdllm.server_optimizer": "adam", "fwdllm.upload": "dense"},
        ("fwdllm.server_optimizer 'adam'", "fwdllm.upload 'dense'", "fwdllm.upload: scalars"),
    ),
    "an epsilon with MeZO": ({**_MEZO, "fwdllm.server_epsilon": 1e-6}, ("fwdllm.server_epsilon 1e-06", "fedfwd")),
    "momentum with Adam": (
        {"fwdllm.server_optimizer": "adam", "fwdllm.server_momentum": 0.9},
        ("fwdllm.server_momentum 0.9", "fwdllm.server_betas [0.9, 0.999]", "set fwdllm.server_momentum to 0"),
    ),
    "step control with Adam": (
        {"fwdllm.server_optimizer": "adam", "fwdllm.step.control": "normalised"},
        ("fwdllm.step.control 'normalised'", "fwdllm.server_optimizer to sgd"),
    ),
    "betas without Adam": (
        {"fwdllm.server_betas": [0.9, 0.99]},
        ("fwdllm.server_betas [0.9, 0.99]", "leave it at [0.9, 0.999]", "fwdllm.server_optimizer: adam"),
    ),
    "an epsilon without Adam": (
        {"fwdllm.server_epsilon": 1e-6},
        ("fwdllm.server_epsilon 1e-06", "fwdllm.server_optimizer: adam"),
    ),
    "a beta of one": ({"fwdllm.server_betas": [0.9, 1]}, ("fwdllm.server_betas", "[0.9, 1]", "below 1")),
    "a negative beta": ({"fwdllm.server_betas": [-0.1, 0.9]}, ("fwdllm.server_betas", "at least 0")),
    "one beta": ({"fwdllm.server_betas": [0.9]}, ("fwdllm.server_betas", "[0.9]", "2")),
    "no epsilon": ({"fwdllm.server_epsilon": 0}, ("fwdllm.server_epsilon", "at least 1e-16")),
    "unknown server optimiser": ({"fwdllm.server_optimizer": "adm"}, ("fwdllm.server_optimizer", "'adm'", "'adam'")),
    "more clients a round than clients": (
        {"federate.sample_client_num": 9},
        ("federate.sample_client_num 9", "1 to 4", "-1 for all"),
    ),
    "no client a round": ({"federate.sample_client_num": 0}, ("federate.sample_client_num 0", "1 to 4")),
    "no clients": ({"federate.client_num": 0}, ("federate.client_num: 0", "data.splitter natural")),
    "unknown splitter": ({"data.splitter": "idd"}, ("data.splitter", "'idd'", "did you mean 'iid'")),
    "alpha of nothing": (
        {"data.splitter": "lda", "data.splitter_args": [{"alpha": 0}]},
        ("data.splitter_args", "alpha", "above 0"),
    ),
    "unknown data": ({"data.type": "texts.xml@text"}, ("data.type", "'texts.xml@text'", ".jsonl")),
    "no data": ({"data.type": ""}, ("data.type", "''")),
    "instructions for a classifier": (
        {"data.type": "instructions.jsonl@llm"},
        ("data.type 'instructions.jsonl@llm'", "NAME@text"),
    ),
    "unknown metric": ({"eval.metrics": ["acuracy"]}, ("eval.metrics", "'acuracy'", "did you mean 'accuracy'")),
    "unknown adapter": (
        {"llm.adapter.args": [{"adapter_method": "lore"}]},
        ("llm.adapter.args", "'lore'", "did you mean 'lora'"),
    ),
    "a task that is none": ({"model.task": "Classify"}, ("model.task", "'Classify'", "'SequenceClassification'")),
    "too few classes announced": ({"model.num_labels": 2}, ("model.num_labels is 2", "3 classes")),
    "a run name that is a path": ({"expname": "a/b"}, ("expname", "'a/b'", "outdir")),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_a_mistake_in_the_configuration_is_named(call: Callable[..., Result], mistake: str) -> None:
    settings, fragments = CONFIG_MISTAKES[mistake]
    assert_refused(call(settings), *fragments)


def test_a_mistake_in_an_override_is_named_like_one_in_the_file(call: Callable[..., Result]) -> None:
    assert_refused(call({}, "fwdllm.probe", "3"), "fwdllm.probe: unknown key", "did you mean 'fwdllm.probes'")
    assert_refused(call({}, "seed", "abc"), "seed", "'abc'", "integer")
    assert_refused(call({}, "seed"), "'seed' stands alone")


def test_texts_for_a_language_model_need_words_it_tells_apart(call: Callable[..., Result], world: World) -> None:
    done = call({"data.type": f"{world.texts()}@text"}, language_model=True)
    assert_refused(done, "fwdllm.data.label_words", "'animal' and 'plant' start with the same token")


def test_questions_for_a_language_model_are_refused(call: Callable[..., Result]) -> None:
    done = call({"data.type": "questions.json@qa"}, language_model=True)
    assert_refused(done, "data.type 'questions.json@qa'", "model.type", "NAME@llm")


def test_a_missing_configuration_names_its_neighbour(world: World) -> None:
    (world.root / "demo.yaml").write_text("seed: 1\n")
    done = CliRunner().invoke(app, ["run", "--cfg", str(world.root / "demmo.yaml")])
    assert_refused(done, "demmo.yaml", "No such file", "did you mean")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "seed: 1\nseed: 2\n", "\tseed: 1\n"])
def test_a_file_that_is_no_configuration(world: World, text: str) -> None:
    path = world.root / "odd.yaml"
    path.write_text(text)
    assert_refused(CliRunner().invoke(app, ["run", "--cfg", str(path)]), str(path))


def test_a_missing_data_file_names_its_neighbour(call: Callable[..., Result], world: World) -> None:
    done = call({"data.type": "text.jsonl@text"})
    assert_refused(done, str(world.root / "text.jsonl"), "does not exist", "did you mean 'texts.jsonl'")


def test_a_missing_data_folder(call: Callable[..., Result], world: World) -> None:
    assert_refused(call({"data.root": str(world.root / "nowhere")}), "nowhere", "data.root")


def test_a_missing_model(call: Callable[..., Result], world: World) -> None:
    done = call({"model.type": f"{world.models}/brt@transformers"})
    assert_refused(done, "model.type", f"{world.models}/brt", "does not exist")


DATA_MISTAKES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "a label outside the classes": (
        '{"text": "w3", "label": "animal"}\n{"text": "w4", "label": "fungus"}\n',
        {"fwdllm.data.labels": list(CLASSES)}, ("mine.jsonl, row 2", "'fungus'", "'animal'"),
    ),
    "one class only": (
        '{"text": "w3", "label": "a"}\n{"text": "w4", "label": "a"}\n', {}, ("mine.jsonl", "two classes", "['a']")
    ),
    "no label": (
        '{"text": "w3", "label": "a"}\n{"text": "w4"}\n', {}, ("mine.jsonl, row 2", "'label'", "fwdllm.data.label")
    ),
    "no text": (
        '{"text": "w3", "label": "a"}\n{"txt": "w3", "label": "b"}\n', {}, ("row 2", "'text'", "did you mean 'txt'")
    ),
    "no JSON": ('{"text": "w3", "label": "a"}\n{"text": \n', {}, ("mine.jsonl:2", "is not JSON")),
    "no object": ('{"text": "w3", "label": "a"}\n[1]\n', {}, ("mine.jsonl:2", "must be an object")),
    "no row": ("", {}, ("mine.jsonl", "has no rows")),
    "a list for a text": (
        '{"text": "w3", "label": "a"}\n{"text": ["w4"], "label": "b"}\n', {}, ("row 2", "'text' must be text")
    ),
    "no owner": (
        '{"text": "w3", "label": "a"}\n{"text": "w4", "label": "b"}\n',
        {"data.splitter": "natural", "fwdllm.data.natural": "owner", "federate.client_num": 0},
        ("row 1", "'owner'", "fwdllm.data.natural"),
    ),
    "more clients than owners": (
        '{"text": "w3", "label": "a", "owner": 1}\n{"text": "w4", "label": "b", "owner": 2}\n',
        {"data.splitter": "natural", "fwdllm.data.natural": "owner"}, ("federate.client_num: 4", "2 clients"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", DATA_MISTAKES)
def test_a_mistake_in_the_data_is_named_with_its_place(call: Callable[..., Result], world: World, mistake: str) -> None:
    text, settings, fragments = DATA_MISTAKES[mistake]
    (world.root / "mine.jsonl").write_text(text, encoding="utf-8")
    assert_refused(call({"data.type": "mine.jsonl@text", **settings}), *fragments)


@pytest.mark.parametrize("splitter", ["lda", "meta"])
def test_instructions_without_categories_cannot_be_split_by_them(
    call: Callable[..., Result], world: World, splitter: str
) -> None:
    rows = [{"instruction": f"w{row + 3}", "input": "", "output": "w9 w8"} for row in range(8)]
    settings = {"data.type": world.write_rows("plain.jsonl", rows) + "@llm", "data.splitter": splitter}
    done = call(settings, language_model=True)
    assert_refused(done, "plain.jsonl", f"data.splitter {splitter}", "iid", "fwdllm.data.category")


def test_with_fewer_categories_than_clients_clients_share(call: Callable[..., Result], world: World) -> None:
    settings = {"data.splitter": "meta", "federate.client_num": 7, "data.splits": [1.0, 0.0, 0.0]}
    lines = finished(call(settings, language_model=True), world)
    assert asked(lines) == set(range(1, 8))


def test_a_client_without_samples_is_never_asked(call: Callable[..., Result], world: World) -> None:
    """Four clients, two owners of rows each: nobody waits for the others, nobody counts them."""
    world.texts(rows=5, name="few.jsonl")
    settings = {"data.type": "few.jsonl@text", "federate.client_num": 8, "data.splits": [1.0, 0.0, 0.0]}
    done = call(settings)
    lines = finished(done, world)
    assert len(asked(lines)) == 5
    assert all(line.get("rejected", {}) == {} for line in lines)
    assert "3 clients hold no training sample and are never asked" in done.stdout


def test_more_clients_asked_than_hold_samples_is_refused(call: Callable[..., Result], world: World) -> None:
    world.texts(rows=5, name="few.jsonl")
    settings = {"data.type": "few.jsonl@text", "federate.client_num": 8, "federate.sample_client_num": 6,
                "data.splits": [1.0, 0.0, 0.0]}  # fmt: skip
    assert_refused(call(settings), "federate.sample_client_num 6", "only 5 clients hold training samples")


@pytest.mark.parametrize("method", METHODS)
def test_fewer_samples_than_a_batch_are_one_small_batch(call: Callable[..., Result], world: World, method: str) -> None:
    settings = {**METHODS[method], "federate.total_round_num": 2, "dataloader.batch_size": 64}
    lines = finished(call(settings), world)
    assert asked(lines) == {1, 2, 3, 4}
    assert all(math.isfinite(loss) for line in lines for loss in line.get("loss", {}).values())


@pytest.mark.parametrize("eos", [True, False], ids=["end token", "no end token"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_tokenizer_without_a_pad_token_is_given_one(
    call: Callable[..., Result], world: World, method: str, architecture: str, eos: bool
) -> None:
    """With a language model; batches of unequal length are padded, and the padding is not learned from."""
    folder = world.model(architecture, pad=False, eos=eos)
    settings = {**METHODS[method], "model.type": f"{folder}@huggingface_llm", "federate.total_round_num": 2}
    lines = finished(call(settings, language_model=True), world)
    assert all(math.isfinite(line["train_loss"]) for line in lines if "train_loss" in line)


def test_a_classifier_without_a_pad_token(call: Callable[..., Result], world: World) -> None:
    folder = world.model("gpt2", pad=False)
    finished(call({"model.type": f"{folder}@transformers"}), world)


def test_answers_cut_off_entirely(call: Callable[..., Result], world: World) -> None:
    """No label within llm.tok_len: there is nothing to learn from, and the key that decides is named."""
    assert_refused(call({"llm.tok_len": 4}, language_model=True), "instructions.jsonl", "llm.tok_len 4")


def test_longer_texts_than_the_model_has_positions(call: Callable[..., Result]) -> None:
    assert_refused(call({"llm.tok_len": 4096}), "llm.tok_len", "4096", "64")


@pytest.mark.parametrize("method", METHODS)
def test_a_model_whose_loss_is_nan_stops_with_advice(call: Callable[..., Result], world: World, method: str) -> None:
    folder = save_tiny_model(world.root / "nan", "bert")
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][30:] = math.nan  # beyond what loading tries the model out on
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {**METHODS[method], "model.type": f"{folder}@transformers", "federate.total_round_num": 9}
    done = call(settings)
    assert_refused(done, "not_finite", "train.optimizer.lr", "fwdllm.radius", "fwdllm.max_failed_rounds is 3")


def test_weights_that_are_no_weights(call: Callable[..., Result], world: World) -> None:
    folder = save_tiny_model(world.root / "torn", "bert")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(call({"model.type": f"{folder}@transformers"}), str(folder))


def test_pickled_weights_are_not_read(call: Callable[..., Result], world: World) -> None:
    folder = save_tiny_model(world.root / "pickled", "bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(call({"model.type": f"{folder}@transformers"}), str(folder))


def test_a_learning_rate_far_too_high_stops_or_ends_with_finite_numbers(
    call: Callable[..., Result], world: World
) -> None:
    """Divergence has an outcome: what is left on disk is finite."""
    done = call({"train.optimizer.lr": 1e30, "federate.total_round_num": 6})
    assert_refused(done, "train.optimizer.lr")
    (path,) = (world.root / "runs").iterdir()
    assert not (path / "checkpoint" / "state.safetensors").exists(), "the first step's loss has exploded already"
    for file in path.rglob("*.safetensors"):
        assert all(bool(value.isfinite().all()) for value in load_file(file).values())


def test_an_output_folder_that_is_a_file(call: Callable[..., Result], world: World) -> None:
    (world.root / "taken").write_text("")
    assert_refused(call({"outdir": str(world.root / "taken")}), "outdir", "taken")


@pytest.mark.parametrize("command", ["plan", "run"])
def test_plan_refuses_what_run_refuses(call: Callable[..., Result], command: str) -> None:
    for settings in (
        {"fwdllm.probes_per_batch": 5},
        {"federate.method": "fedfwd", "trainer.type": "mezotrainer"},
        {"data.type": "text.jsonl@text"},
    ):
        assert_refused(call(settings, command=command))


def test_a_refused_configuration_leaves_no_run_folder(call: Callable[..., Result], world: World) -> None:
    for mistake in (
        "method and trainer at odds", "unknown metric", "no data", "more clients a round than clients",
        "no client a round", "momentum with MeZO",
    ):  # fmt: skip
        assert_refused(call(CONFIG_MISTAKES[mistake][0]))
    assert not (world.root / "runs").exists()


def test_resuming_nothing(world: World, call: Callable[..., Result]) -> None:
    assert_refused(CliRunner().invoke(app, ["resume", str(world.root / "nothing")]), "there is no such run folder")
    (world.root / "empty").mkdir()
    assert_refused(CliRunner().invoke(app, ["resume", str(world.root / "empty")]), "is not a run folder", "config.yaml")


def test_a_checkpoint_of_random_bytes(world: World, call: Callable[..., Result]) -> None:
    finished(call({}), world)
    (path,) = (world.root / "runs").iterdir()
    (path / "checkpoint" / "state.safetensors").write_bytes(json.dumps({"a": 1}).encode())
    done = CliRunner().invoke(app, ["resume", str(path)])
    assert_refused(done, str(path / "checkpoint"), "damaged or not a checkpoint of ours")


def test_the_world_itself_is_sound(world: World, call: Callable[..., Result]) -> None:
    """Every refusal above is one change away from a run that finishes."""
    lines = finished(call({}), world)
    assert [line["round"] for line in lines] == [0, 1, 2, 2]
    assert Path(world.root / "runs" / "small" / "adapter").is_dir()
