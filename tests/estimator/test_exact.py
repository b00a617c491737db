"""Slopes that follow from a gradient: the closed form of output layers, and projected backpropagation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fs_fwdllm.core.direction import ConfinedDirections, DirectionKey, Rademacher
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data.types import Batch
from fs_fwdllm.errors import EstimatorError
from fs_fwdllm.estimator import Backprop, ClosedForm, Projected
from fs_fwdllm.estimator.exact import project
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.objective import BatchLoss, Objective
from fs_fwdllm.model.output_layer import OutputLayer
from tests.estimator.models import ready
from tests.model.architectures import ARCHITECTURES, FAST
from tests.model.tiny import tiny_batch

KEYS = [DirectionKey(5, seed) for seed in range(7)]

#: Architectures that do something to the logits behind the last linear layer: a scale, a cap.
FOLLOWED = {"cohere", "cohere2", "gemma2", "recurrent_gemma"}
#: Those that can be trained at all; what the others are refused for is tests/model/test_architectures.py's matter.
TRAINABLE = [name for name, row in ARCHITECTURES.items() if not row.refused]


def backpropagated(model: nn.Module, batch_loss: BatchLoss) -> list[torch.Tensor]:
    tensors = batch_loss.trainables.tensors
    Backprop(model).gradient(batch_loss)
    found = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return found


def behind_the_output(objective: Objective, batch: Batch) -> list[int]:
    """Ids of the trainables that the output layer holds."""
    layer = OutputLayer(objective)
    layer.run(objective.on(batch))
    return [index for index, tensor in enumerate(objective.trainables.tensors) if layer.role_of(tensor)]


def require_closed_form(model: nn.Module, objective: Objective, batch: Batch) -> None:
    """The closed form is backpropagation's gradient, to 1e-5 of its length, and leaves every bit in its place."""
    covered = behind_the_output(objective, batch)
    assert covered, "the output layer is trained"
    before = objective.trainables.digest()
    found = ClosedForm(ConfinedDirections(Rademacher(), covered)).gradient(objective.on(batch))
    assert objective.trainables.digest() == before
    assert sorted(found.tensors) == covered and found.passes == (1, 0)
    exact = backpropagated(model, objective.on(batch))
    scale = max(float(exact[index].norm()) for index in covered)  # a span head's biases have none: they move all tokens
    assert scale > 0
    for index, tensor in found.tensors.items():
        assert not tensor.requires_grad
        torch.testing.assert_close(tensor, exact[index], rtol=0, atol=1e-5 * scale)
    with torch.no_grad():
        assert found.loss == float(objective.on(batch).here())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in TRAINABLE]
)
def test_the_closed_form_is_the_gradient_of_every_architectures_head(tmp_path: Path, name: str) -> None:
    row = ARCHITECTURES[name]
    untied = {"tie_word_embeddings": False} if row.task == "causal_lm" else {}
    config = row.run_config(row.save(tmp_path / "model", **untied), "head")
    loaded = load_model(config, load_tokenizer(config), 3)
    trainables = Trainables.of_model(loaded.model)
    objective = Objective(loaded.model, trainables, loaded.task, conduct=loaded.conduct)
    with torch.no_grad():
        for tensor in trainables.tensors:
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    if name in FOLLOWED:
        with pytest.raises(EstimatorError, match=r"closed_form: .*last linear layer.*projected"):
            behind_the_output(objective, row.batch())
        return
    require_closed_form(loaded.model, objective, row.batch())


def test_numbers_have_a_closed_form(tmp_path: Path) -> None:
    it = ready(tmp_path, "bert", "head")
    layer = next(module for module in it.model.modules() if isinstance(module, nn.Linear) and module.out_features == 3)
    with torch.no_grad():
        layer.weight, layer.bias = nn.Parameter(layer.weight[:1].clone()), nn.Parameter(layer.bias[:1].clone())
    layer.out_features = it.model.num_labels = 1
    objective = Objective(it.model, Trainables.of_model(it.model), "regression")
    batch = replace(tiny_batch(), labels=np.array([0.5, -1.5, 2.0], dtype=np.float32))
    require_closed_form(it.model, objective, batch)


def test_words_that_stand_for_classes_have_a_closed_form(tmp_path: Path) -> None:
    it = ready(tmp_path, "gpt2", "head", config={"tie_word_embeddings": False})
    objective = Objective(it.model, it.trainables, "label_words", label_tokens=[9, 4, 21])
    require_closed_form(it.model, objective, tiny_batch())


def test_rows_without_a_target_count_for_nothing(tmp_path: Path) -> None:
    it = ready(tmp_path, "bert", "head")
    batch = tiny_batch()
    labels = np.asarray(batch.labels).copy()
    labels[1] = -100
    require_closed_form(it.model, it.objective, replace(batch, labels=labels))


def test_a_vocabulary_in_slices_is_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = ready(tmp_path, "llama", "head", config={"tie_word_embeddings": False})
    whole = ClosedForm(Rademacher()).gradient(it.loss())
    monkeypatch.setattr("fs_fwdllm.estimator.closed_form.ERROR_ELEMENTS", 40)
    sliced = ClosedForm(Rademacher()).gradient(it.loss())
    torch.testing.assert_close(sliced.tensors, whole.tensors, rtol=1e-6, atol=1e-8)


