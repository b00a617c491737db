"""What a run trained is what a user gets: the same losses, the names of the classes, the words of the training."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from typer.testing import CliRunner

import fs_fwdllm
from fs_fwdllm import RunResult, Sampling, load, merge, run
from fs_fwdllm.cli.main import app
from fs_fwdllm.errors import ConfigError, DataError, ModelError
from fs_fwdllm.model.own_folder import OWN_FOLDERS
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.model.trainable_parts import PARTS
from fs_fwdllm.running.evaluating import evaluate_file, evaluate_run
from fs_fwdllm.running.local import run as run_folder
from fs_fwdllm.running.saved import check_saved
from fs_fwdllm.running.session import Session
from tests.host.small import CLASSES, METHODS, World, read_jsonl

SENTENCES = ["w4 w5 w6 w7", "w34 w35 w40", "w70 w71 w66 w80 w90"]
BACKPROP = {**METHODS["fedavg"], "federate.total_round_num": 3, "train.optimizer.lr": 0.5}


def part(method: str, **arguments: Any) -> dict[str, Any]:
    if method == "full":
        return {"llm.adapter.use": False}
    return {"llm.adapter.args": [{"adapter_method": method, **arguments}]}


def call(*arguments: Any) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: Any) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "300", "NO_COLOR": "1"})
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize("method", [method for method in PARTS if method != "output_residual"])
def test_every_kind_of_adapter_predicts_what_was_evaluated(world: World, method: str) -> None:
    """The accuracy counted from predictions by name is the run's, and the run's own end has compared the losses."""
    result = run(world.config({**BACKPROP, **part(method), "fwdllm.base.compute_dtype": "bfloat16"}))
    trained = result.load()
    assert trained.classes == CLASSES
    rows = read_jsonl(world.root / "texts.jsonl")
    predictions = trained.predict([row["text"] for row in rows])
    right = sum(one.label == row["label"] for one, row in zip(predictions, rows, strict=True))
    assert evaluate_file(result, world.root / "texts.jsonl")["accuracy"] == pytest.approx(right / len(rows))
    assert evaluate_run(result)["loss"] == pytest.approx(result.metrics["loss"], abs=1e-6)
    assert all(sum(one.probabilities.values()) == pytest.approx(1) for one in predictions)
    assert all(one.probability == max(one.probabilities.values()) for one in predictions)


def test_a_text_has_one_prediction_in_any_company_and_any_batch(world: World) -> None:
    trained = run(world.config(BACKPROP)).load()
    together = trained.predict(SENTENCES, batch_size=3)
    alone = [trained.predict([text])[0] for text in SENTENCES]
    for one, other in zip(together, alone, strict=True):
        assert one.label == other.label
        assert list(one.probabilities.values()) == pytest.approx(list(other.probabilities.values()), abs=1e-5)
    assert trained.predict([]) == []
    assert trained.predict(["", SENTENCES[0]])[0].label in ("", *CLASSES)


@pytest.mark.parametrize("method", ["head", "bitfit", "lora"])
def test_pipeline_answers_with_the_same_names(world: World, method: str) -> None:
    """Given the model: by the adapter's folder alone a pipeline takes the base, and a new head of its own."""
    result = run(world.config({**BACKPROP, **part(method)}))
    ours = result.load().predict(SENTENCES)
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(result.folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "adapter")
    theirs = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(SENTENCES)
    assert [one.label for one in ours] == [one["label"] for one in theirs]


def test_a_result_knows_its_files_and_its_metrics(world: World) -> None:
    result = run(world.config(BACKPROP))
    assert isinstance(result, RunResult)
    assert Path(result) == result.folder and result.trained == result.folder / "adapter"
    *rounds, end = read_jsonl(result.files.metrics_path)
    assert result.metrics == next(line["eval"] for line in rounds if line["round"] == end["saved_round"])
    assert result.record.rounds[-1]["round"] == 3


def test_the_public_names_are_listed() -> None:
    assert {"run", "load", "resume", "merge", "load_config", "RunResult", "TrainedModel"} <= set(dir(fs_fwdllm))


