"""Questions: windows that lose nothing, spans that point at the answer, clients that are held out, words as classes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.data import load_federated_data
from fs_fwdllm.data.readers import data_task
from fs_fwdllm.data.squad import span_examples
from fs_fwdllm.data.table import Table
from fs_fwdllm.data.types import IGNORED_LABEL
from fs_fwdllm.errors import ConfigError, DataError
from tests.data.conftest import word_tokenizer
from tests.data.tokenizer_families import family

CONTEXT = "one two three four five six seven eight nine ten red green blue add the numbers"
WORDS = CONTEXT.split()
TOKENIZER = word_tokenizer(start=False)


def row(first=2, last=3, title="t", name="q", context=CONTEXT):
    text = " ".join(context.split()[first : last + 1])
    return {
        "context": context,
        "question": "add numbers",
        "answers": [{"text": text, "answer_start": context.index(text)}],
        "id": name,
        "title": title,
    }


def table_of(*records):
    return Table("x.json", list(records), list(range(1, len(records) + 1)))


@given(st.integers(0, 15), st.integers(0, 3), st.integers(6, 30), st.integers(0, 20))
def test_windows_cover_the_context_and_spans_are_the_answer(first, more, tok_len, stride):
    last = min(first + more, len(WORDS) - 1)
    (windows,), rows = span_examples(table_of(row(first, last)), TOKENIZER, tok_len, stride)
    assert rows == [0]
    covered = set()
    for window in windows:
        assert len(window.input_ids) <= tok_len and len(window.segments) == len(window.input_ids)
        offsets = window.reference.offsets
        inside = offsets[:, 0] >= 0
        assert not inside[:2].any(), "the question is not the context"
        covered |= {int(start) for start, _ in offsets[inside]}
        whole = {CONTEXT.index(" ".join(WORDS[first : last + 1]))} <= set(offsets[inside, 0].tolist())
        if window.is_taught:
            start, end = window.labels[0]
            assert CONTEXT[offsets[start, 0] : offsets[end, 1]] == window.reference.answers[0]
        else:
            assert window.labels.tolist() == [[IGNORED_LABEL] * 2]
            assert not whole or offsets[inside][-1, 1] < CONTEXT.index(WORDS[last]) + len(WORDS[last])
    assert len(covered) == len(WORDS)
    assert stride < more or tok_len < 2 * (more + 1) + 2 or any(window.is_taught for window in windows)


def test_a_question_without_room_for_its_context_is_left_out(caplog):
    groups, rows = span_examples(table_of(row(), {**row(), "question": "add " * 30}), TOKENIZER, 12, 2)
    assert (len(groups), rows) == (1, [0])
    assert "1 of 2 questions are left out" in caplog.text


BROKEN = {
    "no list": ({"answers": "three"}, "must be a list of answers"),
    "answer elsewhere": ({"answers": [{"text": "three", "answer_start": 3}]}, "not in the context at answer_start 3"),
    "no place": ({"answers": [{"text": "three"}]}, "answer_start None"),
    "no text": ({"answers": [{"answer_start": 1}]}, "'text' and 'answer_start'"),
    "beyond the end": ({"answers": [{"text": "x", "answer_start": 5000}]}, "answer_start 5000"),
    "no context": ({"context": None}, "has no field 'context'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_question_is_refused(name):
    change, message = BROKEN[name]
    with pytest.raises(DataError, match=rf"x\.json, row 2: .*{message}"):
        span_examples(table_of(row(), {**row(), **change}), TOKENIZER, 20, 2)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="fast tokenizer"):
        span_examples(table_of(row()), type("Slow", (), {"is_fast": False})(), 20, 2)


def document(titles=("a", "b", "c", "d", "e")):
    def question(title, number):
        answer = {"text": "three", "answer_start": CONTEXT.index("three")}
        return {"id": f"{title}{number}", "question": "add numbers", "answers": [answer]}

    return {
        "version": "1.1",
        "data": [
            {"title": title, "paragraphs": [{"context": CONTEXT, "qas": [question(title, n) for n in range(4)]}]}
            for title in titles
        ],
    }


SETTINGS = {
    "llm.tok_len": 14,
    "federate.client_num": 0,
    "data.splitter": "natural",
    "fwdllm.data.natural": "title",
    "data.splits": [1.0, 0.0, 0.0],
}


def questions(examples):
    return {example.reference.question for example in examples}


def test_whole_articles_are_held_out(write, configure):
    write("s.json", document())
    loaded = load_federated_data(configure("s.json@qa", {**SETTINGS, "fwdllm.data.held_out_clients": 0.4}), TOKENIZER)
    trained = [client for client, held in loaded.clients.items() if held.train]
    assert loaded.task == "question_answering" and len(loaded.clients) == 5 and len(trained) == 3
    tested = questions(loaded.test)
    assert len(tested) == 8 and not tested & {q for held in loaded.clients.values() for q in questions(held.train)}
    assert all(example.is_taught for held in loaded.clients.values() for example in held.train)
    assert not all(example.is_taught for example in loaded.test), "all windows answer a question"
    again = load_federated_data(configure("s.json@qa", {**SETTINGS, "fwdllm.data.held_out_clients": 0.4}), TOKENIZER)
    assert questions(again.test) == tested


def test_the_windows_of_a_question_are_never_parted(write, configure):
    write("s.json", document())
    settings = {**SETTINGS, "data.splits": [0.5, 0.0, 0.5], "data.splitter": "", "federate.client_num": 3}
    loaded = load_federated_data(configure("s.json@qa", settings), TOKENIZER)
    owners = [questions([*held.train, *held.test]) for held in loaded.clients.values()]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 20
    assert all(not questions(held.train) & questions(held.test) for held in loaded.clients.values())


def test_a_sample_of_the_test_split_is_a_sample_of_questions(write, configure):
    write("s.json", document())
    settings = {**SETTINGS, "fwdllm.data.held_out_clients": 0.4, "fwdllm.data.max_test_samples": 3}
    loaded = load_federated_data(configure("s.json@qa", settings), TOKENIZER)
    assert len(questions(loaded.test)) == 3 < len(loaded.test)


def test_the_centralised_reference_sees_the_same_rows(write, configure):
    write("s.json", document())
    settings = {**SETTINGS, "fwdllm.data.held_out_clients": 0.4}
    apart = load_federated_data(configure("s.json@qa", settings), TOKENIZER)
    together = load_federated_data(configure("s.json@qa", {**settings, "fwdllm.data.centralised": True}), TOKENIZER)
    assert list(together.clients) == [1]
    assert questions(together.test) == questions(apart.test)
    assert questions(together.clients[1].train) == {q for held in apart.clients.values() for q in questions(held.train)}


def test_one_client_cannot_be_held_out(write, configure):
    write("s.json", document(("a",)))
    with pytest.raises(ConfigError, match="there is only 1 client"):
        load_federated_data(configure("s.json@qa", {**SETTINGS, "fwdllm.data.held_out_clients": 0.2}), TOKENIZER)


@pytest.mark.parametrize("part", ["title", "paragraphs"])
def test_a_document_that_lacks_a_part_is_refused(write, configure, part):
    broken = copy.deepcopy(document())
    del broken["data"][1][part]
    write("s.json", broken)
    with pytest.raises(DataError, match=r"s\.json: is not a SQuAD document"):
        load_federated_data(configure("s.json@qa", SETTINGS), TOKENIZER)


def test_the_same_file_teaches_a_language_model_the_answer(write, configure):
    write("s.json", document())
    loaded = load_federated_data(configure("s.json@llm", {**SETTINGS, "llm.tok_len": 100}), TOKENIZER)
    example = loaded.clients[1].train[0]
    taught = example.input_ids[example.labels != IGNORED_LABEL]
    assert TOKENIZER.decode(taught) == "three [EOS]" and example.reference.answers == ("three",)
    assert "one two three four five" in TOKENIZER.decode(example.input_ids[example.labels == IGNORED_LABEL])


# Classes as words ----------------------------------------------------------------------------------------------------

LANGUAGE_MODEL = {"model.type": "somewhere@huggingface_llm", "fwdllm.data.prompt": "the numbers {text} Response :"}


def word_rows():
    return [{"text": " ".join(WORDS[n : n + 6]), "label": ("red", "green", "blue")[n % 3]} for n in range(9)]


def test_a_language_model_reads_the_text_in_a_prompt(write, configure):
    write("w.jsonl", word_rows())
    config = configure("w.jsonl@text", {**LANGUAGE_MODEL, "llm.tok_len": 8, "federate.client_num": 1})
    assert data_task(config) == "label_words"
    loaded = load_federated_data(config, TOKENIZER)
    assert loaded.label_names == ["blue", "green", "red"]
    assert TOKENIZER.convert_ids_to_tokens(loaded.label_tokens) == ["blue", "green", "red"]
    held = [*loaded.clients[1].train, *loaded.clients[1].val, *loaded.clients[1].test]
    found = sorted(TOKENIZER.decode(example.input_ids) for example in held)
    assert found == sorted(f"the numbers {' '.join(WORDS[n : n + 4])} Response :" for n in range(9))
    assert all(example.labels.shape == () for example in held)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fwdllm.data.prompt": "no place"}, r"fwdllm\.data\.prompt: must contain \{text\} once"),
        ({"fwdllm.data.label_words": ["red", "green"]}, r"label_words.*one for each of the classes"),
        ({"fwdllm.data.label_words": ["red one", "red two", "blue"]}, r"'red two' and 'red one' start with the same"),
        ({"fwdllm.data.label_words": ["red", "red one", "red two"]}, r"label_words: 'red'"),
    ],
)
def test_words_that_cannot_stand_for_classes_are_refused(write, configure, settings, message):
    write("w.jsonl", word_rows())
    with pytest.raises(ConfigError, match=message):
        load_federated_data(configure("w.jsonl@text", {**LANGUAGE_MODEL, **settings}), TOKENIZER)


def test_a_start_that_all_words_share_joins_the_prompt(write, configure):
    write("w.jsonl", word_rows())
    words = {"fwdllm.data.label_words": ["one red", "one green", "one blue"]}
    loaded = load_federated_data(configure("w.jsonl@text", {**LANGUAGE_MODEL, **words}), TOKENIZER)
    assert TOKENIZER.convert_ids_to_tokens(loaded.label_tokens) == ["red", "green", "blue"]
    assert TOKENIZER.decode(loaded.clients[1].train[0].input_ids).endswith("Response : one")
    assert np.unique(loaded.label_tokens).size == 3


def test_real_squad_answers_are_found(shared_data, configure):
    """Every gold answer of the development set is where the file says, and its tokens are in some window."""
    path = shared_data("squad/dev-v1.1.json")
    settings = {**SETTINGS, "data.root": str(path.parent), "llm.tok_len": 256, "data.subsample": 0.02}
    loaded = load_federated_data(configure(f"{path.name}@qa", settings), TOKENIZER)
    trained = [example for held in loaded.clients.values() for example in held.train]
    for example in trained:
        first, last = example.labels[0]
        cut = example.reference.context[example.reference.offsets[first, 0] : example.reference.offsets[last, 1]]
        assert example.reference.answers[0].strip() in cut
    assert len(questions(trained)) >= 210


# Questions without an answer -----------------------------------------------------------------------------------------


def unanswerable(**change):
    return {**row(name="none"), "answers": [], **change}


@pytest.mark.parametrize(
    "change", [{}, {"answers": {"text": [], "answer_start": []}}, {"is_impossible": True, "answers": row()["answers"]}]
)
def test_a_question_without_an_answer_points_at_the_first_special_token(change):
    tokenizer = family("WordPiece")
    groups, _ = span_examples(table_of(row(), unanswerable(**change)), tokenizer, 60, 2)
    for window in groups[1]:
        assert window.labels.tolist() == [[0, 0]] and window.is_taught
        assert window.input_ids[0] == tokenizer.bos_token_id and window.reference.no_answer == 0
        assert window.reference.answers == ()
    assert any(window.labels[0, 0] > 0 for window in groups[0])


def test_windows_without_the_answer_are_silent_where_silence_is_an_answer():
    tokenizer = word_tokenizer(start=True)
    (apart,), _ = span_examples(table_of(row(0, 1)), tokenizer, 10, 2)
    (beside, _), _ = span_examples(table_of(row(0, 1), unanswerable()), tokenizer, 10, 2)
    assert len(apart) == len(beside) > 2
    for old, new in zip(apart[1:], beside[1:], strict=True):
        assert not old.is_taught and new.labels.tolist() == [[0, 0]]
    assert apart[0].labels.tolist() == beside[0].labels.tolist() and apart[0].reference.no_answer is None


def test_lists_of_texts_and_places_are_answers_too():
    lists = {"text": ["three four"], "answer_start": [CONTEXT.index("three")]}
    ((listed,), (plain,)), _ = span_examples(table_of({**row(), "answers": lists}, row(2, 3)), TOKENIZER, 40, 2)
    assert listed.labels.tolist() == plain.labels.tolist() and listed.reference.answers == plain.reference.answers


def test_a_document_with_impossible_questions_is_read_by_both_kinds_of_model(write, configure):
    squad2 = document()
    for article in squad2["data"]:
        article["paragraphs"][0]["qas"][0] |= {"is_impossible": True, "answers": []}
    write("s.json", squad2)
    encoder = load_federated_data(configure("s.json@qa", {**SETTINGS, "llm.tok_len": 24}), TOKENIZER)
    silent = [example for held in encoder.clients.values() for example in held.train if not example.reference.answers]
    assert {example.reference.question for example in silent} == {f"{name}0" for name in "abcde"}
    decoder = load_federated_data(configure("s.json@llm", {**SETTINGS, "llm.tok_len": 100}), TOKENIZER)
    taught = [example for held in decoder.clients.values() for example in held.train if not example.reference.answers]
    assert len(taught) == 5
    for example in taught:
        assert TOKENIZER.decode(example.labels[example.labels != IGNORED_LABEL]) == "[EOS]"


def test_a_configuration_may_say_that_questions_have_no_answer(write, configure):
    write("s.json", document())
    plain = load_federated_data(configure("s.json@qa", {**SETTINGS, "llm.tok_len": 24}), TOKENIZER)
    assert not plain.unanswerable and plain.clients[1].train[0].reference.no_answer is None
    said = configure("s.json@qa", {**SETTINGS, "llm.tok_len": 24, "fwdllm.data.unanswerable": True})
    silent = load_federated_data(said, TOKENIZER)
    assert silent.unanswerable and silent.clients[1].train[0].reference.no_answer == 0


def test_a_test_file_with_impossible_questions_decides_for_both_splits(write, configure):
    write("s.json", document())
    write("test.json", [unanswerable()])
    settings = {**SETTINGS, "llm.tok_len": 24, "fwdllm.data.test_file": "test.json"}
    data = load_federated_data(configure("s.json@qa", settings), TOKENIZER)
    assert data.unanswerable and data.clients[1].train[0].reference.no_answer == 0


def test_two_questions_of_one_name_stay_two(write, configure):
    write("s.jsonl", [row(2, 3), row(4, 5), {**row(6, 7), "id": None}])
    for kind, tok_len in (("qa", 24), ("llm", 100)):
        settings = {"llm.tok_len": tok_len, "data.splits": [1.0, 0.0, 0.0], "federate.client_num": 1}
        data = load_federated_data(configure(f"s.jsonl@{kind}", settings), TOKENIZER)
        assert len(questions(data.clients[1].train)) == 3