def test_any_number_of_slopes_takes_one_pass_and_no_graph(tmp_path: Path) -> None:
    it = ready(tmp_path, "bert", "head")
    passes: list[bool] = []
    it.model.bert.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    estimator, batch_loss = it.estimator(estimator="closed_form"), it.loss()
    estimator.slopes(batch_loss, KEYS)
    passes.clear()
    keys = [DirectionKey(5, seed) for seed in range(300)]
    slopes = estimator.slopes(batch_loss, keys)
    assert passes == [False] and (slopes.forward_passes, slopes.backward_passes) == (1, 0)
    assert slopes.values.shape == (300,) and slopes.values.dtype == np.float32


def test_closed_form_is_forward_mode(tmp_path: Path) -> None:
    """Slopes of both, to 1e-5 of the gradient's length."""
    it = ready(tmp_path, "bert", "head", **{"fwdllm.attention": "eager"})
    closed, dual = (it.estimator(estimator=kind).slopes(it.loss(), KEYS) for kind in ("closed_form", "forward_mode"))
    scale = float(torch.cat([part.flatten() for part in backpropagated(it.model, it.loss())]).norm())
    np.testing.assert_allclose(closed.values, dual.values, rtol=0, atol=1e-5 * scale)
    assert closed.loss == pytest.approx(dual.loss, rel=1e-6)


@pytest.mark.parametrize(("architecture", "method"), [("llama", "lora"), ("bert", "full"), ("albert", "bottleneck")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_projected_slopes_are_products_with_the_gradient(
    tmp_path: Path, architecture: str, method: str, checkpointing: bool
) -> None:
    it = ready(tmp_path, architecture, method)
    estimator = it.estimator(estimator="projected", gradient_checkpointing=checkpointing)
    slopes = estimator.slopes(it.loss(), KEYS)
    exact = dict(enumerate(backpropagated(it.model, it.loss())))
    np.testing.assert_allclose(slopes.values, project(exact, KEYS, Rademacher()), rtol=1e-5, atol=1e-6)
    assert (slopes.forward_passes, slopes.backward_passes) == (1 + checkpointing, 1)
    assert all(tensor.grad is None for tensor in it.trainables.tensors)


def test_the_product_of_slices_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a float64 loop over whole directions."""
    generator = torch.Generator().manual_seed(2)
    tensors = {index: torch.randn(shape, generator=generator) for index, shape in enumerate([(3, 5), (77,), (4, 4, 9)])}
    for name, value in (("DEFAULT_CHUNK", 30), ("BLOCK_ELEMENTS", 64)):
        monkeypatch.setattr(f"fs_fwdllm.estimator.exact.{name}", value)

    def product(key: DirectionKey) -> float:
        """One direction after the other, whole."""
        flat = {index: tensor.double().flatten().numpy() for index, tensor in tensors.items()}
        whole = {index: Rademacher().values([key], index, 0, len(values))[0] for index, values in flat.items()}
        return sum(float(whole[index].astype(np.float64) @ values) for index, values in flat.items())

    expected = [product(key) for key in KEYS]
    np.testing.assert_allclose(project(tensors, KEYS, Rademacher()), expected, rtol=1e-5, atol=1e-5)


def test_a_trainable_below_the_boundary_is_refused_by_name(tmp_path: Path) -> None:
    it = ready(tmp_path, "bert", "lora")
    with pytest.raises(EstimatorError, match=r"closed_form: '.*lora_A.*fwdllm\.parts \(probes, projected, frozen\)"):
        it.estimator(estimator="closed_form").slopes(it.loss(), KEYS)


def test_a_head_that_shares_its_weight_with_the_embeddings_is_refused(tmp_path: Path) -> None:
    it = ready(tmp_path, "gpt2", "full")
    with pytest.raises(EstimatorError, match="does not lie behind the last linear layer"):
        it.estimator(estimator="closed_form").slopes(it.loss(), KEYS)


def test_logits_that_are_changed_behind_the_layer_are_refused(tmp_path: Path) -> None:
    it = ready(tmp_path, "llama", "head", config={"tie_word_embeddings": False})

    class Capped(type(it.model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = torch.tanh(output.logits)
            return output

    it.model.__class__ = Capped
    with pytest.raises(EstimatorError, match="a scale, a cap or another head follows"):
        it.estimator(estimator="closed_form").slopes(it.loss(), KEYS)


def test_work_that_fails_leaves_no_gradient(tmp_path: Path) -> None:
    it = ready(tmp_path, "bert", "head")

    class Failing(Backprop):
        def gradient(self, batch_loss: BatchLoss, scale: float = 1.0) -> float:
            super().gradient(batch_loss)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Projected(Rademacher(), Failing(it.model)).slopes(it.loss(), KEYS)
    assert all(tensor.grad is None for tensor in it.trainables.tensors)