def test_pairs_and_questions_ask_for_their_second_text(world: World) -> None:
    trained = run(world.config(BACKPROP)).load()
    with pytest.raises(DataError, match="trained on single texts; leave pairs out"):
        trained.predict(["w4"], ["w5"])
    with pytest.raises(DataError, match=r"predict takes a list of texts"):
        trained.predict("w4")
    with pytest.raises(ConfigError, match="writes no texts; use predict"):
        trained.generate(["w4"])
    rows = [{"a": "w4 w5", "b": f"w{30 + row}", "label": CLASSES[row % 3]} for row in range(24)]
    world.write_rows("pairs.jsonl", rows)
    own = {"data.type": "pairs.jsonl@text", "fwdllm.data.text": "a", "fwdllm.data.text_pair": "b"}
    pairs = run(world.config({**BACKPROP, **own})).load()
    with pytest.raises(DataError, match=r"trained on pairs; give the second text \(b\)"):
        pairs.predict(["w4"])
    with pytest.raises(DataError, match="there are 1 texts, but 2 pairs"):
        pairs.predict(["w4"], ["w5", "w6"])
    assert pairs.predict(["w4"], ["w33"])[0].label in CLASSES
    assert len(pairs.predict_file(world.root / "pairs.jsonl")[1]) == 24


def test_label_words_predict_by_name(world: World) -> None:
    own = {"data.type": f"{world.texts()}@text", "fwdllm.data.label_words": ["w3", "w33", "w63"]}
    result = run(world.config({**BACKPROP, **own}, language_model=True))
    trained = result.load()
    assert trained.task == "label_words" and trained.classes == CLASSES
    assert {one.label for one in trained.predict(SENTENCES)} <= set(CLASSES)
    assert evaluate_run(result)["loss"] == pytest.approx(result.metrics["loss"], abs=1e-6)


def test_a_question_is_answered_from_its_context(world: World) -> None:
    context = "w9 w8 w7 w6"
    answers = [{"text": "w7", "answer_start": 6}]
    rows = [{"question": f"w{10 + row}", "context": context, "answers": answers, "id": f"q{row}"} for row in range(12)]
    world.write_rows("spans.jsonl", rows)
    own = {"data.type": "spans.jsonl@qa", "model.task": "QuestionAnswering", "llm.tok_len": 16}
    trained = run(world.config({**BACKPROP, **own, "train.optimizer.lr": 0.1})).load()
    (answer,) = trained.predict(["w10"], [context])
    assert answer.label and answer.label in context and answer.probability is None
    with pytest.raises(DataError, match="the context of question 2 is empty"):
        trained.predict(["w10", "w11"], [context, " "])


@pytest.fixture
def storyteller(world: World) -> RunResult:
    return run(world.config({**BACKPROP, "train.optimizer.lr": 0.05}, language_model=True))


def test_answers_are_asked_for_with_the_trainings_tokens(world: World, storyteller: RunResult) -> None:
    """What generation hands the model before its answer is what the training's example has before its labels."""
    trained = storyteller.load()
    row = read_jsonl(world.root / "instructions.jsonl")[0]
    session = Session.open(storyteller.record.config)
    examples = [one for client in session.data.clients.values() for one in (*client.train, *client.test)]
    asked = trained.template.prompt_ids([{"role": "user", "content": row["instruction"]}])
    assert any(
        list(one.input_ids[: len(asked)]) == asked and one.labels[len(asked) - 1] == -100 < one.labels[len(asked)]
        for one in examples
    )


