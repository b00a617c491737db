"""h5 files: what is written is read, token for token as from the original, and what is broken is refused by name."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

h5py = pytest.importorskip("h5py", reason="the extra 'data' is not installed")

from fs_fwdllm.data import load_federated_data  # noqa: E402
from fs_fwdllm.data.h5.builders import RECIPES, build, make_partition  # noqa: E402
from fs_fwdllm.data.h5.files import read_h5_data  # noqa: E402
from fs_fwdllm.data.h5.partition_files import (  # noqa: E402
    Partition,
    partition_methods,
    read_partition,
    write_partition,
)
from fs_fwdllm.errors import ConfigError, DataError  # noqa: E402

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "red", "green", "blue"]


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"class": str(1 + row % 3), "title": "a", "description": " ".join(rng.choice(WORDS, 3 + row % 5))}
        for row in range(count)
    ]


def csv_text(records):
    return "".join(f'"{r["class"]}","{r["title"]}","{r["description"]}"\n' for r in records)


def squad_document(articles=4, questions=5, prefix=""):
    """Contexts of words with right answers at known places; every third question has two right answers."""
    data = []
    for article in range(articles):
        qas = []
        for number in range(questions):
            answers = [{"text": "three", "answer_start": 8}]
            if number % 3 == 0:
                answers.append({"text": "four five ", "answer_start": 14})  # the space is no part of the answer
            qas.append({"id": f"{prefix}{article}-{number}", "question": "add the numbers ?", "answers": answers})
        context = "one two three four five six seven eight nine ten"
        data.append({"title": f"{prefix}article {article}", "paragraphs": [{"context": context, "qas": qas}]})
    return {"version": "1.1", "data": data}


@pytest.fixture
def agnews(tmp_path, write):
    write("train.csv", csv_text(rows(40)))
    write("test.csv", csv_text(rows(12, 1)))
    build(RECIPES["agnews"], tmp_path / "a_data.h5", tmp_path / "train.csv", tmp_path / "test.csv", 0.1, 0)
    return tmp_path / "a_data.h5"


def same(one, two):
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        np.testing.assert_array_equal(left.input_ids, right.input_ids)
        np.testing.assert_array_equal(left.labels, right.labels)
        assert (left.reference and left.reference.answers) == (right.reference and right.reference.answers)


def same_data(one, two):
    assert one.label_names == two.label_names and one.task == two.task and list(one.clients) == list(two.clients)
    for client in one.clients:
        for split in ("train", "val", "test"):
            same(getattr(one.clients[client], split), getattr(two.clients[client], split))
    same(one.test, two.test)
    same(one.val, two.val)
    assert sum(len(client.train) for client in one.clients.values()) > 0 < len(one.test)


def test_the_layout_is_the_published_one(agnews):
    with h5py.File(agnews) as file:
        attributes = json.loads(file["attributes"][()])
        assert sorted(file) == ["X", "Y", "attributes"]
        assert attributes["index_list"] == list(range(52))
        assert attributes["train_index_list"] == list(range(40))
        assert attributes["test_index_list"] == list(range(40, 52))
        assert attributes["label_vocab"] == {"1": 0, "2": 1, "3": 2}
        assert (attributes["num_labels"], attributes["task_type"]) == (3, "text_classification")
        assert file["X/7"][()].decode() == rows(40)[7]["description"]
        assert file["Y/41"][()].decode() == "2"
        assert file["X/7"].shape == ()


def test_text_from_h5_is_text_from_the_original(agnews, configure, tokenizer):
    direct = configure(
        "train.csv@text",
        {
            "fwdllm.data.columns": ["class", "title", "description"],
            "fwdllm.data.text": "description",
            "fwdllm.data.label": "class",
            "fwdllm.data.test_file": "test.csv",
            "data.splits": [0.8, 0.2, 0.0],
        },
    )
    through = configure("a_data.h5@text", {"data.splits": [0.8, 0.2, 0.0]})
    same_data(load_federated_data(through, tokenizer), load_federated_data(direct, tokenizer))


@pytest.mark.parametrize("kind", ["qa", "llm"])
def test_questions_from_h5_are_questions_from_the_original(tmp_path, write, configure, tokenizer, kind):
    write("train.json", squad_document())
    write("test.json", squad_document(2, 4, "t"))
    build(RECIPES["squad"], tmp_path / "s_data.h5", tmp_path / "train.json", tmp_path / "test.json", 0.1, 0)
    settings = {"llm.tok_len": 12 if kind == "qa" else 96, "fwdllm.data.stride": 2, "data.splits": [0.8, 0.2, 0.0]}
    direct = load_federated_data(
        configure(f"train.json@{kind}", {**settings, "fwdllm.data.test_file": "test.json"}), tokenizer
    )
    same_data(load_federated_data(configure(f"s_data.h5@{kind}", settings), tokenizer), direct)
    with h5py.File(tmp_path / "s_data.h5") as file:
        attributes = json.loads(file["attributes"][()])
        assert set(file) >= {"context_X", "question_X", "Y", "question_ids", "Y_answer"}
        assert len(attributes["train_index_list"]) == 4 * 7 and len(attributes["test_index_list"]) == 2 * 6
        assert file["Y/1"][()].tolist() == [14, 23] and file["Y_answer/1"][()] == b"four five"
        assert attributes["doc_index"]["0"] == 0 and attributes["doc_index"]["28"] == 4


def test_a_squad_file_without_answer_texts_is_read(tmp_path, write):
    """The published builder of SQuAD leaves ``Y_answer`` out."""
    write("train.json", squad_document())
    build(RECIPES["squad"], tmp_path / "s_data.h5", tmp_path / "train.json", None, 0.25, 3)
    before = read_h5_data(tmp_path / "s_data.h5")
    with h5py.File(tmp_path / "s_data.h5", "a") as file:
        del file["Y_answer"]
    after = read_h5_data(tmp_path / "s_data.h5")
    assert after.train.records == before.train.records
    assert (len(after.train), len(after.test)) == (15, 5)


def test_labels_in_a_declared_order(tmp_path, write):
    from dataclasses import replace

    write("x.csv", csv_text(rows(9)))
    recipe = replace(RECIPES["agnews"], labels=("3", "1", "2"))
    assert build(recipe, tmp_path / "x.h5", tmp_path / "x.csv", None, 0.3, 0).labels == ["3", "1", "2"]


def test_several_text_fields_are_joined(tmp_path, write, configure, tokenizer):
    write("y.csv", '"1","one","","two"\n"2","three","four","five"\n' * 4)
    data = build(RECIPES["yahoo"], tmp_path / "y.h5", tmp_path / "y.csv", None, 0.25, 0)
    assert {record["text"] for record in data.train.records} == {"one two", "three four five"}


def partitioned(configure, **settings):
    own = {f"fwdllm.data.{name}": value for name, value in settings.items()}
    return configure("a_data.h5@text", {"federate.client_num": 0, "data.splits": [1.0, 0.0, 0.0], **own})


@pytest.mark.parametrize("method", ["uniform", "niid_label", "niid_quantity"])
def test_clients_hold_what_the_partition_says(agnews, tmp_path, configure, tokenizer, method):
    data = read_h5_data(agnews)
    made = make_partition(data, method, 4, 0.5, 7)
    write_partition(tmp_path / "p.h5", made)
    loaded = load_federated_data(partitioned(configure, partition="p.h5", partition_method=made.method), tokenizer)
    assert len(loaded.clients) == 4
    for number, (train, test) in enumerate(zip(made.train, made.test, strict=True), start=1):
        for table, rows_of, indices, examples in (
            (data.train, data.train_rows, train, loaded.clients[number].train),
            (data.test, data.test_rows, test, loaded.clients[number].test),
        ):
            expected = [tokenizer(table.records[rows_of[index]]["text"])["input_ids"] for index in sorted(indices)]
            assert [example.input_ids.tolist() for example in examples] == expected
    assert len(loaded.test) == 12


def test_a_partition_file_keeps_several_methods_and_is_replaced_by_name(agnews, tmp_path):
    data = read_h5_data(agnews)
    path = tmp_path / "p.h5"
    for method, clients, seed in (("uniform", 3, 0), ("niid_label", 3, 0), ("uniform", 3, 9)):
        write_partition(path, make_partition(data, method, clients, 1.0, seed))
    assert partition_methods(path) == ["niid_label_clients=3_alpha=1.0", "uniform_client_3"]
    found = read_partition(path, "uniform_client_3", list(data.train_rows), list(data.test_rows))
    expected = make_partition(data, "uniform", 3, 1.0, 9)
    for one, two in zip(found.train + found.test, expected.train + expected.test, strict=True):
        np.testing.assert_array_equal(one, two)
    skewed = read_partition(path, "niid_label_clients=3_alpha=1.0", list(data.train_rows), list(data.test_rows))
    assert skewed.parameters == {"alpha": 1.0}
    assert min(map(min, expected.test)) >= 40, "test indices go on where training indices end"
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_all_answers_of_a_question_stay_together(tmp_path, write):
    write("train.json", squad_document())
    data = build(RECIPES["squad"], tmp_path / "s.h5", tmp_path / "train.json", None, 0.2, 0)
    made = make_partition(data, "uniform", 5, 0, 0)
    owner = {index: client for client, part in enumerate(made.train) for index in part.tolist()}
    assert set(owner) == set(data.train_rows)
    for row in set(data.train_rows.values()):
        assert len({owner[index] for index, held in data.train_rows.items() if held == row}) == 1
    natural = make_partition(data, "natural", 0, 0, 0)
    titles = [{data.train.records[data.train_rows[index]]["owner"] for index in part} for part in natural.train]
    assert all(len(found) == 1 for found in titles) and len(natural) == 4


# What is broken ------------------------------------------------------------------------------------------------------


def meddle(path, change):
    with h5py.File(path, "a") as file:
        attributes = json.loads(file["attributes"][()])
        change(file, attributes)
        if "attributes" in file:
            del file["attributes"]
            file["attributes"] = json.dumps(attributes) if isinstance(attributes, dict) else attributes


def replace_value(name, value):
    def change(file, attributes):
        del file[name]
        file[name] = value

    return change


def _drop_attribute(name):
    return lambda file, attributes: attributes.pop(name)


BROKEN = {
    "no texts": (lambda file, attributes: file.__delitem__("X"), r"no group 'X'"),
    "a row is missing": (lambda file, attributes: file.__delitem__("X/5"), r"no X/5"),
    "no label of a row": (lambda file, attributes: file.__delitem__("Y/41"), r"no Y/41"),
    "unknown label": (replace_value("Y/3", "33"), r"row 3: the label '33' is not in the file's label_vocab.*did you"),
    "no vocabulary": (_drop_attribute("label_vocab"), r"'label_vocab'"),
    "no index list": (_drop_attribute("index_list"), r"'index_list'"),
    "no test list": (_drop_attribute("test_index_list"), r"'test_index_list'"),
    "index beyond the rows": (lambda file, attributes: attributes["train_index_list"].append(99), r"no X/99"),
    "index is no number": (lambda file, attributes: attributes["train_index_list"].append("7"), r"list of indices"),
    "negative index": (lambda file, attributes: attributes["train_index_list"].append(-1), r"list of indices"),
    "vocabulary with a gap": (lambda file, attributes: attributes["label_vocab"].update({"3": 7}), r"from 0"),
    "wrong count": (lambda file, attributes: attributes.update(num_labels=4), r"num_labels is 4"),
    "another task": (lambda file, attributes: attributes.update(task_type="seq_tagging"), r"task_type 'seq_tagging'"),
    "owners too few": (lambda file, attributes: attributes.update(label_index_list=["a"]), r"label_index_list has 1"),
    "not UTF-8": (replace_value("X/3", b"\xff\xfe\xff"), r"X/3 is not UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_data_file_is_refused(agnews, name):
    change, message = BROKEN[name]
    meddle(agnews, change)
    with pytest.raises(DataError, match=message) as error:
        read_h5_data(agnews)
    assert str(agnews) in str(error.value)


def test_attributes_that_are_absent_or_not_json(agnews):
    with h5py.File(agnews, "a") as file:
        del file["attributes"]
        file["attributes"] = "{"
    with pytest.raises(DataError, match="is not JSON"):
        read_h5_data(agnews)
    with h5py.File(agnews, "a") as file:
        del file["attributes"]
    with pytest.raises(DataError, match="no data file of FedNLP"):
        read_h5_data(agnews)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(agnews, share):
    os.truncate(agnews, int(share * agnews.stat().st_size))
    with pytest.raises(DataError, match="damaged, cut off or no h5 file"):
        read_h5_data(agnews)


@pytest.mark.slow
def test_damage_in_the_middle_never_escapes_as_another_error(agnews):
    """Bytes overwritten anywhere: the file is read (only text was hit) or refused, by one of our errors."""
    whole = agnews.read_bytes()
    refused = 0
    for number in range(40):
        raw = bytearray(whole)
        start = int(np.random.default_rng(number).integers(0, len(raw) - 64))
        raw[start : start + 64] = np.random.default_rng(number + 99).bytes(64)
        agnews.write_bytes(raw)
        try:
            read_h5_data(agnews)
        except DataError:
            refused += 1
    assert refused > 0


def test_an_absent_file_names_its_neighbour(agnews):
    with pytest.raises(DataError, match=r"does not exist.*did you mean 'a_data\.h5'"):
        read_h5_data(agnews.with_name("b_data.h5"))


def test_an_answer_outside_its_context(tmp_path, write):
    write("train.json", squad_document())
    build(RECIPES["squad"], tmp_path / "s.h5", tmp_path / "train.json", None, 0.25, 0)
    meddle(tmp_path / "s.h5", replace_value("Y/2", (40, 400)))
    with pytest.raises(DataError, match="row 2: the answer's characters"):
        read_h5_data(tmp_path / "s.h5")


def break_partition(path, change):
    with h5py.File(path, "a") as file:
        change(file["uniform_client_3"])


def _put(name, value):
    def change(group):
        if name in group:
            del group[name]
        if value is not None:
            group[name] = value

    return change


BROKEN_PARTITIONS = {
    "no clients": (_put("n_clients", None), r"no 'n_clients'"),
    "no data": (_put("partition_data", None), r"no 'partition_data'"),
    "a client is missing": (_put("partition_data/1", None), r"n_clients is 3, but partition_data has 2"),
    "no test rows": (_put("partition_data/1/test", None), r"client 1 has no 'test'"),
    "indices are text": (_put("partition_data/1/train", "abc"), r"client 1: 'train' must be a list of indices"),
    "index beyond the file": (_put("partition_data/1/train", [5, 400]), r"client 1 holds row 400.*rows 0 to 51"),
    "a row twice": (_put("partition_data/1/train", [0, 0]), r"dealt more than once.*allow_overlap"),
    "tested on what is trained on": (_put("partition_data/1/test", list(range(40))), r"both trained on and tested on"),
}


@pytest.mark.parametrize("name", BROKEN_PARTITIONS)
def test_a_broken_partition_is_refused(agnews, tmp_path, configure, tokenizer, name):
    write_partition(tmp_path / "p.h5", make_partition(read_h5_data(agnews), "uniform", 3, 0, 0))
    change, message = BROKEN_PARTITIONS[name]
    break_partition(tmp_path / "p.h5", change)
    with pytest.raises(DataError, match=message):
        load_federated_data(partitioned(configure, partition="p.h5", partition_method="uniform_client_3"), tokenizer)


def test_an_overlap_may_be_accepted(agnews, tmp_path, configure, tokenizer, caplog):
    overlapping = Partition("uniform", [np.array([0, 1]), np.array([1, 2])], [np.array([40]), np.array([2])])
    write_partition(tmp_path / "p.h5", overlapping)
    settings = partitioned(configure, partition="p.h5", partition_method="uniform", allow_overlap=True)
    loaded = load_federated_data(settings, tokenizer)
    assert [len(client.train) for client in loaded.clients.values()] == [2, 2]
    assert "1 rows are dealt more than once, and 1 are both trained on and tested on" in caplog.text


def test_unknown_methods_and_settings_that_do_not_go_together(agnews, tmp_path, configure, tokenizer):
    write_partition(tmp_path / "p.h5", make_partition(read_h5_data(agnews), "uniform", 3, 0, 0))
    own = {"partition": "p.h5", "partition_method": "uniform_client_3"}
    base = partitioned(configure, **own)
    cases = [
        (partitioned(configure, partition="p.h5", partition_method="uniform_client_4"), r"mean 'uniform_client_3'"),
        (partitioned(configure, partition="p.h5"), r"partition_method: ''"),
        (base.model_copy(update={"data": base.data.model_copy(update={"splitter": "iid"})}), r"data\.splitter 'iid'"),
        (partitioned(configure, **own, held_out_clients=0.5), r"held_out_clients"),
        (configure("a_data.h5@text", {"fwdllm.data.test_file": "test.csv"}), r"fwdllm\.data\.test_file"),
        (configure("train.csv@text", {"fwdllm.data.partition": "p.h5"}), r"deals the rows of an h5 file"),
        (configure("a_data.h5@qa"), r"holds text_classification, which is read as @text"),
        (configure("a_data.h5@text", {"federate.client_num": 5, **{f"fwdllm.data.{k}": v for k, v in own.items()}}),
         r"has 3 clients; allowed are 0 and 3"),
    ]  # fmt: skip
    for config, message in cases:
        with pytest.raises(ConfigError, match=message):
            load_federated_data(config, tokenizer)
    with pytest.raises(DataError, match="does not exist"):
        load_federated_data(partitioned(configure, partition="q.h5", partition_method="u"), tokenizer)


def test_a_failed_write_leaves_the_old_file(agnews, tmp_path):
    before = agnews.read_bytes()
    from fs_fwdllm.data.h5.writing import replacing

    with pytest.raises(ZeroDivisionError), replacing(agnews) as file:
        file["X"] = 1
        raise ZeroDivisionError
    assert agnews.read_bytes() == before
    assert not list(tmp_path.glob(".a_data*"))


def test_real_agnews_through_h5(shared_data, tmp_path, configure, tokenizer):
    lines = shared_data("ag_news/test.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.csv").write_text("".join(lines[:200]), encoding="utf-8")
    (tmp_path / "test.csv").write_text("".join(lines[200:260]), encoding="utf-8")
    build(RECIPES["agnews"], tmp_path / "a.h5", tmp_path / "train.csv", tmp_path / "test.csv", 0.1, 0)
    own = {"columns": ["class", "title", "description"], "text": "description", "label": "class"}
    own |= {"test_file": "test.csv"}
    direct = configure("train.csv@text", {f"fwdllm.data.{name}": value for name, value in own.items()})
    same_data(load_federated_data(configure("a.h5@text"), tokenizer), load_federated_data(direct, tokenizer))


def _secret(folder):
    """A file of somebody else's, as raw bytes and as h5."""
    (folder / "secret.txt").write_bytes(b"a password")
    with h5py.File(folder / "other.h5", "w") as file:
        file["row"] = "a password"
        file["X/0"] = "a password"
    return folder


