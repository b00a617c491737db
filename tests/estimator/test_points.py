"""A module's points made around its own forward pass have the bits of all points made beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fs_fwdllm.core.direction import DirectionKey, make_distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import EstimatorError
from fs_fwdllm.estimator.points import LayerPoints, ResidentPoints, make_points
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.objective import Objective
from tests.model.tiny import DECODERS, save_tiny_model, tiny_batch, tiny_config

KEYS = [DirectionKey(3, seed) for seed in range(5)]


def both(tmp_path: Path, architecture: str, method: str, **keys: Any) -> tuple[Any, Objective, list[Any]]:
    classifier = architecture not in DECODERS
    config = tiny_config(
        save_tiny_model(tmp_path / "model", architecture), method, classifier=classifier,
        **{"fwdllm.attention": "eager", **keys},
    )  # fmt: skip
    loaded = load_model(config, load_tokenizer(config), 3)
    trainables = Trainables.of_model(loaded.model)
    with torch.no_grad():
        for tensor in trainables.tensors:
            tensor.add_(torch.linspace(-0.1, 0.1, tensor.numel()).view(tensor.shape))
    objective = Objective(loaded.model, trainables, loaded.task, conduct=loaded.conduct)
    distribution = make_distribution("rademacher")
    ways = [
        make_points(loaded.model, trainables, distribution, streamed=streamed) for streamed in (False, True)
    ]  # fmt: skip
    return loaded.model, objective, ways


@pytest.mark.parametrize("offsets", [(0.01, -0.01), (0.003,)])
@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        ("llama", "lora"), ("llama", "ia3"), ("llama", "layernorm"), ("llama", "bottleneck"), ("gpt2", "lora"),
        ("llama", "output_residual"), ("bert", "bitfit"), ("bert", "head"), ("albert", "lora"), ("qwen2", "full"),
    ],
)  # fmt: skip
def test_layer_by_layer_is_all_at_once(
    tmp_path: Path, architecture: str, method: str, offsets: tuple[float, ...]
) -> None:
    model, objective, (resident, layered) = both(tmp_path, architecture, method)
    assert isinstance(resident, ResidentPoints) and isinstance(layered, LayerPoints)
    before = [tensor.detach().clone() for tensor in objective.trainables.tensors]
    loss = objective.on(tiny_batch(classifier=architecture not in DECODERS))
    with torch.no_grad():
        expected = resident.losses(loss, KEYS, offsets)
        for _ in range(2):
            assert torch.equal(layered.losses(loss, KEYS, offsets), expected)
    assert len(set(expected.tolist())) > 1
    assert all(torch.equal(*pair) for pair in zip(before, objective.trainables.tensors, strict=True))
    held = {id(parameter) for parameter in model.parameters()}
    assert all(id(tensor) in held for tensor in objective.trainables.tensors), "every parameter is itself again"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_ends_a_pass_the_parameters_stand_again(tmp_path: Path, error: type[BaseException]) -> None:
    model, objective, (resident, layered) = both(tmp_path, "llama", "lora")
    loss = objective.on(tiny_batch(classifier=False))
    with torch.no_grad():
        expected = resident.losses(loss, KEYS, (0.01,))
        for name, module in [entry for entry in model.named_modules() if "lora_B" in entry[0]][::3]:
            if not isinstance(module, nn.Linear):
                continue

            def stop(*_: Any) -> None:
                raise error("stop")

            handle = module.register_forward_hook(stop)
            with pytest.raises(EstimatorError if error is RuntimeError else error):
                layered.losses(loss, KEYS, (0.01,))
            handle.remove()
            assert torch.equal(layered.losses(loss, KEYS, (0.01,)), expected), name
