"""The block optimiser against plain PyTorch, and the published optimiser's defects, none of which it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fs_fwdllm.config.own_sections import BlocksConfig
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data.types import Batch
from fs_fwdllm.estimator import Backprop
from fs_fwdllm.method.cybgd.blocks import block_plan
from fs_fwdllm.method.cybgd.optimiser import BlockOptimizer, OptimizerSettings, visit_steps
from fs_fwdllm.model.objective import Objective
from tests.host.small import World
from tests.model.tiny import tiny_batch

LEARNING_RATE = 0.01
KINDS = ("SGD", "AdamW", "Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta")


class Visit:
    """A tiny Llama whose second layer is trained."""

    def __init__(self, world: World, dtype: torch.dtype = torch.float32, layer: int = 1) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(world.model("llama"), dtype=dtype).eval()
        self.model.config.use_cache = False
        plan = block_plan(self.model, BlocksConfig())
        self.names = plan.blocks[layer].parameters
        self.parameters = [self.model.get_parameter(name) for name in self.names]
        self.objective = Objective(self.model, Trainables.of_model(self.model, half=True), "causal_lm")
        self.model.requires_grad_(False)
        self.start = [parameter.detach().float().clone() for parameter in self.parameters]

    def train(self, batches: Sequence[Batch], state: Any = None, **settings: Any) -> BlockOptimizer:
        rate = settings.pop("rate", LEARNING_RATE)
        checkpointing = settings.pop("checkpointing", False)
        optimizer = BlockOptimizer(self.parameters, self.start, OptimizerSettings(**settings), state)
        backprop = Backprop(self.model, gradient_checkpointing=checkpointing)
        self.losses = optimizer.train(self.objective, backprop, batches, rate)
        return optimizer


def some_batches(count: int) -> list[Batch]:
    return [tiny_batch(classifier=False, rows=2 + index % 2, tokens=5 + index) for index in range(count)]


def reference(visit: Visit, batches: Sequence[Batch], make: Any, clip: float = 0.0) -> list[torch.Tensor]:
    """Plain PyTorch on the block's parameters, one step a batch."""
    values = [nn.Parameter(value.clone()) for value in visit.start]
    optimizer = make(values)
    for batch in batches:
        named = dict(zip(visit.names, values, strict=True))
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = torch.func.functional_call(visit.model, named, kwargs=inputs).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(values, clip)
        optimizer.step()
    return [value.detach() for value in values]


def assert_close(visit: Visit, expected: Sequence[torch.Tensor], atol: float = 1e-6) -> None:
    for ours, theirs in zip(visit.parameters, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-4, atol=atol)


def test_k_steps_are_pytorch_s_adamw_with_decay_on_matrices_only(world: World) -> None:
    """The published optimiser applied AdamW's default decay to everything, whatever was asked for."""
    visit, batches = Visit(world), some_batches(4)

    def make(values: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": [v for v in values if v.dim() > 1], "weight_decay": 0.3},
                  {"params": [v for v in values if v.dim() == 1], "weight_decay": 0.0}]  # fmt: skip
        return torch.optim.AdamW(groups, lr=LEARNING_RATE)

    expected = reference(visit, batches, make)
    visit.train(batches, kind="AdamW", weight_decay=0.3)
    assert_close(visit, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimiser_takes_exactly_one_step_a_gradient_and_keeps_its_state(world: World, kind: str) -> None:
    """The published optimisers stepped twice (GPT-2), or forgot their state after each step (K = -1)."""
    visit, batches = Visit(world), some_batches(3)
    extra = {"weight_decay": 0.0} if kind == "AdamW" else {}
    expected = reference(visit, batches, lambda values: getattr(torch.optim, kind)(values, lr=LEARNING_RATE, **extra))
    optimizer = visit.train(batches, kind=kind)
    assert optimizer.steps == 3
    # RMSprop divides the rounding of a gradient that is almost zero by a root that is as small
    assert_close(visit, expected, atol=5e-5 if kind == "RMSprop" else 1e-6)
    steps = {float(state["step"]) for state in optimizer.state() if "step" in state}
    assert steps <= {3.0}


def test_clipping_is_over_the_active_block(world: World) -> None:
    visit, batches = Visit(world), some_batches(2)
    expected = reference(visit, batches, lambda values: torch.optim.SGD(values, lr=LEARNING_RATE), clip=0.05)
    visit.train(batches, kind="SGD", clip=0.05)
    assert_close(visit, expected)
    moved = (
        sum(float((p.detach() - s).square().sum()) for p, s in zip(visit.parameters, visit.start, strict=True)) ** 0.5
    )
    assert moved <= 2 * LEARNING_RATE * 0.05 * 1.01


def test_accumulation_is_the_mean_gradient_and_a_rest_is_a_step_of_its_own(world: World) -> None:
    visit, batch = Visit(world), some_batches(1)[0]
    visit.train([batch], kind="SGD")
    once = [parameter.detach().clone() for parameter in visit.parameters]
    optimizer = visit.train([batch] * 4, kind="SGD", accumulate=4)
    assert optimizer.steps == 1 == visit_steps(4, 4) and len(visit.losses) == 4
    assert_close(visit, once)
    assert visit.train([batch] * 5, kind="SGD", accumulate=4).steps == 2


def test_the_learning_rate_follows_its_schedule_over_the_visit(world: World) -> None:
    visit, batch = Visit(world), some_batches(1)[0]
    rates = []
    original = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args)

    torch.optim.SGD.step = spy  # type: ignore[method-assign]
    try:
        visit.train([batch] * 4, kind="SGD", shape="linear")
    finally:
        torch.optim.SGD.step = original  # type: ignore[method-assign]
    assert rates == pytest.approx([LEARNING_RATE * (1 - step / 4) for step in range(4)])


