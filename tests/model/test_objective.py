"""The objective is the loss Hugging Face computes, at a fraction of the logits and in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data.types import IGNORED_LABEL
from fs_fwdllm.errors import DataError
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.objective import Objective
from tests.model.tiny import DECODERS, ENCODERS, HIDDEN, save_tiny_model, tiny_batch, tiny_config


def load(folder, architecture, method="lora", *, classifier=None, config=None, **changes):
    classifier = architecture not in DECODERS if classifier is None else classifier
    place = save_tiny_model(folder / f"{architecture}{len(list(folder.iterdir()))}", architecture, **(config or {}))
    loading = tiny_config(place, method, classifier=classifier, **{"fwdllm.attention": "eager", **changes})
    loaded = load_model(loading, load_tokenizer(loading), 3)
    return loaded.model, Objective(loaded.model, Trainables.of_model(loaded.model), loaded.task, conduct=loaded.conduct)


def batch_of(kind):
    """A language-model batch: whole rows, padded rows, or only answers labelled."""
    batch = tiny_batch(classifier=False)
    if kind == "whole":
        ids = batch.input_ids.clamp_min(3)
        return replace(batch, input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    if kind == "answers":
        labels = batch.labels.clone()
        labels[0, :5] = labels[1, :2] = IGNORED_LABEL
        labels[2] = IGNORED_LABEL
        return replace(batch, labels=labels)
    return batch


def hugging_face(model, batch):
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)


@pytest.mark.parametrize("kind", ["whole", "padded", "answers"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_the_loss_is_hugging_faces(tmp_path, architecture, kind):
    model, objective = load(tmp_path, architecture)
    batch = batch_of(kind)
    reference = hugging_face(model, batch)
    with torch.no_grad():
        assert float(objective.on(batch).here()) == pytest.approx(float(reference.loss), rel=1e-6)


@pytest.mark.parametrize("kind", ["whole", "padded", "answers"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_logits_are_the_labelled_rows_of_all_logits(tmp_path, architecture, kind):
    model, objective = load(tmp_path, architecture)
    batch = batch_of(kind)
    reference = hugging_face(model, batch).logits
    expected, targets = [], []
    for row in range(len(batch)):  # position t predicts token t + 1
        for position in range(batch.labels.shape[1] - 1):
            if batch.labels[row, position + 1] != IGNORED_LABEL:
                expected.append(reference[row, position])
                targets.append(int(batch.labels[row, position + 1]))
    batch_loss = objective.on(batch)
    torch.testing.assert_close(batch_loss.logits(), torch.stack(expected), rtol=0, atol=1e-6)
    assert batch_loss.targets.tolist() == targets


@pytest.mark.parametrize("classifier", [*ENCODERS, "llama", "gpt2"])
def test_the_classification_loss_is_hugging_faces(tmp_path, classifier):
    """Decoders pool the last token that is not padding."""
    model, objective = load(tmp_path, classifier, classifier=True)
    batch = tiny_batch()
    reference = hugging_face(model, batch)
    batch_loss = objective.on(batch)
    with torch.no_grad():
        assert float(batch_loss.here()) == pytest.approx(float(reference.loss), rel=1e-6)
    assert torch.equal(batch_loss.logits(), reference.logits)
    assert torch.equal(batch_loss.targets, batch.labels)


@pytest.mark.parametrize(("architecture", "method"), [("llama", "lora"), ("llama", "head"), ("gpt2", "lora")])
def test_the_vocabulary_projection_sees_labelled_rows_only(tmp_path, architecture, method):
    model, objective = load(tmp_path, architecture, method)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    batch = batch_of("answers")
    batch_loss = objective.on(batch)
    labelled = int((batch.labels[:, 1:] != IGNORED_LABEL).sum())
    assert labelled == 6
    with torch.no_grad():
        batch_loss.here()
        batch_loss.at(batch_loss.trainables.copy_values())
        batch_loss.at_stack([torch.stack([value, value]) for value in batch_loss.trainables.copy_values()])
    batch_loss.logits()
    assert seen[:2] == [(labelled, HIDDEN)] * 2
    assert [shape[-2:] for shape in seen] == [(labelled, HIDDEN)] * 4
    seen.clear()
    hugging_face(model, batch)
    assert seen == [(*batch.input_ids.shape, HIDDEN)], "outside an evaluation the model is as it was"


def test_a_projection_that_cannot_be_found_still_gives_the_labelled_rows(tmp_path):
    model, objective = load(tmp_path, "llama")
    batch = batch_of("answers")
    expected = objective.on(batch).logits()
    model.get_base_model().get_output_embeddings = lambda: None
    blind = Objective(model, objective.trainables, "causal_lm")
    torch.testing.assert_close(blind.on(batch).logits(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_the_loss_is_summed_in_float64_over_a_half_precision_base(tmp_path, architecture, dtype):
    """A half-precision loss has steps of 0.03 (bfloat16) near 4.6: two points closer than that would look equal."""
    _, objective = load(tmp_path, architecture, **{"fwdllm.base.compute_dtype": dtype})
    batch_loss = objective.on(tiny_batch(classifier=architecture == "bert"))
    with torch.no_grad():
        loss = batch_loss.here()
    logits = batch_loss.logits()
    assert (logits.dtype, loss.dtype) == (torch.float32, torch.float64)
    picked = torch.log_softmax(logits.double(), -1).gather(1, batch_loss.targets[:, None])
    assert float(loss) == pytest.approx(-float(picked.mean()), rel=1e-6)
    assert float(loss) != float(loss.float())


def test_a_loss_that_is_not_a_number_is_not_hidden(tmp_path):
    model, objective = load(tmp_path, "bert", "head")
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    assert torch.isnan(objective.on(tiny_batch()).here())


@pytest.mark.parametrize("left", ["none", "first"])
def test_a_batch_without_a_label_is_an_error(tmp_path, left):
    """The first token has no position that predicts it, so a label there alone is none."""
    _, objective = load(tmp_path, "llama")
    batch = batch_of("padded")
    labels = torch.full_like(batch.labels, IGNORED_LABEL)
    if left == "first":
        labels[:, 0] = batch.input_ids[:, 0]
    with pytest.raises(DataError, match=r"no label.*raise llm\.tok_len"):
        objective.on(replace(batch, labels=labels))


def test_an_empty_classification_batch_is_an_error(tmp_path):
    _, objective = load(tmp_path, "bert")
    batch = tiny_batch()
    parts = {name: getattr(batch, name)[:0] for name in ("input_ids", "attention_mask", "labels")}
    empty = replace(batch, **parts)
    with pytest.raises(DataError, match="no label"):
        objective.on(empty)


@pytest.mark.parametrize(("architecture", "method"), [("llama", "lora"), ("bert", "full"), ("gpt2", "full")])
def test_here_at_stack_and_function_are_one_function(tmp_path, architecture, method):
    _, objective = load(tmp_path, architecture, method)
    batch_loss = objective.on(tiny_batch(classifier=architecture == "bert"))
    trainables = batch_loss.trainables
    before = trainables.digest()
    points = [[value + shift for value in trainables.copy_values()] for shift in (0.0, 0.02, -0.03)]
    with torch.no_grad():
        single = [batch_loss.at(point) for point in points]
        assert torch.equal(single[0], batch_loss.here())
        stacked = batch_loss.at_stack([torch.stack(parts) for parts in zip(*points, strict=True)])
        with batch_loss.replayed():
            pure = [batch_loss.function()(tuple(point)) for point in points]
        assert all(torch.equal(one, two) for one, two in zip(single, pure, strict=True))
    torch.testing.assert_close(stacked, torch.stack(single), rtol=2e-6, atol=0)
    assert len({float(loss) for loss in single}) == 3
    assert trainables.digest() == before


def test_losses_are_means_over_labels_and_sizes_count_samples(tmp_path):
    _, objective = load(tmp_path, "llama")
    whole = objective.on(batch_of("padded"))
    per_label = F.cross_entropy(whole.logits(), whole.targets, reduction="none")
    with torch.no_grad():
        assert float(whole.here()) == pytest.approx(float(per_label.mean()), rel=1e-6)
    assert whole.size == 3
