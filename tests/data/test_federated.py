"""From a configuration to clients: everything arrives once, in the right place; what does not fit is refused."""

from __future__ import annotations

import logging

import pytest

from fs_fwdllm.data import FederatedData, client_batches, load_federated_data
from fs_fwdllm.errors import ConfigError, DataError

COLOURS = ["red", "green", "blue"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def rows(count: int) -> list[dict]:
    """Row ``i`` is told by its text of four digits-in-words, which no two rows share."""
    return [
        {
            "text": " ".join(NUMBERS[int(digit)] for digit in f"{number:04d}"),
            "label": COLOURS[number % 3],
            "owner": number % 7,
        }
        for number in range(count)
    ]


def instructions(count: int, **fields) -> list[dict]:
    return [{"instruction": row["text"], "output": row["label"], **fields} for row in rows(count)]


def fingerprint(data: FederatedData) -> list:
    return [
        (number, [[(e.input_ids.tolist(), e.labels.tolist()) for e in split] for split in (c.train, c.val, c.test)])
        for number, c in data.clients.items()
    ]


def texts(examples) -> list[tuple[int, ...]]:
    return [tuple(example.input_ids.tolist()) for example in examples]


@pytest.mark.parametrize("splitter", ["", "iid", "lda", "meta", "natural", "LDA"])
def test_every_row_arrives_once(write, configure, tokenizer, splitter) -> None:
    write("x.jsonl", rows(200))
    settings = {"data.splitter": splitter, "fwdllm.data.natural": "owner", "federate.client_num": 5}
    data = load_federated_data(configure("x.jsonl@text", settings), tokenizer)
    assert data.task == "classification" and data.label_names == sorted(COLOURS)
    assert list(data.clients) == [1, 2, 3, 4, 5]
    everything = [text for c in data.clients.values() for text in texts(c.train + c.val + c.test)]
    assert len(everything) == len(set(everything)) == 200
    assert texts(data.test) == [text for c in data.clients.values() for text in texts(c.test)]
    assert texts(data.val) == [text for c in data.clients.values() for text in texts(c.val)]
    assert len(data.val) == len(data.test) == 20


def test_labels_stay_with_their_texts(write, configure, tokenizer) -> None:
    write("x.jsonl", rows(60))
    data = load_federated_data(configure("x.jsonl@text", {"data.splitter": "lda"}), tokenizer)
    expected = {tuple(tokenizer(row["text"])["input_ids"]): row["label"] for row in rows(60)}
    for client in data.clients.values():
        for example in client.train + client.val + client.test:
            assert data.label_names[int(example.labels)] == expected[tuple(example.input_ids.tolist())]


def test_it_is_a_function_of_the_seed(write, configure, tokenizer) -> None:
    write("x.jsonl", rows(80))
    settings = {"data.splitter": "lda", "data.subsample": 0.9}
    first, again = (load_federated_data(configure("x.jsonl@text", settings), tokenizer) for _ in range(2))
    other = load_federated_data(configure("x.jsonl@text", {**settings, "seed": 1}), tokenizer)
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)


def test_a_client_is_tested_on_the_categories_it_trains_on(write, configure, tokenizer) -> None:
    write("x.jsonl", rows(300))
    data = load_federated_data(configure("x.jsonl@text", {"data.splitter": "meta"}), tokenizer)
    for client in data.clients.values():
        classes = [{int(example.labels) for example in split} for split in (client.train, client.val, client.test)]
        assert len(classes[0]) == 1 and classes[0] == classes[1] == classes[2]


def test_natural_takes_the_number_of_clients_from_the_data(write, configure, tokenizer) -> None:
    write("x.jsonl", rows(70))
    settings = {"data.splitter": "natural", "fwdllm.data.natural": "owner", "federate.client_num": 0}
    data = load_federated_data(configure("x.jsonl@text", settings), tokenizer)
    assert list(data.clients) == list(range(1, 8))
    first = {tuple(tokenizer(row["text"])["input_ids"]) for row in rows(70) if row["owner"] == 0}
    client = data.clients[1]
    assert set(texts(client.train + client.val + client.test)) == first


