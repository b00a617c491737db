"""Every task on every family of models: padding changes nothing, and all derivatives agree.

Tasks are spans of text (BERT, RoBERTa, DistilBERT, ALBERT, DeBERTa), classes (the same, and decoders), and label words
(decoders). The reference for span extraction is Hugging Face's own loss.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fs_fwdllm.config import parse_config
from fs_fwdllm.core.direction import DirectionKey, make_distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data.types import IGNORED_LABEL, Batch
from fs_fwdllm.estimator.base import stack_directions
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.inputs import batch_on
from fs_fwdllm.model.objective import Objective
from tests.estimator.models import KEYS
from tests.model.tiny import DISENTANGLED, ENCODERS, VOCABULARY, save_tiny_model, tiny_batch, tiny_config

LABEL_TOKENS = (17, 4, 60)
ALL_ENCODERS = (*ENCODERS, *DISENTANGLED)
CASES = [
    *[("question_answering", name) for name in ALL_ENCODERS],
    *[("classification", name) for name in (*ALL_ENCODERS, "llama")],
    *[("label_words", name) for name in ("llama", "gpt2")],
]


def load(folder, task, architecture, method="lora", **changes):
    place = save_tiny_model(folder / "model", architecture)
    config = tiny_config(place, method, classifier=task != "label_words", **{"fwdllm.attention": "eager", **changes})
    if task == "question_answering":
        config.model.task = "QuestionAnswering"
    loaded = load_model(config, load_tokenizer(config), 3)
    trainables = Trainables.of_model(loaded.model)
    with torch.no_grad():  # adapters start from nothing, where half the slopes vanish
        for index, tensor in enumerate(trainables.tensors):
            tensor += 0.05 * torch.from_numpy(np.random.default_rng(index).normal(size=tensor.shape)).float()
    return loaded, Objective(loaded.model, trainables, task, 0, LABEL_TOKENS)


def batch_of(task):
    batch = tiny_batch()
    if task != "question_answering":
        return batch
    segments = torch.zeros_like(batch.input_ids)
    segments[:, 3:] = 1
    return replace(batch, labels=torch.tensor([[3, 5], [4, 4], [3, 4]]), token_type_ids=segments * batch.attention_mask)


def padded(batch, more):
    wide = {
        name: F.pad(getattr(batch, name), (0, more), value=value)
        for name, value in (("input_ids", 1), ("attention_mask", 0), ("token_type_ids", 0))
        if getattr(batch, name) is not None
    }
    return replace(batch, **wide)


@pytest.mark.parametrize(("task", "architecture"), CASES)
def test_padding_further_changes_nothing(tmp_path, task, architecture):
    """Even if what stands in the padding is a real token: the mask, not the token, decides."""
    _, objective = load(tmp_path, task, architecture)
    batch, wide = batch_of(task), padded(batch_of(task), 5)
    expected = objective.on(batch)
    for other in (wide, replace(wide, input_ids=wide.input_ids.masked_fill(wide.attention_mask == 0, 9))):
        if architecture == "llama" and task == "classification" and other is not wide:
            continue  # Hugging Face's sequence classifiers for decoders find the end by the padding token
        found = objective.on(other)
        logits = found.logits()[:, : expected.logits().shape[1]]
        torch.testing.assert_close(logits, expected.logits(), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert float(found.here()) == pytest.approx(float(expected.here()), rel=1e-5)
    if task == "question_answering":
        assert (objective.on(wide).logits()[:, batch.input_ids.shape[1] :] < -1e30).all()


@pytest.mark.parametrize(("task", "architecture"), CASES)
def test_a_difference_along_a_direction_is_the_backpropagated_slope(tmp_path, task, architecture):
    _, objective = load(tmp_path, task, architecture)
    batch_loss = objective.on(batch_of(task))
    tensors = objective.trainables.tensors
    for tensor in tensors:
        tensor.grad = None
    batch_loss.here().backward()
    gradient = [tensor.grad for tensor in tensors]
    assert all(part is not None and torch.isfinite(part).all() for part in gradient)
    length = float(torch.stack([part.square().sum() for part in gradient]).sum().sqrt())
    assert length > 1e-3
    before = objective.trainables.digest()
    keys: list[DirectionKey] = list(KEYS)
    stacks = list(stack_directions(batch_loss, keys, make_distribution("rademacher")))
    for probe in range(len(keys)):
        direction = [stack[probe] for stack in stacks]
        exact = sum(float((z * g).sum()) for z, g in zip(direction, gradient, strict=True))
        with torch.no_grad():
            up, down = (
                float(batch_loss.at([t + sign * 1e-3 * z for t, z in zip(tensors, direction, strict=True)]))
                for sign in (1, -1)
            )
        assert (up - down) / 2e-3 == pytest.approx(exact, abs=0.05 * length)
    assert objective.trainables.digest() == before


@pytest.mark.parametrize(("task", "architecture"), CASES)
def test_batched_probes_and_forward_mode_see_the_same_loss(tmp_path, task, architecture):
    _, objective = load(tmp_path, task, architecture)
    batch_loss = objective.on(batch_of(task))
    here = objective.trainables.copy_values()
    points = [[value + shift for value in here] for shift in (0.0, 0.01)]
    with torch.no_grad():
        single = torch.stack([batch_loss.at(point) for point in points])
        stacked = batch_loss.at_stack([torch.stack(parts) for parts in zip(*points, strict=True)])
        tangents = tuple(torch.ones_like(value) for value in here)
        with batch_loss.replayed():
            loss, slope = torch.func.jvp(batch_loss.function(), (tuple(here),), (tangents,))
    torch.testing.assert_close(stacked, single, rtol=1e-5, atol=1e-6)
    assert float(loss) == pytest.approx(float(single[0]), rel=1e-6)
    assert torch.isfinite(slope)


@pytest.mark.parametrize("architecture", ALL_ENCODERS)
def test_the_span_loss_is_hugging_faces(tmp_path, architecture):
    """Where nothing is padded; where something is, Hugging Face lets padding compete."""
    loaded, objective = load(tmp_path, "question_answering", architecture)
    batch = batch_of("question_answering")
    batch = replace(batch, attention_mask=torch.ones_like(batch.attention_mask))
    base = loaded.model.get_base_model()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if loaded.model.config.to_dict().get("type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch.token_type_ids
    with torch.no_grad():
        reference = base(**inputs, start_positions=batch.labels[:, 0], end_positions=batch.labels[:, 1])
        assert float(objective.on(batch).here()) == pytest.approx(float(reference.loss), rel=1e-6)


def test_segments_reach_a_model_that_knows_them_through_every_adapter(tmp_path):
    for number, method in enumerate(("lora", "ia3", "layernorm", "bitfit", "bottleneck", "head", "full")):
        (tmp_path / str(number)).mkdir()
        _, objective = load(tmp_path / str(number), "question_answering", "bert", method)
        batch = batch_of("question_answering")
        swapped = replace(batch, token_type_ids=1 - batch.token_type_ids)
        assert not torch.allclose(objective.on(batch).logits(), objective.on(swapped).logits()), method


def test_a_window_without_the_answer_does_not_count(tmp_path):
    _, objective = load(tmp_path, "question_answering", "bert")
    batch = batch_of("question_answering")
    labels = batch.labels.clone()
    labels[1] = IGNORED_LABEL
    kept = [0, 2]
    parts = {name: getattr(batch, name)[kept] for name in ("input_ids", "attention_mask", "labels", "token_type_ids")}
    with torch.no_grad():
        some, without = objective.on(replace(batch, labels=labels)).here(), objective.on(replace(batch, **parts)).here()
    assert float(some) == pytest.approx(float(without), rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_label_words_are_read_after_the_last_token(tmp_path, architecture):
    loaded, objective = load(tmp_path, "label_words", architecture)
    batch = tiny_batch()
    found = objective.on(batch)
    with torch.no_grad():
        everything = loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    ends = batch.attention_mask.sum(1) - 1
    expected = torch.stack([everything[row, end][list(LABEL_TOKENS)] for row, end in enumerate(ends)])
    torch.testing.assert_close(found.logits(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.targets, batch.labels)


def test_the_prefix_cache_does_not_change_a_span_loss(tmp_path):
    loaded, plain = load(tmp_path, "question_answering", "bert", "lora", layers_to_transform=[1])
    cached = Objective(loaded.model, plain.trainables, "question_answering", 1 << 24)
    batch = replace(batch_of("question_answering"), key=(1, 0))
    with torch.no_grad():
        expected = plain.on(batch).here()
        assert torch.equal(cached.on(batch).here(), expected)
        assert torch.equal(cached.on(batch).here(), expected)
    assert cached.cache.hits == 1 and cached.cache.used_bytes > 0


def test_a_batch_without_any_answer_does_not_spoil_the_prefix_cache(tmp_path):
    """What the rest of the model reads is found out on the first batch; there the loss must be a number."""
    used = []
    for spoil in (False, True):
        (tmp_path / str(spoil)).mkdir()
        loaded, plain = load(tmp_path / str(spoil), "question_answering", "bert", "lora", layers_to_transform=[1])
        cached = Objective(loaded.model, plain.trainables, "question_answering", 1 << 24)
        batch = replace(batch_of("question_answering"), key=(1, 0))
        first = replace(batch, labels=torch.full_like(batch.labels, IGNORED_LABEL)) if spoil else batch
        cached.on(first)
        used.append(cached.cache.used_bytes)
    assert used[0] == used[1]


def test_only_a_batch_with_segments_has_them_moved():
    batch = Batch(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long), torch.zeros(1))
    assert batch_on("cpu", batch).token_type_ids is None
    assert max(LABEL_TOKENS) < VOCABULARY


def test_question_answering_is_a_task_of_encoders(tmp_path):
    from fs_fwdllm.errors import ConfigError
    from fs_fwdllm.model.source import model_task

    tree = {"model": {"type": f"{tmp_path}@huggingface_llm", "task": "QuestionAnswering"}}
    with pytest.raises(ConfigError, match=r"model\.task.*'CausalLM'"):
        model_task(parse_config(tree))
    tree["model"]["type"] = f"{tmp_path}@transformers"
    assert model_task(parse_config(tree)) == "question_answering"