def test_generation_is_greedy_and_seeded(storyteller: RunResult) -> None:
    trained = storyteller.load()
    prompts = ["w3 w4", "w5"]
    short = Sampling(max_new_tokens=6)
    assert trained.generate(prompts, sampling=short) == [trained.generate([p], sampling=short)[0] for p in prompts]
    state = torch.random.get_rng_state()
    drawn = [trained.generate(prompts, sampling=Sampling(6, temperature=5.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(DataError, match="but the model has positions for 64; shorten it"):
        trained.generate(["w5 " * 80])
    with pytest.raises(ConfigError, match=r"temperature: must be 0 .* but is -1"):
        Sampling(temperature=-1)
    with pytest.raises(ConfigError, match="writes texts and has no classes"):
        trained.predict(["w4"])


def test_a_chat_remembers_until_there_is_no_more_room(storyteller: RunResult) -> None:
    chat = storyteller.load().chat(system="w7", sampling=Sampling(max_new_tokens=4))
    for _ in range(6):
        chat.say("w3 w4 w5")
    assert chat.messages[0] == {"role": "system", "content": "w7"}
    assert 1 <= len(chat.messages) < 13
    remembered = chat.messages
    with pytest.raises(DataError, match="shorten it"):
        chat.say("w5 " * 80)
    assert chat.messages == remembered, "a refused question is forgotten, and nothing else is"
    chat.forget()
    assert len(chat.messages) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [method for method in PARTS if method not in OWN_FOLDERS])
def test_a_merged_model_needs_nothing_else(world: World, tmp_path: Path, method: str, dtype: str) -> None:
    result = run(world.config({**BACKPROP, **part(method), "fwdllm.base.compute_dtype": dtype}))
    merged = merge(result, tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    assert model.dtype == torch.float32
    tokens = AutoTokenizer.from_pretrained(merged)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = torch.softmax(model(**tokens).logits, -1)
    ours = [list(one.probabilities.values()) for one in result.load().predict(SENTENCES)]
    torch.testing.assert_close(theirs, torch.tensor(ours), atol=1e-5 if dtype == "float32" else 2e-2, rtol=0)
    assert [one.label for one in load(merged).predict(SENTENCES)] == [
        model.config.id2label[int(index)] for index in theirs.argmax(-1)
    ]


def test_what_cannot_be_merged_is_refused(world: World, tmp_path: Path) -> None:
    result = run(world.config({**BACKPROP, **part("bottleneck")}))
    with pytest.raises(ConfigError, match="a bottleneck is not linear"):
        merge(result, tmp_path / "merged")
    with pytest.raises(ConfigError, match="exists already"):
        merge(result, tmp_path)
    with pytest.raises(ConfigError, match="must be one of float32"):
        merge(result, tmp_path / "merged", "int8")


def test_a_moved_adapter_still_predicts(world: World, tmp_path: Path) -> None:
    result = run(world.config(BACKPROP))
    before = result.load().predict(SENTENCES)
    shutil.move(result.trained, tmp_path / "elsewhere")
    shutil.rmtree(result.folder)
    assert load(tmp_path / "elsewhere").predict(SENTENCES) == before


def spoil(folder: Path, change: Any) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_run_ends_with_an_error_if_what_it_saved_is_something_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Session.save

    def save_rounded(self: Session, *arguments: Any, **options: Any) -> Path:
        saved = real(self, *arguments, **options)
        spoil(saved, lambda tensors: [tensor.mul_(1.01) for tensor in tensors.values()])
        return saved

    monkeypatch.setattr(Session, "save", save_rounded)
    with pytest.raises(ModelError, match=r"loaded again it gives the loss .* what is saved is not what was trained"):
        run_folder(world.config(BACKPROP))
    assert run_folder(world.config({**BACKPROP, "fwdllm.check_saved": False})).is_dir()
    no_test = {"data.splits": [1.0, 0.0, 0.0]}
    with pytest.raises(ModelError, match="what is saved is not what was trained"):
        run_folder(world.config({**BACKPROP, **no_test}))


def test_a_tokenizer_that_splits_otherwise_is_noticed(world: World) -> None:
    config = world.config(BACKPROP)
    result = run(config)
    file = result.trained / "tokenizer.json"
    tree = json.loads(file.read_text())
    words = tree["model"]["vocab"]
    words["w4"], words["w5"] = words["w5"], words["w4"]
    for index in range(10, 90, 2):
        first, second = f"w{index}", f"w{index + 1}"
        words[first], words[second] = words[second], words[first]
    file.write_text(json.dumps(tree))
    session = Session.open(config)
    with pytest.raises(ModelError, match="the saved tokenizer splits"):
        check_saved(session, result.trained, session.parts.trainables, print)


class TestCommands:
    def test_predict(self, world: World, tmp_path: Path) -> None:
        result = run(world.config(BACKPROP))
        expected = result.load().predict(SENTENCES)
        shown = call("predict", result.folder, "--text", SENTENCES[0], "--text", SENTENCES[1])
        assert expected[0].label in shown and all(len(line) <= 80 for line in shown.splitlines())
        world.write_rows("new.jsonl", [{"text": text, "note": 'a "b", c'} for text in SENTENCES])
        lines = [
            json.loads(line)
            for line in call("predict", result.folder, "--file", world.root / "new.jsonl").split("\n")[:-1]
        ]
        assert [line["prediction"] for line in lines] == [one.label for one in expected]
        assert lines[0]["probabilities"] == pytest.approx(expected[0].probabilities)
        out = tmp_path / "out.csv"
        call("predict", result.folder, "--file", world.root / "new.jsonl", "--out", out)
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["prediction"] for row in rows] == [one.label for one in expected]
        assert rows[0]["note"] == 'a "b", c' and math.isclose(
            float(rows[0][f"probability of {CLASSES[0]}"]), expected[0].probabilities[CLASSES[0]]
        )
        world.write_rows("strange.jsonl", [{"body": "w4"}])
        message = refused("predict", result.folder, "--file", world.root / "strange.jsonl")
        assert "row 1: has no field 'text'" in message and "it has 'body'" in message and "label" not in message
        assert "either --text TEXT" in refused("predict", result.folder)
        assert "must end in .csv, .jsonl, .json" in refused("predict", result.folder, "--text", "a", "--out", "x.txt")
        assert "does not exist" in refused("predict", result.folder, "--text", "a", "--out", tmp_path / "no/x.csv")
        assert "there is no such folder" in refused("predict", tmp_path / "nowhere", "--text", "a")
        assert "cannot be put there" in refused("predict", result.folder, "--text", "a", "--device", "tpu9")

    def test_evaluate(self, world: World, tmp_path: Path) -> None:
        result = run(world.config(BACKPROP))
        assert f"{result.metrics['loss']:.4f}" in call("evaluate", result.folder)
        shown = call("evaluate", result.folder, "--split", "train", "--metric", "per_class")
        assert all(name in shown for name in CLASSES)
        assert "has no sample in this run; test and train has some" in refused(
            "evaluate", result.folder, "--split", "val"
        )
        assert "did you mean 'test'" in refused("evaluate", result.folder, "--split", "tset")
        world.write_rows("other.jsonl", [{"text": "w4", "label": "planet"}])
        assert "'planet' is none of the 3 classes" in refused(
            "evaluate", result.folder, "--file", world.root / "other.jsonl"
        )
        start = read_jsonl(result.files.metrics_path)[0]["eval"]["loss"]
        assert f"{start:.4f}" in call("evaluate", "--cfg", result.files.config_path)
        assert "either RUN or --cfg" in refused("evaluate")

    def test_generate_and_chat(self, world: World, storyteller: RunResult) -> None:
        (expected,) = storyteller.load().generate(["w3 w4"], sampling=Sampling(max_new_tokens=5))
        short = ("--max-new-tokens", 5)
        assert call("generate", storyteller.folder, "--prompt", "w3 w4", *short).strip() == expected
        rows = [{"instruction": "w3 w4"}, {"messages": [{"role": "user", "content": "w3 w4"}]}, {"prompt": "w3 w4"}]
        world.write_rows("ask.jsonl", rows)
        written = [
            json.loads(line)
            for line in call("generate", storyteller.folder, "--file", world.root / "ask.jsonl", *short).split("\n")[
                :-1
            ]
        ]
        assert [line["generated"] for line in written] == [expected] * 3
        world.write_rows("strange.jsonl", [{"text": "w3"}])
        assert "row 1: has nothing to answer" in refused(
            "generate", storyteller.folder, "--file", world.root / "strange.jsonl"
        )
        talk = CliRunner().invoke(
            app, ["chat", str(storyteller.folder), "--max-new-tokens", "5"], input="w3 w4\n/reset\nw3 w4\n"
        )
        assert talk.stdout.split("\n")[:-1] == [expected, expected]

    def test_merge(self, storyteller: RunResult, tmp_path: Path) -> None:
        call("merge", storyteller.folder, tmp_path / "merged", "--dtype", "bfloat16")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert model.dtype == torch.bfloat16 and model.config.use_cache
