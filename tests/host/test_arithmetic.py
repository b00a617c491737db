"""What a run notes of its model: sizes as they are, operations that do not depend on what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fs_fwdllm.config import Config
from fs_fwdllm.running import local
from fs_fwdllm.running.arithmetic import model_facts
from fs_fwdllm.running.session import Session
from tests.host.small import World, read_jsonl

HEAD = {"llm.adapter.args": [{"adapter_package": "fs_fwdllm", "adapter_method": "head"}]}


def facts_of(config: Config) -> dict[str, int]:
    session = Session.open(config)
    return model_facts(session.parts, session.data)


def test_a_pass_costs_the_same_whatever_is_kept_of_it(world: World) -> None:
    kept, whole = (facts_of(world.config({**HEAD, "fwdllm.prefix_cache_mib": mib})) for mib in (64, 0))
    assert kept["forward_flops"] == whole["forward_flops"] > 0
    assert whole["kept_flops"] == 0
    assert 0.9 * kept["forward_flops"] < kept["kept_flops"] < kept["forward_flops"]


def test_operations_are_two_a_weight_and_token(world: World) -> None:
    """Beside what hooks on the linear layers count, there are only the products of the attention."""
    session = Session.open(world.config({"fwdllm.prefix_cache_mib": 0}))
    facts = model_facts(session.parts, session.data)
    seen: list[int] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        seen.append(2 * inputs[0].numel() // inputs[0].shape[-1] * weight.numel())

    layers = [module for module in session.loaded.model.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    model_facts(session.parts, session.data)
    for hook in hooks:
        hook.remove()
    assert sum(seen) <= facts["forward_flops"] < 1.5 * sum(seen)
    assert facts["parameters"] > facts["trainable_parameters"] == session.parts.trainables.count


@pytest.mark.parametrize(("probes", "passes"), [(1, 2), (5, 10)])
def test_a_step_of_central_differences_has_two_passes_a_probe(world: World, probes: int, passes: int) -> None:
    changes = {"federate.method": "fedfwd", "trainer.type": "", "fwdllm.estimator": "central", "fwdllm.probes": probes}
    assert facts_of(world.config(changes))["passes_per_step"] == passes


def test_counting_changes_nothing(world: World) -> None:
    session = Session.open(world.config())
    before = [tensor.detach().clone() for tensor in session.parts.trainables.tensors]
    first, second = (model_facts(session.parts, session.data) for _ in range(2))
    assert first == second
    assert all(map(torch.equal, before, session.parts.trainables.tensors))


def test_a_kernel_that_cannot_be_counted_stops_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no rule for this operator")

    monkeypatch.setattr("fs_fwdllm.running.arithmetic.count_flops", refuse)
    run = local.run(world.config())
    start = read_jsonl(getattr(run, "folder", run) / "metrics.jsonl")[0]
    assert "forward_flops" not in start["model"] and start["model"]["parameters"] > 0
