"""After any estimate, and after any accident during one, the parameters are bit for bit what they were."""

from __future__ import annotations

import pytest
import torch

from fs_fwdllm.config.registries import ESTIMATORS
from fs_fwdllm.core.direction import DIRECTIONS
from fs_fwdllm.errors import EstimatorError, ModelError
from fs_fwdllm.estimator import Backprop
from tests.estimator.models import ANYWHERE, KEYS, base_hash, nothing_is_patched, ready

#: Every estimator of whatever is trained, one probe at a time and several where it can; and every distribution.
ALONE = {name: {"estimator": name} for name in ANYWHERE}
BATCHED = {
    f"{name}, batched": {"estimator": name, "probes_per_batch": 3}
    for name in ANYWHERE
    if ESTIMATORS[name].largest_batch(len(KEYS)) >= 3
}
CONFIGURATIONS = {**ALONE, **BATCHED, **{name: {"estimator": "central", "direction": name} for name in DIRECTIONS}}
METHODS = ["lora", "full", "head", "bottleneck"]
CASES = [
    (architecture, method, dtype)
    for architecture in ("bert", "llama")
    for method in METHODS
    for dtype in ("float32", "bfloat16")
    if (method, dtype) != ("full", "bfloat16")  # full training holds its weights in float32
]


class Stop(RuntimeError):
    pass


def load(folder, architecture, method, dtype, cache_bytes=1 << 20):
    keys = {"fwdllm.base.compute_dtype": dtype, "fwdllm.attention": "eager"}
    return ready(folder, architecture, method, cache_bytes=cache_bytes, **keys)


def late_module(model, method):
    """A module late in the forward pass that is called whatever is trained; a frozen output layer need not be."""
    ends = ("classifier", "lm_head" if method == "head" else "model.norm")
    return next(module for name, module in reversed(list(model.named_modules())) if name.endswith(ends))


def state(it):
    return (
        it.trainables.digest(),
        [tensor.data_ptr() for tensor in it.trainables.tensors],
        base_hash(it.model),
        nothing_is_patched(it.model),
    )


@pytest.mark.parametrize(("architecture", "method", "dtype"), CASES)
def test_every_estimator_restores_every_bit(tmp_path, architecture, method, dtype):
    it = load(tmp_path, architecture, method, dtype)
    before, batch_loss = state(it), it.loss()
    assert before[3]
    for name, settings in CONFIGURATIONS.items():
        slopes = it.estimator(radius=0.01, **settings).slopes(batch_loss, KEYS).values
        assert state(it) == before, name
        assert slopes.std() > 0, name
    for checkpointing in (False, True):
        Backprop(it.model, gradient_checkpointing=checkpointing).gradient(batch_loss)
        assert state(it) == before
    assert not it.model.training


@pytest.mark.parametrize("accident", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize(("method", "cache_bytes"), [*((method, 0) for method in METHODS), ("head", 1 << 20)])
def test_an_accident_in_the_middle_restores_every_bit(tmp_path, architecture, method, cache_bytes, accident):
    it = load(tmp_path, architecture, method, "float32", cache_bytes)
    before, batch_loss = state(it), it.loss()
    late = late_module(it.model, method)
    early = it.model.get_submodule(next(n for n, _ in it.model.named_modules() if n.endswith(("dense", "o_proj"))))
    inside = [late] if cache_bytes else [early, late]
    for name, settings in {**ALONE, **BATCHED}.items():
        estimator = it.estimator(radius=0.01, **settings)
        expected = estimator.slopes(batch_loss, KEYS).values
        for module in inside:
            fuse = Fuse(module, accident, calls=2)
            with fuse, pytest.raises((ModelError, EstimatorError) if accident is Stop else accident):
                for _ in range(3):
                    estimator.slopes(batch_loss, KEYS)
            assert state(it) == before, name
            assert (estimator.slopes(batch_loss, KEYS).values == expected).all(), name


class Fuse:
    """Makes the forward pass of ``module`` raise in the given call, after the parameters were prepared."""

    def __init__(self, module, accident, calls):
        self.module, self.accident, self.left = module, accident, calls

    def __enter__(self):
        self.original = type(self.module).forward
        fuse = self

        def forward(module, *args, **kwargs):
            if module is fuse.module:
                fuse.left -= 1
                if fuse.left == 0:
                    raise fuse.accident("planned")
            return fuse.original(module, *args, **kwargs)

        type(self.module).forward = forward

    def __exit__(self, *exception):
        type(self.module).forward = self.original


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_accident_in_backpropagation_leaves_no_patch(tmp_path, checkpointing):
    it = load(tmp_path, "bert", "lora", "float32")
    before, batch_loss = state(it), it.loss()
    with Fuse(late_module(it.model, "lora"), Stop, calls=1), pytest.raises(ModelError, match="Stop: planned"):
        Backprop(it.model, gradient_checkpointing=checkpointing).gradient(batch_loss)
    assert state(it) == before


@pytest.mark.parametrize(("architecture", "method", "dtype"), CASES)
def test_two_evaluations_at_one_point_agree_bit_for_bit(tmp_path, architecture, method, dtype):
    """Every dropout in the configuration is 0.5: one that is not off would show."""
    it = load(tmp_path, architecture, method, dtype)
    batch_loss = it.loss()
    with torch.no_grad():
        assert torch.equal(batch_loss.here(), batch_loss.here())
        elsewhere = [tensor.detach() * 1.5 for tensor in it.trainables.tensors]
        first = batch_loss.at(elsewhere)
        assert not torch.equal(first, batch_loss.here())
        assert torch.equal(first, batch_loss.at(elsewhere))
    for name, settings in CONFIGURATIONS.items():
        twice = [it.estimator(radius=0.01, **settings).slopes(batch_loss, KEYS) for _ in range(2)]
        assert (twice[0].values == twice[1].values).all(), name
        assert twice[0].loss == twice[1].loss, name
    it.model.train()
    with torch.no_grad():
        assert not torch.equal(it.loss().here(), it.loss().here()), "dropout would be noticed"