def test_a_test_file_is_the_servers_test_split(write, configure, tokenizer) -> None:
    write("x.jsonl", rows(90))
    write("test.jsonl", rows(130)[90:])
    settings = {"fwdllm.data.test_file": "test.jsonl", "data.splits": [0.6, 0.2, 0.2]}
    data = load_federated_data(configure("x.jsonl@text", settings), tokenizer)
    assert texts(data.test) == [tuple(tokenizer(row["text"])["input_ids"]) for row in rows(130)[90:]]
    assert all(not client.test for client in data.clients.values())
    assert sum(len(client.train) for client in data.clients.values()) == 67 and len(data.val) == 23
    fewer = load_federated_data(configure("x.jsonl@text", {**settings, "fwdllm.data.max_test_samples": 5}), tokenizer)
    kept = [text for text in texts(data.test) if text in texts(fewer.test)]
    assert len(fewer.test) == 5 and texts(fewer.test) == kept != texts(data.test)[:5]


def test_language_model_data(write, configure, tokenizer) -> None:
    write("x.json", instructions(30))
    data = load_federated_data(configure("x.json@llm", {"llm.tok_len": 100}), tokenizer)
    assert data.task == "causal_lm" and data.label_names == []
    assert sum(len(client.train) for client in data.clients.values()) == 24
    example = data.clients[1].train[0]
    taught = [label for label in example.labels.tolist() if label != -100]
    assert tokenizer.decode(taught[:1]) in COLOURS and taught[1:] == [tokenizer.eos_token_id]


def test_subsample_keeps_a_share(write, configure, tokenizer) -> None:
    write("x.jsonl", rows(200))
    data = load_federated_data(configure("x.jsonl@text", {"data.subsample": 0.25}), tokenizer)
    assert sum(len(c.train) + len(c.val) + len(c.test) for c in data.clients.values()) == 50


def test_more_clients_than_samples_leaves_some_empty(write, configure, tokenizer, caplog) -> None:
    write("x.jsonl", rows(5))
    with caplog.at_level(logging.WARNING, "fs_fwdllm.data"):
        data = load_federated_data(configure("x.jsonl@text", {"federate.client_num": 8}), tokenizer)
    assert sorted(len(c.train) for c in data.clients.values()) == [0, 0, 0, 1, 1, 1, 1, 1]
    assert "3 of 8 clients hold no row" in caplog.text
    empty = next(number for number, client in data.clients.items() if not client.train)
    with pytest.raises(DataError, match=f"client {empty} has no training example"):
        client_batches([], client=empty, round_index=0, steps=1, batch_size=2, seed=0, pad_token_id=0)


def test_labels_may_be_named_in_an_order(write, configure, tokenizer) -> None:
    write("x.csv", "text,label\n" + "".join(f"{row['text']},{number % 3}\n" for number, row in enumerate(rows(30))))
    data = load_federated_data(configure("x.csv@text", {"fwdllm.data.labels": [2, 1, 0, 7]}), tokenizer)
    assert data.label_names == ["2", "1", "0", "7"]
    assert {int(example.labels) for client in data.clients.values() for example in client.train} == {0, 1, 2}


def test_categories_come_from_the_field_named(write, configure, tokenizer) -> None:
    write("x.json", [{**row, "kind": number % 3} for number, row in enumerate(instructions(30))])
    settings = {"data.splitter": "meta", "fwdllm.data.category": "kind", "llm.tok_len": 100}
    data = load_federated_data(configure("x.json@llm", settings), tokenizer)
    for client in data.clients.values():
        assert len({example.labels[example.labels != -100][0] for example in client.train}) == 1


def test_categories_stay_with_their_rows_when_rows_are_left_out(write, configure, tokenizer) -> None:
    usable = [{**row, "kind": number % 3} for number, row in enumerate(instructions(30))]
    too_long = [{"instruction": "one " * 200, "output": "two", "kind": number % 2} for number in range(20)]
    write("x.json", [row for pair in zip(too_long, usable[:20], strict=True) for row in pair] + usable[20:])
    settings = {"data.splitter": "meta", "fwdllm.data.category": "kind", "llm.tok_len": 100}
    data = load_federated_data(configure("x.json@llm", settings), tokenizer)
    assert sum(len(c.train) + len(c.val) + len(c.test) for c in data.clients.values()) == 30
    for client in data.clients.values():
        assert len({example.labels[example.labels != -100][0] for example in client.train}) == 1