OUTSIDE = {
    "a row that is a link": lambda file, folder: file.__setitem__(
        "X/0", h5py.ExternalLink(folder / "other.h5", "/row")
    ),
    "rows that are a link": lambda file, folder: file.__setitem__("X", h5py.ExternalLink(folder / "other.h5", "/X")),
    "a link to a link": lambda file, folder: (
        file.__setitem__("there", h5py.ExternalLink(folder / "other.h5", "/row")),
        file.__setitem__("X/0", h5py.SoftLink("/there")),
    ),
    "raw storage": lambda file, folder: file.create_dataset(
        "X/0", shape=(1,), dtype="S10", external=[(str(folder / "secret.txt"), 0, 10)]
    ),
    "a virtual data set": lambda file, folder: file.create_virtual_dataset("X/0", _layout(folder)),
    "the attributes": lambda file, folder: file.__setitem__(
        "attributes", h5py.ExternalLink(folder / "other.h5", "/row")
    ),
}


def _layout(folder):
    layout = h5py.VirtualLayout(shape=(1,), dtype="i8")
    layout[:] = h5py.VirtualSource(folder / "other.h5", "row", shape=(1,))
    return layout


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_lies_outside_a_data_file_is_refused_and_not_read(agnews, tmp_path, name):
    folder = _secret(tmp_path)
    with h5py.File(agnews, "a") as file:
        del file[{"the attributes": "attributes", "rows that are a link": "X"}.get(name, "X/0")]
        OUTSIDE[name](file, folder)
    with pytest.raises(DataError, match="lies outside the file") as caught:
        read_h5_data(agnews)
    assert "password" not in str(caught.value)


