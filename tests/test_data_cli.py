"""The command ``data``: files are built, dealt and shown, a run trains on them, and mistakes are one message."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from fs_fwdllm.cli.main import app
from tests.host.fixtures import models, world
from tests.host.small import read_jsonl

pytest.importorskip("h5py", reason="the extra 'data' is not installed")

__all__ = ["models", "world"]


@pytest.fixture
def call(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def invoke(*arguments, code=0):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == code, (done.output, done.exception)
        return done

    return invoke


def test_build_partition_show_run(call, world):
    world.texts()
    data, parts = world.root / "toy_data.h5", world.root / "toy_partition.h5"
    built = call("data", "build", "table", data, "--train", world.root / "texts.jsonl", "--test-share", 0.25)
    assert "36 training and 12 test rows, 3 classes: animal, plant, stone" in built.output
    for options in (["uniform"], ["niid_label", "--alpha", 0.1], ["niid_quantity", "--beta", 1]):
        call("data", "partition", data, parts, "--method", options[0], "--clients", 4, *options[1:])
    shown = call("data", "show", data, parts).output
    for name in ("uniform_client_4", "niid_label_clients=4_alpha=0.1", "niid_quantity_clients=4_beta=1.0", "9 / 9 / 9"):
        assert name in shown
    settings = {
        "data.type": "toy_data.h5@text",
        "fwdllm.data.partition": "toy_partition.h5",
        "fwdllm.data.partition_method": "niid_label_clients=4_alpha=0.1",
        "federate.method": "fedfwd",
        "federate.client_num": 0,
        "federate.total_round_num": 2,
        "eval.metrics": ["per_class"],
    }
    cfg = world.root / "run.yaml"
    cfg.write_text(yaml.safe_dump(world.tree(settings)), encoding="utf-8")
    call("run", "--cfg", cfg)
    (run,) = (world.root / "runs").iterdir()
    last = [line for line in read_jsonl(run / "metrics.jsonl") if line.get("eval")][-1]["eval"]
    assert last["per_class"]["labels"] == ["animal", "plant", "stone"]
    assert sum(map(sum, last["per_class"]["confusion"])) == 12


def test_owners_are_written_and_dealt(call, world):
    rows = [{"text": f"w{n % 20 + 3}", "label": "ab"[n % 2], "who": f"p{n % 3}"} for n in range(24)]
    world.write_rows("own.jsonl", rows)
    data, parts = world.root / "o.h5", world.root / "p.h5"
    call("data", "build", "table", data, "--train", world.root / "own.jsonl", "--natural", "who")
    assert "natural, 3 clients" in call("data", "partition", data, parts, "--method", "natural").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "agnew", "x.h5", "--train", "x.csv"], "did you mean 'agnews'"),
        (["build", "agnews", "x.h5", "--train", "absent.csv"], "absent.csv"),
        (["build", "table", "x.h5", "--train", "TEXTS", "--label", "labl"], "did you mean 'label'"),
        (["build", "table", "x.h5", "--train", "TEXTS", "--labels", "animal,plant"], "'stone' is none of the 2"),
        (["build", "table", "x.h5", "--train", "TEXTS", "--test-share", "1"], "--test-share 1.0"),
        (["partition", "TOY", "p.h5", "--method", "unifrm"], "did you mean 'uniform'"),
        (["partition", "TOY", "p.h5", "--clients", "99"], "allowed are 1 to 43"),
        (["partition", "TOY", "p.h5", "--method", "niid_label", "--alpha", "0"], "must be above 0"),
        (["partition", "TOY", "p.h5", "--method", "natural"], "has no field 'owner'"),
        (["partition", "nowhere.h5", "p.h5"], "does not exist"),
        (["show", "TOY", "nowhere.h5"], "does not exist"),
        (["show", "TOY", "TOY", "--method", "uniform"], "partition_method: 'uniform' is not in"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(call, world, monkeypatch, arguments, message):
    monkeypatch.chdir(world.root)
    world.texts()
    call("data", "build", "table", "toy.h5", "--train", "texts.jsonl")
    before = sorted(path.name for path in world.root.iterdir())
    names = {"TEXTS": "texts.jsonl", "TOY": "toy.h5"}
    done = call("data", *(names.get(argument, argument) for argument in arguments), code=2)
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert sorted(path.name for path in world.root.iterdir()) == before


def test_squad_for_every_method_and_the_generative_form(call, world):
    """Articles as clients, two of them held out; the same run for forward gradients, FedAvg, FedSGD, centralised."""
    context = " ".join(f"w{n}" for n in range(3, 60))
    articles = [
        {
            "title": f"t{number}",
            "paragraphs": [{"context": context, "qas": [
                {"id": f"{number}-{n}", "question": f"w{70 + n}",
                 "answers": [{"text": f"w{10 + 5 * n}", "answer_start": context.index(f"w{10 + 5 * n}")}]}
                for n in range(4)]}],
        }
        for number in range(6)
    ]  # fmt: skip
    (world.root / "s.json").write_text(json.dumps({"data": articles}), encoding="utf-8")
    common = {
        "federate.client_num": 0, "federate.total_round_num": 2, "data.splitter": "natural", "data.splits": [1.0, 0, 0],
        "fwdllm.data.natural": "title", "fwdllm.data.held_out_clients": 0.3, "fwdllm.data.stride": 4,
    }  # fmt: skip
    encoder = {"data.type": "s.json@qa", "model.task": "QuestionAnswering", "llm.tok_len": 32}
    decoder = {
        "data.type": "s.json@llm",
        "llm.tok_len": 100,
        "model.type": f"{world.model('llama', max_position_embeddings=128)}@huggingface_llm",
        "model.task": "",
        "eval.metrics": ["f1", "exact_match"],
    }
    cases = [
        ("fedfwd", encoder), ("FedAvg", encoder), ("FedSGD", encoder), ("fedfwd", decoder),
        ("FedAvg", {**encoder, "fwdllm.data.centralised": True}),
    ]  # fmt: skip
    for number, (method, settings) in enumerate(cases):
        tree = world.tree({**common, **settings, "federate.method": method, "expname": f"s{number}"})
        cfg = world.root / f"s{number}.yaml"
        cfg.write_text(yaml.safe_dump(tree), encoding="utf-8")
        call("run", "--cfg", cfg)
        lines = read_jsonl(world.root / "runs" / f"s{number}" / "metrics.jsonl")
        evaluated = [line["eval"] for line in lines if line.get("eval")][-1]
        assert 0 <= evaluated["exact_match"] <= evaluated["f1"] <= 1 and evaluated["loss"] > 0
        call("plan", "--cfg", cfg)


@pytest.mark.parametrize("method", ["fedfwd", "FedAvg", "FedSGD"])
def test_a_decoder_classifies_by_label_words(call, world, method):
    tree = world.tree(
        {
            "model.type": f"{world.model('llama')}@huggingface_llm",
            "model.task": "",
            "llm.tok_len": 24,
            "federate.method": method,
            "federate.total_round_num": 2,
            "fwdllm.data.prompt": "{text} w90",
            "fwdllm.data.label_words": ["w91", "w92", "w93"],
            "fwdllm.first_evaluation": "always",
        }
    )
    cfg = world.root / "l.yaml"
    cfg.write_text(yaml.safe_dump(tree), encoding="utf-8")
    call("run", "--cfg", cfg)
    (run,) = (world.root / "runs").iterdir()
    first, last = [line["eval"] for line in read_jsonl(run / "metrics.jsonl") if line.get("eval")][::2]
    assert set(last) == {"loss", "accuracy", "majority_accuracy", "macro_f1", "majority_macro_f1", "mcc"}
    assert last["loss"] != first["loss"]


def test_data_for_another_kind_of_model_is_refused(call, world):
    cfg = world.root / "bad.yaml"
    cfg.write_text(yaml.safe_dump(world.tree({"model.task": "QuestionAnswering"})), encoding="utf-8")
    assert "that model needs data of the form NAME@qa" in call("run", "--cfg", cfg, code=2).stderr


# Files of rows -------------------------------------------------------------------------------------------------------


def messy(world):
    """Tickets as people export them: a semicolon, empty labels, two spellings, a rare class, repeated rows."""
    labels = ["stone"] * 12 + ["plant"] * 9 + ["Plant"] * 2 + ["animal"] * 3 + [""] * 4
    lines = [f'"w{5 + number % 26} w{4 + number % 13}; w9";{label}' for number, label in enumerate(labels)]
    (world.root / "mess.csv").write_text("\n".join(["message;team", *lines]) + "\n", encoding="utf-8-sig")
    return world.root / "mess.csv"


def test_a_file_of_texts_is_shown(call, world):
    shown = call("data", "show", messy(world), "--text", "message", "--label", "team").output
    for part in (
        "30 rows, texts (message) with labels (team)", "fields: message, team", "4 classes", "12", "40.0%",
        "'Plant' (2) and 'plant' (9) differ only by case or white space", "fwdllm.data.merge_labels: true",
        "4 rows have an empty label", ": 27, 28, 29, 30", "fwdllm.data.drop_empty_labels: true",
        "4 rows repeat another but for case, punctuation and white space: rows 1 = 27; 2 = 28", "characters",
    ):  # fmt: skip
        assert part in shown, part
    assert "tokens" not in shown


def test_with_a_tokenizer_tokens_are_counted(call, world):
    options = ["--text", "message", "--label", "team", "--tokenizer", world.model("bert"), "--tok-len", 2]
    shown = call("data", "show", messy(world), *options).output
    assert "tokens" in shown and "llm.tok_len 2: 30 of 30 rows are longer and are cut" in shown


def test_with_a_configuration_clients_are_shown_as_a_run_would_have_them(call, world):
    messy(world)
    settings = {
        "data.type": "mess.csv@text", "fwdllm.data.text": "message", "fwdllm.data.label": "team",
        "fwdllm.data.drop_empty_labels": True, "fwdllm.data.merge_labels": True, "fwdllm.data.stratify": True,
        "data.splits": [0.6, 0.2, 0.2], "federate.client_num": 3, "federate.total_round_num": 1,
    }  # fmt: skip
    cfg = world.root / "show.yaml"
    cfg.write_text(yaml.safe_dump(world.tree(settings)), encoding="utf-8")
    shown = call("data", "show", "--cfg", cfg).output
    said = [
        "4 of 30 rows are left out: their field 'team' is empty", "'Plant' (2 rows) and 'plant' (9 rows)",
        "3 classes (training/test rows): animal 1/1, plant 7/2, stone 8/2", "training rows of a client",
    ]  # fmt: skip
    assert "server" in shown and all(part in shown for part in said)
    for command in ("plan", "run"):
        output = call(command, "--cfg", cfg).output
        assert all(part in output for part in said), command
    assert call("data", "show", messy(world), "--cfg", cfg).output == shown.replace(
        str(world.root / "mess.csv"), str(messy(world))
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "w3", "output": "w4"}, "instructions (alpaca)"),
        (
            {"messages": [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]},
            "conversations (messages)",
        ),
        (
            {"conversations": [{"from": "human", "value": "w3"}, {"from": "gpt", "value": "w4"}]},
            "conversations (conversations)",
        ),
        ({"prompt": "w3 ", "completion": "w4"}, "completions (prompt and completion)"),
        ({"question": "w3", "answer": "w4"}, "instructions (gsm8k)"),
    ],
)
def test_formats_are_recognised_and_measured(call, world, row, expected):
    world.write_rows("rows.jsonl", [row, {**row}])
    shown = call("data", "show", world.root / "rows.jsonl", "--tokenizer", world.model("llama"), "--tok-len", 3).output
    assert expected in shown and "before the answer" in shown and "FILE@llm" in shown
    assert "1 rows repeat another" in shown and "2 rows are longer" in shown.replace("2 of 2 rows", "2 rows")


def test_tables_fit_the_usual_terminal(call, world, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = [{"text": f"w{n}", "label": f"a class whose name goes on and on and on {n} " * 4} for n in range(3)]
    world.write_rows("long.jsonl", rows)
    table = [
        line for line in call("data", "show", world.root / "long.jsonl").output.splitlines() if not line.startswith("/")
    ]
    assert max(map(len, table)) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a file, or a configuration with --cfg FILE"),
        (["nowhere.csv"], "does not exist"),
        (["x.parquet"], "pandas.read_parquet"),
        (["texts.jsonl", "p.h5"], "partitions are shown for .h5 files"),
        (["texts.jsonl", "--label", "labl"], "there is no 'labl'; did you mean 'label'"),
    ],
)
def test_what_cannot_be_shown_is_one_message(call, world, monkeypatch, arguments, message):
    monkeypatch.chdir(world.root)
    world.texts()
    done = call("data", "show", *arguments, code=2)
    assert done.stderr.startswith("error: ") and message in done.stderr


def test_labels_that_are_numbers_are_shown_as_numbers(call, world):
    world.write_rows("numbers.jsonl", [{"text": f"w{n % 9 + 3}", "label": n / 8} for n in range(40)])
    shown = call("data", "show", world.root / "numbers.jsonl").output
    assert "numbers" in shown and "4.875" in shown and "classes" not in shown