@pytest.mark.parametrize("splitter", ["lda", "meta"])
def test_a_splitter_by_category_needs_categories(write, configure, tokenizer, splitter) -> None:
    write("x.json", instructions(10))
    remedy = r"set data\.splitter to iid, or fwdllm\.data\.category"
    with pytest.raises(DataError, match=rf"data\.splitter {splitter} .*{remedy}"):
        load_federated_data(configure("x.json@llm", {"data.splitter": splitter, "llm.tok_len": 100}), tokenizer)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data.splitter": "ldaa"}, ConfigError, r"data\.splitter: 'ldaa'.*iid, lda, meta, natural.*mean 'lda'"),
        ({"federate.client_num": 0}, ConfigError, r"federate\.client_num: 0 needs data\.splitter natural"),
        ({"data.splitter": "natural"}, ConfigError, r"fwdllm\.data\.natural"),
        ({"data.splitter_args": [{"alhpa": 1}]}, ConfigError, r"unknown argument 'alhpa'.*'alpha'"),
        ({"data.splitter_args": [{"alpha": 0}]}, ConfigError, r"alpha must be a number above 0"),
        ({"data.splitter_args": [{"alpha": float("nan")}]}, ConfigError, r"alpha must be a number above 0"),
        ({"data.splitter_args": [{"alpha": "1"}]}, ConfigError, r"alpha must be a number above 0"),
        ({"data.splits": [0.0, 0.5, 0.5]}, ConfigError, r"data\.splits"),
        ({"fwdllm.data.labels": ["red", "green"]}, DataError, r"row 3: the label 'blue' is none of the 2 classes"),
        ({"fwdllm.data.labels": ["red", "red"]}, ConfigError, r"fwdllm\.data\.labels: .* names a class twice"),
        ({"model.num_labels": 2}, DataError, r"has 3 classes .*model\.num_labels is 2"),
        ({"fwdllm.data.label": "lable"}, DataError, r"row 1: has no field 'lable' \(named by fwdllm\.data\.label\)"),
        ({"fwdllm.data.text": "txt"}, DataError, r"row 1: has no field 'txt'.*did you mean 'text'"),
        ({"fwdllm.data.natural": "who", "data.splitter": "natural"}, DataError, r"'who' \(named by fwdllm\.data\.nat"),
        ({"fwdllm.data.test_file": "tset.jsonl"}, DataError, r"tset\.jsonl: does not exist"),
        ({"fwdllm.data.test_file": "x.doc"}, ConfigError, r"x\.doc: its ending must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(write, configure, tokenizer, settings, error, message) -> None:
    write("x.jsonl", rows(12))
    with pytest.raises(error, match=message):
        load_federated_data(configure("x.jsonl@text", settings), tokenizer)


def test_a_test_label_outside_the_classes_names_the_test_file(write, configure, tokenizer) -> None:
    write("x.jsonl", rows(12))
    write("test.jsonl", [{"text": "one", "label": "pink"}])
    with pytest.raises(DataError, match=r"test\.jsonl, row 1: the label 'pink'"):
        load_federated_data(configure("x.jsonl@text", {"fwdllm.data.test_file": "test.jsonl"}), tokenizer)


def test_data_with_nothing_to_learn_is_refused(write, configure, tokenizer) -> None:
    write("x.json", instructions(4))
    with pytest.raises(DataError, match=r"none of the 4 rows has a label within llm\.tok_len 4"):
        load_federated_data(configure("x.json@llm", {"llm.tok_len": 4}), tokenizer)
    write("x.jsonl", [{"text": "one", "label": "red"}])
    with pytest.raises(DataError, match="two classes or more"):
        load_federated_data(configure("x.jsonl@text"), tokenizer)
    write("x.jsonl", [{"text": "one", "label": "red"}, {"text": "two", "label": " "}])
    with pytest.raises(DataError, match=r"row 2: field 'label' is empty"):
        load_federated_data(configure("x.jsonl@text"), tokenizer)


def test_a_published_partition_is_kept(shared_data, configure, tokenizer) -> None:
    path = shared_data("dolly/dolly_15k_shepherd10.jsonl")
    settings = {
        "data.root": str(path.parent), "data.splitter": "natural", "fwdllm.data.natural": "client",
        "federate.client_num": 0, "llm.tok_len": 4096,
    }  # fmt: skip
    data = load_federated_data(configure(f"{path.name}@llm", settings), tokenizer)
    assert len(data.clients) == 10
    assert sum(len(c.train) + len(c.val) + len(c.test) for c in data.clients.values()) > 14900