def test_a_partition_that_lies_outside_is_refused(agnews, tmp_path):
    data = read_h5_data(agnews)
    path = tmp_path / "p.h5"
    write_partition(path, make_partition(data, "uniform", 3, 1.0, 0, "", ""))
    method = partition_methods(path)[0]
    path.rename(tmp_path / "elsewhere.h5")
    with h5py.File(path, "w") as file:
        file[f"{method}/n_clients"] = 3
        file[f"{method}/partition_data"] = h5py.ExternalLink(tmp_path / "elsewhere.h5", f"/{method}/partition_data")
    with pytest.raises(DataError, match="lies outside the file"):
        read_partition(path, method, list(data.train_rows), list(data.test_rows))


@pytest.mark.parametrize(("count", "message"), [(3, "X/0 is one text"), (1 << 40, "'0' is said to be longer than the")])
def test_a_row_of_many_numbers_is_refused_before_it_is_read(agnews, count, message):
    with h5py.File(agnews, "a") as file:
        del file["X/0"]
        file.create_dataset("X/0", shape=(count,), dtype="i8", chunks=(min(count, 1 << 10),))
    with pytest.raises(DataError, match=message):
        read_h5_data(agnews)


def overwrite(path, place, data):
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def test_a_text_that_is_said_to_be_longer_than_the_file_is_refused_before_memory_is_taken(agnews):
    """h5py would take the four gibibytes first."""
    with h5py.File(agnews) as file:
        place = file["X/0"].id.get_offset()
    overwrite(agnews, place, (0xFFFFFFF0).to_bytes(4, "little"))
    with pytest.raises(DataError, match="'0' is said to be longer than the file"):
        read_h5_data(agnews)


@pytest.mark.parametrize("length", [0, 8, 1 << 40, (1 << 64) - 8])
def test_a_heap_over_which_one_would_walk_for_ever_is_refused(agnews, length):
    """The HDF5 library does, in C, where no deadline reaches it. The last object of a heap is what is free of it."""
    data = agnews.read_bytes()
    start = data.index(b"GCOL")
    place, end = start + 16, start + int.from_bytes(data[start + 8 : start + 16], "little")
    while data[place : place + 2] != b"\0\0":
        place += 16 + -(-int.from_bytes(data[place + 8 : place + 16], "little") // 8) * 8
    assert place < end
    overwrite(agnews, place + 8, length.to_bytes(8, "little"))
    with pytest.raises(DataError, match=f"the heap of texts at byte {start}"):
        read_h5_data(agnews)
