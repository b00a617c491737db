"""Perturbing one module at a time evaluates exactly the loss that perturbing everything at once does."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fs_fwdllm.core.direction import DirectionKey, Gaussian, Rademacher
from fs_fwdllm.core.replay import Contributions, add_contributions
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import ModelError
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.model.perturbation import ResidentPerturbation, StreamedPerturbation, make_perturbation
from tests.model.tiny import ARCHITECTURES, DECODERS, VOCABULARY, save_tiny_model, tiny_batch, tiny_config

KEY = DirectionKey(5, 77)
RADIUS = 0.02


def load(folder, architecture, method="full", **changes):
    classifier = architecture not in DECODERS
    config = tiny_config(save_tiny_model(folder / "m", architecture, **changes), method, classifier=classifier)
    loaded = load_model(config, load_tokenizer(config), 3)
    trainables = Trainables.of_model(loaded.model)
    objective = Objective(loaded.model, trainables, loaded.task, conduct=loaded.conduct)
    return loaded.model, trainables, objective.on(tiny_batch(classifier=classifier))


def slow_loss(batch_loss, key, coefficient, distribution):
    """The reference: a copy of all parameters, moved by the replay's own addition."""
    moved = batch_loss.trainables.clone()
    add_contributions(moved.tensors, Contributions([key.seed], [coefficient]), key.run_seed, distribution)
    with torch.no_grad():
        return batch_loss.at(moved.tensors)


def assert_streamed_is_resident(model, trainables, batch_loss, distribution=None):
    distribution = distribution or Rademacher()
    resident = ResidentPerturbation(trainables, distribution)
    streamed = StreamedPerturbation(model, trainables, distribution)
    before, pointers = trainables.digest(), [tensor.data_ptr() for tensor in trainables.tensors]
    with torch.no_grad():
        clean = batch_loss.here()
    seen = {float(clean)}
    for key in (KEY, DirectionKey(5, 78), KEY):
        for coefficient in (RADIUS, -RADIUS):
            expected = slow_loss(batch_loss, key, coefficient, distribution)
            found = streamed.loss(batch_loss, key, coefficient)
            assert torch.equal(resident.loss(batch_loss, key, coefficient), found)
            if isinstance(distribution, Rademacher):
                assert torch.equal(found, expected)
            else:  # a normal number times the step is rounded, or not, before it is added
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
            assert trainables.digest() == before
            assert [tensor.data_ptr() for tensor in trainables.tensors] == pointers
            seen.add(float(expected))
    assert len(seen) == 5, "two directions and two signs give four losses, none of them the clean one"
    with torch.no_grad():
        assert torch.equal(batch_loss.here(), clean)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_equals_resident_on_every_architecture(tmp_path, architecture):
    """GPT-2 and BLOOM tie their embeddings, ALBERT runs one block twice."""
    assert_streamed_is_resident(*load(tmp_path, architecture))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tmp_path, architecture, tied):
    model, trainables, batch_loss = load(tmp_path, architecture, tie_word_embeddings=tied)
    assert ("lm_head.weight" in trainables.names) is not tied
    assert_streamed_is_resident(model, trainables, batch_loss)


def test_gaussian_directions(tmp_path):
    assert_streamed_is_resident(*load(tmp_path, "bert"), Gaussian())


@pytest.mark.parametrize("method", ["lora", "bottleneck", "bitfit", "layernorm", "head"])
def test_streaming_some_of_the_parameters(tmp_path, method):
    model, trainables, batch_loss = load(tmp_path, "bert", method)
    assert_streamed_is_resident(model, trainables, batch_loss)


