"""The prefix cache changes how often frozen layers run, and not a bit of any result."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fs_fwdllm.core.direction import DirectionKey, make_distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import FwdLLMError
from fs_fwdllm.estimator import Backprop, make_estimator
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.objective import Objective
from tests.estimator.models import ANYWHERE
from tests.model.tiny import DECODERS, HIDDEN, LAYERS, VOCABULARY, save_tiny_model, tiny_batch, tiny_config

KEYS = [DirectionKey(5, seed) for seed in range(3)]
LARGE = 1 << 24
LAST = LAYERS - 1

#: (architecture, method, arguments): what is trained lies in the last layer or above it.
LATE = [
    ("bert", "head", {}),
    ("bert", "lora", {"layers_to_transform": [LAST]}),
    ("bert", "lora", {"layers_to_transform": [LAST], "target_modules": ["intermediate.dense"]}),
    ("bert", "bottleneck", {"layers": [LAST]}),
    ("roberta", "head", {}),
    ("roberta", "lora", {"layers_to_transform": [LAST]}),
    ("distilbert", "head", {}),
    ("distilbert", "lora", {"layers_to_transform": [LAST]}),
    ("distilbert", "bottleneck", {"layers": [LAST]}),
    ("llama", "head", {}),
    ("llama", "lora", {"layers_to_transform": [LAST]}),
    ("llama", "lora", {"layers_to_transform": [LAST], "target_modules": ["down_proj"]}),
    ("llama", "bottleneck", {"layers": [LAST]}),
    ("llama", "ia3", {"target_modules": [f"layers.{LAST}.mlp.down_proj"]}),
    ("llama", "layernorm", {"target_modules": ["model.norm"]}),
    ("gpt2", "lora", {"layers_to_transform": [LAST]}),
    ("gpt2", "lora", {"layers_to_transform": [LAST], "target_modules": ["mlp.c_proj"]}),
    ("gpt2", "bottleneck", {"layers": [LAST]}),
    ("albert", "head", {}),
    ("llama", "output_residual", {"rank": 4}),
    ("gpt2", "output_residual", {"rank": 4}),
]
LATE_IDS = ["-".join([architecture, method, *map(str, more.values())]) for architecture, method, more in LATE]
CASES = pytest.mark.parametrize(("architecture", "method", "arguments"), LATE, ids=LATE_IDS)


class Twin:
    """One model with a caching and a plain objective."""

    def __init__(self, folder, architecture, method, arguments, budget=LARGE, depth=LAYERS, **keys):
        self.classifier = architecture not in DECODERS
        place = folder / f"{architecture}{len(list(folder.iterdir()))}"
        settings = {"fwdllm.attention": "eager", **keys}
        arguments = {"r": 2, **arguments} if method == "lora" else arguments
        layers = {} if depth == LAYERS else {"num_hidden_layers": depth}
        config = tiny_config(
            save_tiny_model(place, architecture, **layers), method, classifier=self.classifier, **arguments, **settings
        )
        loaded = load_model(config, load_tokenizer(config), 3)
        self.model, self.trainables = loaded.model, Trainables.of_model(loaded.model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in self.trainables.tensors:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
        self.cached = Objective(self.model, self.trainables, loaded.task, budget, conduct=loaded.conduct)
        self.plain = Objective(self.model, self.trainables, loaded.task, conduct=loaded.conduct)
        self.cache = self.cached.cache

    def batch(self, key="a", **changes):
        return replace(tiny_batch(classifier=self.classifier, **changes), key=key)

    def step(self):
        with torch.no_grad():
            for tensor in self.trainables.tensors:
                tensor.mul_(1.01)

    def estimator(self, **settings):
        config = tiny_config("unused", "full", **{f"fwdllm.{key}": value for key, value in settings.items()}).fwdllm
        return make_estimator(self.model, self.trainables, make_distribution(config.direction), config, full=False)

    def gradient(self, batch_loss, **settings):
        for tensor in self.trainables.tensors:
            tensor.grad = None
        loss = Backprop(self.model, **settings).gradient(batch_loss)
        return [torch.tensor(loss), *(tensor.grad for tensor in self.trainables.tensors)]


def nothing_is_patched(model):
    return not any("forward" in vars(module) for module in model.modules())


def assert_same_losses(twin, batch):
    cached, plain = twin.cached.on(batch), twin.plain.on(batch)
    assert torch.equal(cached.logits(), plain.logits())
    with torch.no_grad():
        assert torch.equal(cached.here(), plain.here())
    assert nothing_is_patched(twin.model)
    return cached, plain


def assert_same_gradients(twin, batch, **settings):
    cached, plain = assert_same_losses(twin, batch)
    for left, right in zip(twin.gradient(cached, **settings), twin.gradient(plain, **settings), strict=True):
        assert torch.equal(left, right)
        assert torch.isfinite(left).all()
    assert nothing_is_patched(twin.model)


def assert_same_everything(twin, batch):
    cached, plain = assert_same_losses(twin, batch)
    for kind, size in itertools.product(ANYWHERE, (1, 2)):  # loop, vmap, jvp, vmap of jvp
        estimator = twin.estimator(estimator=kind, radius=0.01, probes_per_batch=size)
        with_cache, without = estimator.slopes(cached, KEYS), estimator.slopes(plain, KEYS)
        assert (with_cache.values == without.values).all(), kind
        assert with_cache.loss == without.loss
        assert with_cache.values.any()
    assert_same_gradients(twin, batch)


@CASES
def test_nothing_changes_by_a_bit(tmp_path, architecture, method, arguments):
    twin = Twin(tmp_path, architecture, method, arguments)
    batches = [twin.batch("a"), twin.batch("b", rows=2, tokens=9), twin.batch(None, rows=1)]
    for batch in batches:
        assert_same_everything(twin, batch)
    hits, misses = twin.cache.hits, twin.cache.misses
    assert (hits, misses) == (2, 4), "each batch was asked for twice, and the one without a key is never kept"
    twin.step()
    assert_same_everything(twin, batches[0])
    assert (twin.cache.hits, twin.cache.misses) == (hits + 2, misses)
    assert twin.cache.used_bytes > 0


@CASES
def test_nothing_changes_under_gradient_checkpointing(tmp_path, architecture, method, arguments):
    """The backward pass runs a checkpointed layer again, when the playback of the forward pass is long over."""
    twin = Twin(tmp_path, architecture, method, arguments)
    for _ in range(2):
        assert_same_gradients(twin, twin.batch(), gradient_checkpointing=True)
        twin.step()
    plain, checkpointed = (
        twin.gradient(twin.cached.on(twin.batch()), gradient_checkpointing=value) for value in (False, True)
    )
    assert all(torch.equal(left, right) for left, right in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize(("architecture", "method", "arguments"), LATE[::3], ids=LATE_IDS[::3])
def test_half_precision_base(tmp_path, architecture, method, arguments):
    twin = Twin(tmp_path, architecture, method, arguments, **{"fwdllm.base.compute_dtype": "bfloat16"})
    for batch in (twin.batch("a"), twin.batch("b", rows=2)):
        assert_same_everything(twin, batch)
    assert twin.cache.hits == 2


@CASES
def test_the_lowest_layer_runs_once_a_batch(tmp_path, architecture, method, arguments):
    twin = Twin(tmp_path, architecture, method, arguments)
    projection = next(m for n, m in twin.model.named_modules() if n.endswith(("query", "q_proj", "q_lin", "c_attn")))
    calls = []
    projection.register_forward_pre_hook(lambda *_: calls.append(1))
    runs = LAYERS if architecture == "albert" else 1
    for expected, key in ((1, "a"), (1, "a"), (2, "b"), (2, "a"), (3, None), (4, None)):
        batch_loss = twin.cached.on(twin.batch(key))
        for kind in ANYWHERE:
            twin.estimator(estimator=kind).slopes(batch_loss, KEYS)
        twin.gradient(batch_loss, gradient_checkpointing=True)
        assert len(calls) == expected * runs


@pytest.mark.parametrize("budget", [0, 1])
def test_without_a_budget_nothing_is_kept(tmp_path, budget):
    twin = Twin(tmp_path, "bert", "head", {}, budget)
    for _ in range(2):
        assert_same_losses(twin, twin.batch())
    assert (twin.cache.hits, twin.cache.used_bytes) == (0, 0)
    assert twin.cache.misses == 2 * budget, "a budget of zero switches recording off altogether"


def test_a_full_cache_admits_nothing_and_drops_nothing(tmp_path):
    twin = Twin(tmp_path, "bert", "head", {})
    twin.cached.on(twin.batch("size"))
    one = twin.cache.used_bytes
    twin = Twin(tmp_path, "bert", "head", {}, budget=2 * one + one // 2)
    for _ in range(3):
        for key in "abcd":
            assert_same_losses(twin, twin.batch(key))
    assert twin.cache.used_bytes == 2 * one
    assert (twin.cache.hits, twin.cache.misses) == (4, 8)
    twin.cached.on(twin.batch("small", rows=1))
    twin.cached.on(twin.batch("small", rows=1))
    assert twin.cache.hits == 5, "what still fits is still admitted"


def test_keys_are_not_mixed_up(tmp_path):
    """Equal keys are trusted to mean equal tensors, so different batches under different keys must stay apart."""
    twin = Twin(tmp_path, "llama", "lora", {"layers_to_transform": [LAST]})
    batches = [twin.batch(("client", index), rows=rows) for index, rows in enumerate((1, 2, 3))]
    for batch in [*batches, *batches[::-1]]:
        with torch.no_grad():
            assert torch.equal(twin.cached.on(batch).here(), twin.plain.on(batch).here())


@pytest.mark.parametrize(
    ("architecture", "method", "arguments"),
    [
        *((architecture, "lora", {}) for architecture in ("bert", "llama", "gpt2")),
        *((architecture, "layernorm", {}) for architecture in ("bert", "gpt2")),
        ("llama", "lora", {"layers_to_transform": [0]}),
        ("bert", "full", {}),
    ],
)
def test_trainables_in_the_first_layer_switch_it_off(tmp_path, architecture, method, arguments):
    twin = Twin(tmp_path, architecture, method, arguments)
    assert_same_everything(twin, twin.batch())
    assert twin.cache.used_bytes == 0
    misses = twin.cache.misses
    assert_same_losses(twin, twin.batch())
    assert twin.cache.misses == misses, "it does not try again"


@pytest.mark.parametrize("rows", [1, 3])
def test_a_head_over_a_pooler_keeps_one_vector_a_sample(tmp_path, rows):
    for tokens in (7, 16):
        twin = Twin(tmp_path, "bert", "head", {})
        twin.cached.on(twin.batch(rows=rows, tokens=tokens))
        vectors = rows * HIDDEN * 4
        assert vectors <= twin.cache.used_bytes <= vectors + 64


@pytest.mark.parametrize(
    ("architecture", "method", "states"),
    [("bert", "lora", 1), ("llama", "lora", 2), ("llama", "bottleneck", 3), ("bert", "bottleneck", 2)],
)
def test_what_is_kept_does_not_grow_with_the_depth(tmp_path, architecture, method, states):
    """What the boundary's layer still reads, however many layers are below, and four bytes for each other output.

    In hidden states: BERT's attention reads one; Llama's the normed and the residual one. A bottleneck reads the frozen
    feed-forward output and leaves the residual one to be added, which for Llama is itself a sum of two.
    """
    for depth in (2, 6):
        arguments = {"layers_to_transform" if method == "lora" else "layers": [depth - 1]}
        twin = Twin(tmp_path, architecture, method, arguments, depth=depth)
        batch = twin.batch()
        twin.cached.on(batch)
        tensors = states * batch.input_ids.numel() * HIDDEN * 4
        assert tensors <= twin.cache.used_bytes <= tensors + 64


@pytest.mark.parametrize("accident", [RuntimeError, KeyboardInterrupt])
def test_an_accident_leaves_nothing_patched(tmp_path, accident):
    raised = FwdLLMError if accident is RuntimeError else accident
    twin = Twin(tmp_path, "bert", "lora", {"layers_to_transform": [LAST]})
    layers = twin.model.base_model.model.bert.encoder.layer
    armed = True

    def stop(*_):
        if armed:
            raise accident("planned")

    recording = layers[0].attention.self.query.register_forward_pre_hook(stop)
    with pytest.raises(raised):
        twin.cached.on(twin.batch())
    assert nothing_is_patched(twin.model)
    recording.remove()
    armed = False
    layers[LAST].output.dense.register_forward_pre_hook(stop)
    batch_loss = twin.cached.on(twin.batch())
    for kind in ANYWHERE:
        for size in (1, 2):
            armed = True
            with pytest.raises(raised):
                twin.estimator(estimator=kind, probes_per_batch=size).slopes(batch_loss, KEYS)
            with pytest.raises(raised):
                twin.gradient(batch_loss, gradient_checkpointing=size == 2)
            assert nothing_is_patched(twin.model)
            armed = False
            assert_same_gradients(twin, twin.batch())


class Glue(nn.Module):
    """A classifier whose code between modules does what it likes: it writes in place, and reads a child's weight.

    Writing into the input of a linear layer leaves it without a backward pass, as quantised kernels are.
    """

    def __init__(self, *, in_place: bool, direct: bool, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.low = nn.Linear(width, width)
        self.middle = nn.Linear(width, width)
        self.high = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)
        self.in_place, self.direct = in_place, direct

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        hidden = self.low(self.embedding(input_ids))
        if self.in_place:
            hidden.mul_(3.0)
        if self.direct:
            hidden = torch.nn.functional.linear(hidden, self.middle.weight)
        hidden = self.high(hidden)
        pooled = hidden[:, 0]
        logits = self.head(pooled)
        if self.in_place:
            pooled.add_(1.0)  # after the boundary
            logits = logits + self.head(pooled)
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("trained", "in_place", "direct"),
    [
        ("head", True, False),
        *((trained, *more) for trained in ("head", "middle") for more in ((False, True), (True, True))),
    ],
)
def test_glue_code_that_writes_in_place_or_reads_a_weight_directly(in_place, direct, trained):
    torch.manual_seed(0)
    model = Glue(in_place=in_place, direct=direct).eval().requires_grad_(False)
    model.get_submodule(trained).requires_grad_(True)
    trainables = Trainables.of_model(model)
    cached, plain = (Objective(model, trainables, "classification", budget) for budget in (LARGE, 0))
    batch = replace(tiny_batch(), key="a")
    for _ in range(3):
        one, two = cached.on(batch), plain.on(batch)
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(one.here(), two.here())
                for tensor in trainables.tensors:
                    tensor.mul_(1.1)
