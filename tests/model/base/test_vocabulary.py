"""Losses taken block by block of a vocabulary are those of whole rows of logits, to the bit, and so are derivatives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.base.codecs import Plain, rows_at_a_time
from fs_fwdllm.model.base.packed import PackedLinear
from fs_fwdllm.model.base.vocabulary import can_judge, judging
from fs_fwdllm.model.log_sum_exp import SLICE_COLUMNS, cross_entropies
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.model.trial import PADDED_RIGHT
from tests.model.architectures import ARCHITECTURES
from tests.model.base.test_reading import load
from tests.model.base.test_streaming import STREAM
from tests.model.tiny import DECODERS, save_tiny_model, tiny_batch, tiny_config

HIDDEN = 256
#: Below a slice, a slice, some more, and several with a rest; blocks of 4,096 rows do not divide the last ones.
VOCABULARIES = [50, SLICE_COLUMNS, SLICE_COLUMNS + 1, 3 * SLICE_COLUMNS + 77]


class Setup:
    def __init__(self, vocabulary: int, kind: str = "linear", dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = (torch.randn(vocabulary, HIDDEN, generator=generator) / 8).to(dtype)
        self.hidden = torch.randn(19, HIDDEN, generator=generator).to(dtype)
        self.targets = torch.randint(0, vocabulary, (19,), generator=generator)
        self.head: Any = nn.Linear(HIDDEN, vocabulary, bias=False, dtype=dtype)
        self.head.weight = nn.Parameter(self.weight, requires_grad=False)
        if kind == "packed":
            self.head = PackedLinear(Plain(vocabulary, HIDDEN), {"weight": self.weight}, dtype=dtype)

    def losses(self, hidden: torch.Tensor, differentiable: bool = True) -> torch.Tensor:
        with judging(self.head, self.targets, "derivatives" if differentiable else "nothing") as found:
            self.head(hidden)
        return found[0].losses

    def plain(self, hidden: torch.Tensor) -> torch.Tensor:
        """Slow and obvious, in float64."""
        return F.cross_entropy(hidden.double() @ self.weight.double().T, self.targets, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "packed"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_losses_and_predictions_are_those_of_whole_rows(vocabulary: int, kind: str, dtype: torch.dtype) -> None:
    it = Setup(vocabulary, kind, dtype)
    with judging(it.head, it.targets, "predictions") as found:
        it.head(it.hidden)
    blocks = [F.linear(it.hidden, rows) for rows in it.weight.split(rows_at_a_time(HIDDEN, dtype))]
    logits = torch.cat(blocks, dim=1).float()
    assert torch.equal(found[0].losses, cross_entropies(logits, it.targets))
    assert torch.equal(found[0].predictions, logits.argmax(dim=1))
    assert found[0].losses.dtype == torch.float64
    exact = F.cross_entropy(logits.double(), it.targets, reduction="none")
    torch.testing.assert_close(found[0].losses, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["linear", "packed"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_derivatives_are_those_of_whole_rows(vocabulary: int, kind: str) -> None:
    it = Setup(vocabulary, kind)
    weights = torch.linspace(-1, 1, len(it.targets), dtype=torch.float64)
    exact = it.hidden.double().requires_grad_()
    (it.plain(exact) * weights).sum().backward()
    assert exact.grad is not None
    hidden = it.hidden.clone().requires_grad_()
    (it.losses(hidden) * weights).sum().backward()
    torch.testing.assert_close(hidden.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)

    tangents = torch.randn(3, *hidden.shape, generator=torch.Generator().manual_seed(1))

    def weighted(moved: torch.Tensor) -> torch.Tensor:
        return (it.losses(moved) * weights).sum()

    expected = (exact.grad * tangents.double()).sum(dim=(1, 2))
    for number, tangent in enumerate(tangents):
        torch.testing.assert_close(jvp(weighted, (it.hidden,), (tangent,))[1], expected[number], rtol=1e-5, atol=1e-6)
    together = vmap(lambda tangent: jvp(weighted, (it.hidden,), (tangent,))[1])(tangents)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)
    points = it.hidden + tangents
    one_by_one = torch.stack([weighted(point) for point in points])
    torch.testing.assert_close(vmap(weighted)(points), one_by_one, rtol=1e-6, atol=1e-6)


class Widths(TorchDispatchMode):
    """Notes the widths of all matrices of so many rows that operations make."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.seen = rows, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(one, torch.Tensor) and one.dim() == 2 and len(one) == self.rows:
                self.seen.add(one.shape[1])
        return made