class Unusual(nn.Module):
    """A classifier most of whose parameters are read by somebody other than their owner's forward pass.

    ``MultiheadAttention`` reads its output projection's weight, a dictionary and a list only hold parameters, one
    module calls another while it uses its own, one calls itself, and two modules share a tensor while both run.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.table = nn.ParameterDict({"scale": torch.full((width,), 1.5), "shift": torch.full((width,), 0.1)})
        self.steps = nn.ParameterList([torch.full((width,), 0.3), torch.full((width,), 0.2)])
        self.outer = Outer(width)
        self.unused = nn.Linear(width, 3)
        self.late = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)
        self.uses_late = False

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        hidden = hidden + self.attention(hidden, hidden, hidden, key_padding_mask=attention_mask == 0)[0]
        hidden = hidden * self.table["scale"] + self.table["shift"]
        for step in self.steps:
            hidden = hidden + torch.sin(step * hidden)
        hidden = self.outer(hidden, 2)
        if self.uses_late:
            hidden = hidden + self.late(hidden)
        return SimpleNamespace(logits=self.head(hidden[:, 0]))


class Outer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width) * 0.5)
        self.inner = nn.Linear(width, width)
        self.inner.weight = self.weight

    def forward(self, hidden: torch.Tensor, depth: int) -> torch.Tensor:
        # Its own weight is read before, and again after, a call that reads the same tensor.
        hidden = torch.tanh(self.inner(F.linear(hidden, self.weight)))
        hidden = self(hidden, depth - 1) if depth else hidden
        return F.linear(hidden, self.weight)


def unusual():
    torch.manual_seed(0)
    model = Unusual().eval()
    trainables = Trainables.of_model(model)
    return model, trainables, Objective(model, trainables, "classification").on(tiny_batch())


def test_parameters_that_are_read_by_others():
    model, trainables, batch_loss = unusual()
    named = {"attention.out_proj.weight", "table.scale", "steps.0", "outer.weight", "unused.weight"}
    assert named <= set(trainables.names)
    assert "outer.inner.weight" not in trainables.names
    assert_streamed_is_resident(model, trainables, batch_loss)


@pytest.mark.parametrize("name", ["attention.out_proj.weight", "table.scale", "steps.1", "outer.weight", "head.bias"])
def test_each_of_them_is_perturbed(name):
    """Everything else is frozen, so the loss moves if and only if this tensor does."""
    model, _, _ = unusual()
    model.requires_grad_(False)
    model.get_parameter(name).requires_grad_(True)
    trainables = Trainables.of_model(model)
    assert trainables.names == (name,)
    assert_streamed_is_resident(model, trainables, Objective(model, trainables, "classification").on(tiny_batch()))


def test_a_module_that_runs_only_later():
    """It was not reached when the model was looked at first, and must not be perturbed twice once it is."""
    model, trainables, batch_loss = unusual()
    streamed = StreamedPerturbation(model, trainables, Rademacher())
    streamed.loss(batch_loss, KEY, RADIUS)
    model.uses_late = True
    assert torch.equal(streamed.loss(batch_loss, KEY, RADIUS), slow_loss(batch_loss, KEY, RADIUS, Rademacher()))


def test_the_extra_memory_is_the_largest_module(tmp_path):
    model, trainables, batch_loss = load(tmp_path, "llama")
    streamed = StreamedPerturbation(model, trainables, Rademacher())
    streamed.loss(batch_loss, KEY, RADIUS)
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    assert sum(buffer.numel() for buffer in streamed.scratch) == largest


def test_hooks_do_nothing_outside_an_evaluation(tmp_path):
    model, trainables, batch_loss = load(tmp_path, "bert")
    with torch.no_grad():
        before = batch_loss.here()
    streamed = [StreamedPerturbation(model, trainables, Rademacher()) for _ in range(2)]
    with torch.no_grad():
        assert torch.equal(batch_loss.here(), before)
    expected = slow_loss(batch_loss, KEY, RADIUS, Rademacher())
    assert all(torch.equal(one.loss(batch_loss, KEY, RADIUS), expected) for one in streamed)


def test_an_error_between_the_hooks_leaves_every_parameter(tmp_path):
    """Another hook raises after some module was perturbed and before, or after, the next one is."""
    model, trainables, batch_loss = load(tmp_path, "bert")
    layer = model.bert.encoder.layer[1].attention.self.query
    before = trainables.digest()

    def stop(*_):
        raise RuntimeError("planned")

    first = layer.register_forward_pre_hook(stop)
    streamed = StreamedPerturbation(model, trainables, Rademacher())
    last = layer.register_forward_pre_hook(stop)
    for hook in (first, last):
        with pytest.raises(ModelError, match="planned"):
            streamed.loss(batch_loss, KEY, RADIUS)
        assert trainables.digest() == before
        hook.remove()
    assert torch.equal(streamed.loss(batch_loss, KEY, RADIUS), slow_loss(batch_loss, KEY, RADIUS, Rademacher()))


@pytest.mark.parametrize("early", [True, False])
def test_an_error_the_model_handles_itself_does_not_confuse_the_bookkeeping(early):
    """It comes from a module's forward pass or, early, before that module's parameters were perturbed."""
    model, trainables, batch_loss = unusual()
    plain = model.outer.forward

    def fail(module, arguments):
        if early:
            raise RuntimeError("handled")

    def forward(hidden, depth):
        with suppress(RuntimeError):
            model.late(hidden[..., :3])  # the wrong width
        return plain(hidden, depth)

    model.late.register_forward_pre_hook(fail)
    model.outer.forward = forward
    assert_streamed_is_resident(model, trainables, batch_loss)


def test_make_perturbation_chooses(tmp_path):
    model, trainables, _ = load(tmp_path, "bert")
    assert isinstance(make_perturbation(model, trainables, Rademacher(), streamed=True), StreamedPerturbation)
    assert isinstance(make_perturbation(model, trainables, Rademacher(), streamed=False), ResidentPerturbation)