def test_a_bfloat16_model_moves_as_a_float32_one_because_of_its_master(world: World) -> None:
    """Learning rate 1e-6: a step is far below what a bfloat16 weight resolves."""
    half = Visit(world, torch.bfloat16)
    full = Visit(world)
    full.start = [value.clone() for value in half.start]
    batches = some_batches(2) * 15
    master = half.train(batches, kind="AdamW", rate=1e-6).masters
    full.train(batches, kind="AdamW", rate=1e-6)
    moved = [torch.ne(m, s).float().mean() for m, s in zip(master, half.start, strict=True)]
    assert min(moved) > 0.95
    change = torch.cat([(m - s).flatten() for m, s in zip(master, half.start, strict=True)])
    wanted = torch.cat([(p.detach() - s).flatten() for p, s in zip(full.parameters, full.start, strict=True)])
    assert float(torch.cosine_similarity(change, wanted, dim=0)) > 0.9
    for parameter, value in zip(half.parameters, master, strict=True):
        assert torch.equal(parameter.detach(), value.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(world: World, dtype: torch.dtype) -> None:
    half, full = Visit(world, dtype), Visit(world)
    full.start = half.start
    batches = some_batches(3)
    half.train(batches, kind="SGD", rate=0.1)
    full.train(batches, kind="SGD", rate=0.1)
    for ours, theirs in zip(half.losses, full.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)


def test_float16_lowers_its_loss_scale_until_nothing_overflows_and_loses_no_step(world: World) -> None:
    visit = Visit(world, torch.float16)
    with torch.no_grad():
        visit.model.lm_head.weight.mul_(2000)
    optimizer = visit.train(some_batches(3), kind="SGD", rate=1e-6)
    assert optimizer.steps == 3 and optimizer.loss_scale < 2.0**15
    assert all(bool(torch.isfinite(master).all()) for master in optimizer.masters)


def test_backward_stops_at_the_active_block(world: World) -> None:
    """Layers below it build no graph, with checkpointing too; nothing but the block receives a gradient."""
    for checkpointing in (False, True):
        visit = Visit(world)
        graphs: list[bool] = []

        def note(module: nn.Module, args: Any, output: Any, graphs: list[bool] = graphs) -> None:
            graphs.append((output[0] if isinstance(output, tuple) else output).requires_grad)

        for layer in visit.model.model.layers:
            layer.register_forward_hook(note)
        visit.train(some_batches(1), kind="SGD", checkpointing=checkpointing)
        assert graphs[:2] == [False, True]
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in visit.model.parameters())


def test_checkpointing_changes_nothing_but_memory(world: World) -> None:
    plain, recomputed = Visit(world, layer=0), Visit(world, layer=0)
    plain.train(some_batches(2), kind="AdamW")
    recomputed.train(some_batches(2), kind="AdamW", checkpointing=True)
    assert_close(recomputed, [parameter.detach() for parameter in plain.parameters])


def test_a_parameter_without_gradient_is_left_alone(world: World) -> None:
    """The published optimiser asserts that there is one; experts that saw no token have none."""
    visit = Visit(world)
    unused = nn.Parameter(torch.ones(3, 3))
    visit.parameters.append(unused)
    visit.start.append(torch.ones(3, 3))
    visit.train(some_batches(2), kind="AdamW", weight_decay=0.5)
    assert torch.equal(unused.detach(), torch.ones(3, 3))


def test_a_visit_in_two_halves_with_its_state_is_the_whole_visit(world: World) -> None:
    visit, batches = Visit(world), some_batches(4)
    whole = [master.detach().clone() for master in visit.train(batches, kind="AdamW").masters]
    optimizer = visit.train(batches[:2], kind="AdamW")
    visit.start = [master.detach().clone() for master in optimizer.masters]
    resumed = visit.train(batches[2:], state=optimizer.state(), kind="AdamW")
    for ours, theirs in zip(resumed.masters, whole, strict=True):
        assert torch.equal(ours.detach(), theirs)
    forgetful = visit.train(batches[2:], kind="AdamW").masters
    assert not all(torch.equal(ours.detach(), theirs) for ours, theirs in zip(forgetful, whole, strict=True))