def decoder(tmp_path: Path, architecture: str, **changes: Any) -> Any:
    place = save_tiny_model(tmp_path / architecture, architecture, **changes)
    config = tiny_config(place, "lora", classifier=False, **{"fwdllm.attention": "eager"})
    return load_model(config, load_tokenizer(config), 0)


def objective_of(loaded: Any, **changes: Any) -> Objective:
    return Objective(
        loaded.model, Trainables.of_model(loaded.model), loaded.task, **{"conduct": loaded.conduct, **changes}
    )


def test_a_step_makes_no_row_of_logits(tmp_path: Path) -> None:
    vocabulary = 5 * SLICE_COLUMNS
    loaded = decoder(tmp_path, "llama", vocab_size=vocabulary, hidden_size=512)
    batch = tiny_batch(classifier=False)
    widest, losses = [], []
    for conduct in (loaded.conduct, PADDED_RIGHT):
        batch_loss = objective_of(loaded, conduct=conduct).on(batch)
        with torch.no_grad(), Widths(len(batch_loss.targets)) as widths:
            losses.append(batch_loss.here())
        widest.append(max(widths.seen))
    assert widest[0] <= SLICE_COLUMNS + rows_at_a_time(512, torch.float32) < widest[1] == vocabulary
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-7, atol=0)


@pytest.mark.parametrize("architecture", DECODERS)
def test_every_decoder_says_the_same_without_logits(tmp_path: Path, architecture: str) -> None:
    loaded = decoder(tmp_path, architecture)
    batch = tiny_batch(classifier=False)
    judged, plain = objective_of(loaded), objective_of(loaded, conduct=PADDED_RIGHT)
    assert not plain.judges_in_head
    for one, other in zip(judged.on(batch).judged(), plain.on(batch).judged(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(judged.on(batch).here(), plain.on(batch).here(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 3.0}),
    ],
)
def test_what_follows_the_head_is_not_forgotten(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    row = ARCHITECTURES[architecture]
    config = row.run_config(row.save(tmp_path / "model", **changes), "lora", attention="eager")
    loaded = load_model(config, load_tokenizer(config), 0)
    objective = objective_of(loaded)
    assert not objective.judges_in_head
    batch = tiny_batch(classifier=False)
    with torch.no_grad():
        expected = loaded.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        assert float(objective.on(batch).here()) == pytest.approx(float(expected), rel=1e-5)


def test_a_head_that_is_trained_or_added_to_keeps_its_logits() -> None:
    it = Setup(50)
    assert can_judge(it.head)
    it.head.weight.requires_grad_(True)
    assert not can_judge(it.head)
    for change in (
        lambda head: head.register_forward_hook(lambda *call: call[2] + 1),
        lambda head: setattr(head, "bias", nn.Parameter(torch.zeros(50))),
        lambda head: setattr(head, "forward", lambda hidden: hidden),
    ):
        head = Setup(50).head
        change(head)
        assert not can_judge(head)
    assert not can_judge(None)
    assert not can_judge(nn.Identity())


def test_a_head_is_itself_again_after_an_error() -> None:
    it = Setup(50)
    with pytest.raises(RuntimeError), judging(it.head, it.targets, "nothing"):
        it.head(it.hidden[:, :-1])
    assert it.head(it.hidden).shape == (19, 50)


@pytest.mark.parametrize("differentiable", [True, False])
def test_over_the_disk_it_is_what_it_is_in_memory(tmp_path: Path, differentiable: bool) -> None:
    folder = save_tiny_model(tmp_path / "llama", "llama", vocab_size=2 * SLICE_COLUMNS + 9)
    own: dict[str, Any] = {"fwdllm.attention": "eager"}
    resident, streamed = load(folder, **own), load(folder, base=STREAM, **own)
    losses = []
    for loaded in (resident, streamed):
        objective = objective_of(loaded)
        assert objective.judges_in_head
        batch_loss = objective.on(tiny_batch(classifier=False))
        point = tuple(objective.trainables.tensors)
        with torch.no_grad():
            losses.append(
                jvp(batch_loss.function(), (point,), (tuple(map(torch.ones_like, point)),))[:2]
                if differentiable
                else (batch_loss.here(),)
            )
    for one, other in zip(*losses, strict=True):
        assert torch.equal(one, other)
