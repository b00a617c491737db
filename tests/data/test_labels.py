"""Labels as people leave them: empty, spelt in two ways, too rare for a split, or numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, pipeline

from fs_fwdllm import load, merge
from fs_fwdllm.config import parse_config
from fs_fwdllm.data import collate, load_federated_data
from fs_fwdllm.data.splitters import divide_stratified
from fs_fwdllm.data.summary import data_remarks
from fs_fwdllm.data.types import rows_fingerprint
from fs_fwdllm.errors import ConfigError, DataError
from fs_fwdllm.evaluation.metrics import of_numbers
from fs_fwdllm.forecast.plan import make_plan
from fs_fwdllm.running import local
from tests.model.tiny import save_tiny_model

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def rows(*labels):
    return [{"text": WORDS[number % 10], "label": label} for number, label in enumerate(labels)]


def labels_of(data):
    held = [*(example for client in data.clients.values() for example in client.train), *data.test, *data.val]
    return sorted(data.label_names[int(example.labels)] for example in held)


@pytest.mark.parametrize("empty", ["", "  ", None, math.nan])
def test_empty_labels_are_counted_and_refused_with_the_way_out(write, configure, tokenizer, empty) -> None:
    write("x.jsonl", rows("red", empty, "green", "red", empty))
    with pytest.raises(DataError) as refused:
        load_federated_data(configure("x.jsonl@text"), tokenizer)
    for part in ("x.jsonl, row 2: field 'label' is empty", "2 of 5 rows (2, 5)", "fwdllm.data.drop_empty_labels: true"):
        assert part in str(refused.value)


def test_empty_labels_are_left_out_on_request_and_it_is_said(write, configure, tokenizer) -> None:
    write("x.jsonl", rows("red", "", "green", "red", None))
    write("test.jsonl", rows("red", ""))
    settings = {"fwdllm.data.drop_empty_labels": True, "fwdllm.data.test_file": "test.jsonl"}
    data = load_federated_data(configure("x.jsonl@text", settings), tokenizer)
    assert labels_of(data) == ["green", "red", "red", "red"]
    said = "\n".join(data_remarks(data))
    assert "x.jsonl: 2 of 5 rows are left out: their field 'label' is empty" in said and "test.jsonl: 1 of 2" in said


def test_a_field_that_no_row_has_is_not_called_empty(write, configure, tokenizer) -> None:
    write("x.jsonl", rows("red", "green"))
    settings = {"fwdllm.data.drop_empty_labels": True, "fwdllm.data.label": "lable"}
    with pytest.raises(DataError, match=r"has no field 'lable' \(named by fwdllm\.data\.label\).*did you mean 'label'"):
        load_federated_data(configure("x.jsonl@text", settings), tokenizer)


def test_only_empty_labels_are_refused_also_on_request(write, configure, tokenizer) -> None:
    write("x.jsonl", rows("", " "))
    with pytest.raises(DataError, match="2 of 2 rows"):
        load_federated_data(configure("x.jsonl@text", {"fwdllm.data.drop_empty_labels": True}), tokenizer)


SPELT = rows(*["billing"] * 4, "Billing", "billing ", "bill  ing", "Bill Ing", "\uff32efund", "refund")


def test_spellings_of_one_class_are_named_with_their_rows(write, configure, tokenizer) -> None:
    write("x.jsonl", SPELT)
    data = load_federated_data(configure("x.jsonl@text"), tokenizer)
    said = "\n".join(data_remarks(data))
    assert "differ only by case or white space" in said and "'Billing' (1 rows) and 'billing' (5 rows)" in said
    assert "'Bill Ing' (1 rows) and 'bill  ing' (1 rows)" in said and "fwdllm.data.merge_labels: true" in said
    assert len(data.label_names) == 6


def test_spellings_are_merged_on_request(write, configure, tokenizer) -> None:
    write("x.jsonl", SPELT)
    write("test.jsonl", rows("BILLING", "refund"))
    settings = {"fwdllm.data.merge_labels": True, "fwdllm.data.test_file": "test.jsonl"}
    data = load_federated_data(configure("x.jsonl@text", settings), tokenizer)
    assert data.label_names == ["Bill Ing", "billing", "refund"] or data.label_names == [
        "bill  ing",
        "billing",
        "refund",
    ]
    assert labels_of(data).count("billing") == 7
    listed = {**settings, "fwdllm.data.labels": ["BILLING", "Refund", "bill ing"]}
    data = load_federated_data(configure("x.jsonl@text", listed), tokenizer)
    assert data.label_names == ["BILLING", "Refund", "bill ing"] and labels_of(data).count("BILLING") == 7


def test_classes_and_clients_are_counted(write, configure, tokenizer) -> None:
    write("x.jsonl", rows(*["red"] * 30, *["green"] * 9, "blue"))
    settings = {"data.splits": [0.8, 0.0, 0.2]}
    said = "\n".join(data_remarks(load_federated_data(configure("x.jsonl@text", settings), tokenizer)))
    assert "3 classes (training/test rows): blue 1/0" in said and "training rows of a client: 10 to 11" in said
    assert "warning: classes without a test row: blue (1 in the other split)" in said and "fwdllm.data.stratify" in said


def test_every_class_is_in_every_split_on_request(write, configure, tokenizer) -> None:
    write("x.jsonl", rows(*["red"] * 60, *["green"] * 20, *["blue"] * 7, *["black"] * 3, "white"))
    settings = {"data.splits": [0.8, 0.1, 0.1], "fwdllm.data.stratify": True, "federate.client_num": 4}
    data = load_federated_data(configure("x.jsonl@text", settings), tokenizer)
    counts = {
        name: sum(int(example.labels) == index for example in data.test) for index, name in enumerate(data.label_names)
    }
    assert counts == {"red": 6, "green": 2, "blue": 1, "black": 1, "white": 0}
    assert len(labels_of(data)) == 91
    assert "classes without a test row: white" in "\n".join(data_remarks(data))


def test_stratified_shares_are_met_and_nothing_is_lost() -> None:
    rng = np.random.default_rng(5)
    for seed in range(20):
        classes = rng.integers(0, 5, size=int(rng.integers(5, 200)))
        parts = np.array_split(rng.permutation(len(classes)), 7)
        divided = divide_stratified(parts, classes, (0.7, 0.1, 0.2), seed)
        for part, splits in zip(parts, divided, strict=True):
            assert sorted(np.concatenate(splits).tolist()) == sorted(part.tolist())
        for code in np.unique(classes):
            size = int((classes == code).sum())
            for split, share in enumerate((0.7, 0.1, 0.2)):
                held = sum(int((classes[client[split]] == code).sum()) for client in divided)
                assert abs(held - share * size) <= 1.5
                assert held >= 1 or size < 3


def test_only_classes_can_be_stratified(write, configure, tokenizer) -> None:
    write("x.jsonl", [{"prompt": "one", "completion": "two"}] * 4)
    with pytest.raises(ConfigError, match=r"fwdllm\.data\.stratify: needs classes"):
        load_federated_data(configure("x.jsonl@llm", {"fwdllm.data.stratify": True}), tokenizer)


# Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"fwdllm.data.regression": True}, {"model.num_labels": 1}])
def test_numbers_stay_numbers(write, configure, tokenizer, settings) -> None:
    write("x.csv", "text,label\none,0.5\ntwo,-3\nthree,1e2\nfour,-100\n")
    data = load_federated_data(configure("x.csv@text", {"data.splits": [1.0, 0.0, 0.0], **settings}), tokenizer)
    held = [example for client in data.clients.values() for example in client.train]
    assert data.task == "regression" and data.label_names == []
    assert sorted(float(example.labels) for example in held) == [-100.0, -3.0, 0.5, 100.0]
    assert "labels from -100 to 100, mean -0.625" in data_remarks(data)
    batch = collate(held, 0)
    assert batch.labels.dtype == np.float32 and batch.labels.shape == (4,)
    assert rows_fingerprint([held]) != rows_fingerprint(
        [[*held[:-1], type(held[0])(held[-1].input_ids, held[-1].labels + 0.25)]]
    )


@pytest.mark.parametrize("label", ["high", "nan", "inf", "1,5"])
def test_what_is_no_number_is_refused_by_row(write, configure, tokenizer, label) -> None:
    write("x.jsonl", rows("1", "2", label))
    with pytest.raises(DataError, match=rf"x\.jsonl, row 3: the label '{label}' is no number"):
        load_federated_data(configure("x.jsonl@text", {"fwdllm.data.regression": True}), tokenizer)


def test_numbers_that_are_taken_for_classes_are_noticed(write, configure, tokenizer) -> None:
    write("x.jsonl", rows(*[f"{number / 7:.3f}" for number in range(40)]))
    said = "\n".join(data_remarks(load_federated_data(configure("x.jsonl@text"), tokenizer)))
    assert "look like numbers" in said and "fwdllm.data.regression: true" in said


def test_metrics_of_numbers_by_hand() -> None:
    actual, predicted = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 8.0])
    found = of_numbers(predicted, actual)
    assert found["mse"] == pytest.approx(4.0) and found["mae"] == pytest.approx(1.0)
    assert found["spearman"] == pytest.approx(1.0) and found["pearson"] == pytest.approx(
        np.corrcoef(actual, predicted)[0, 1]
    )
    assert found["r2"] == pytest.approx(1 - 4 / 1.25)
    constant = of_numbers(np.ones(4), actual)
    assert math.isnan(constant["pearson"]) and constant["mse"] == pytest.approx(3.5)


@pytest.fixture(scope="module", params=["fedfwd", "fedavg"])
def regression_run(request, tmp_path_factory):
    """The folder of a run that learns numbers."""
    folder = tmp_path_factory.mktemp("numbers")
    save_tiny_model(folder / "model", "bert")
    lines = [
        {"text": " ".join(f"w{3 + (number * step) % 90}" for step in range(1, 6)), "label": number % 5}
        for number in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = parse_config(
        {
            "outdir": str(folder / "runs"),
            "expname": "numbers",
            "federate": {"method": request.param, "client_num": 2, "total_round_num": 3},
            "data": {"root": str(folder), "type": "rows.jsonl@text", "splits": [0.8, 0.0, 0.2]},
            "model": {"type": f"{folder / 'model'}@transformers", "task": "SequenceClassification", "num_labels": 1},
            "llm": {"tok_len": 16, "adapter": {"use": True, "args": [{"adapter_method": "head"}]}},
            "train": {"optimizer": {"lr": 0.05}},
            "dataloader": {"batch_size": 8},
        }
    )
    assert make_plan(config).rows()
    local.run(config)
    return folder / "runs/numbers"


def test_a_run_learns_numbers_and_saves_a_regression(regression_run) -> None:
    record = [json.loads(line) for line in (regression_run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line["eval"] for line in record if line.get("eval")]
    assert set(evaluations[-1]) == {"loss", "mse", "mae", "pearson", "spearman"}
    assert evaluations[-1]["loss"] == pytest.approx(evaluations[-1]["mse"], rel=1e-4)
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    saved = AutoModelForSequenceClassification.from_pretrained(regression_run / "adapter")
    assert saved.config.problem_type == "regression" and saved.config.num_labels == 1


def test_a_saved_regression_predicts_numbers(regression_run, tmp_path) -> None:
    trained = load(regression_run)
    (one, two) = trained.predict(["w4 w5 w6", "w80 w81"])
    assert one.probabilities == {} and float(one.label) != float(two.label)
    folder = merge(regression_run, tmp_path / "merged")
    pipe = pipeline("text-classification", model=str(folder))
    assert pipe("w4 w5 w6", function_to_apply="none")[0]["score"] == pytest.approx(float(one.label), rel=1e-4)


def test_empty_texts_are_counted(write, configure, tokenizer) -> None:
    write("x.jsonl", [*rows("red", "green"), {"text": " ", "label": "red"}])
    assert "1 of 3 rows have an empty text" in "\n".join(
        data_remarks(load_federated_data(configure("x.jsonl@text"), tokenizer))
    )
