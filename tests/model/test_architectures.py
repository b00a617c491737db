"""What must hold for every architecture, on tiny models of more than a hundred of them.

A law per test: the loss is Hugging Face's; a sample alone is the sample in a batch; probes in one pass are probes one
by one; forward mode is backpropagation times the direction; what is saved is what was evaluated. Where an architecture
cannot do something, the run says so and goes on, or stops with an error that names the key.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from fs_fwdllm.core.direction import DirectionKey, make_distribution
from fs_fwdllm.data.types import Batch
from fs_fwdllm.errors import EstimatorError, FwdLLMError, ModelError
from fs_fwdllm.estimator import Backprop
from fs_fwdllm.estimator.base import stack_directions
from fs_fwdllm.method import Parts
from fs_fwdllm.model import LoadedModel, load_model, load_tokenizer, save_trained
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.model.quiet import quiet_transformers
from tests.model.architectures import ARCHITECTURES, AUTO_CLASSES, FAST, Architecture, described, row_of

KEYS = [DirectionKey(5, seed) for seed in range(3)]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


@dataclass
class Case:
    """A loaded architecture, its trainables moved off their start."""

    row: Architecture
    folder: Path
    estimator: str = "forward_mode"

    @cached_property
    def loaded(self) -> LoadedModel:
        estimator = self.estimator if self.row.forward_mode else "central"
        return self.load("lora", attention="eager", estimator=estimator)

    @cached_property
    def parts(self) -> Parts:
        return self.assemble(self.loaded)

    @cached_property
    def batch(self) -> Batch:
        return self.row.batch()

    @property
    def objective(self) -> Objective:
        return self.parts.objective

    def load(self, method: str, **own: object) -> LoadedModel:
        self.config = self.row.run_config(self.folder, method, **own)
        return load_model(self.config, load_tokenizer(self.config), 3)

    def assemble(self, loaded: LoadedModel) -> Parts:
        parts = Parts.build(
            self.config, loaded.model, loaded.task, loaded.tokenizer.pad_token_id, full=loaded.peft_method == "full",
            conduct=loaded.conduct, trial=loaded.trial,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in parts.trainables.tensors:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
        return parts

    def slopes(self, estimator: str, probes_per_batch: int) -> tuple[np.ndarray, tuple[str, ...]]:
        own = self.config.fwdllm.model_copy(
            update={"estimator": estimator, "probes_per_batch": probes_per_batch, "radius": 0.01}
        )
        parts = self.parts.with_config(self.config.model_copy(update={"fwdllm": own}))
        before = parts.trainables.digest()
        measured = parts.measuring(make_distribution("rademacher"))(1).slopes(self.objective.on(self.batch), [KEYS])
        assert parts.trainables.digest() == before
        return measured.values, parts.remarks


def _rows(which: list[str]) -> list[object]:
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in which]


@pytest.fixture(scope="module", params=_rows([name for name, row in ARCHITECTURES.items() if not row.refused]))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    row = ARCHITECTURES[request.param]
    found = Case(row, row.save(tmp_path_factory.mktemp("architecture") / "model"))
    assert found.parts.trainables.count
    yield found


def hugging_face(model: torch.nn.Module, row: Architecture, batch: Batch) -> transformers.utils.ModelOutput:
    inputs = {"input_ids": torch.as_tensor(batch.input_ids)}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = torch.as_tensor(batch.attention_mask)
    labels = torch.as_tensor(batch.labels)
    if row.task == "question_answering":
        inputs |= {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    else:
        inputs["labels"] = labels
    with torch.no_grad():
        return model(**inputs)


def every_logit(row: Architecture, output: transformers.utils.ModelOutput) -> torch.Tensor:
    if row.task == "question_answering":
        return torch.stack([output.start_logits, output.end_logits])
    return output.logits


def test_the_loss_is_hugging_faces(case: Case) -> None:
    """Sample by sample, since Hugging Face gives padding a chance in spans, and the wrong side to some."""
    batches = [case.batch] if case.row.task == "causal_lm" else [row_of(case.batch, row) for row in range(3)]
    for batch in batches:
        reference = float(hugging_face(case.loaded.model, case.row, batch).loss)
        with torch.no_grad():
            assert float(case.objective.on(batch).here()) == pytest.approx(reference, rel=1e-6)


def test_a_sample_alone_is_the_sample_in_a_batch(case: Case) -> None:
    assert case.loaded.conduct.padding == case.row.padding
    assert bool(case.loaded.conduct.remarks()) == (case.row.padding != "right")
    together = case.objective.on(case.batch).logits()
    alone = [case.objective.on(row_of(case.batch, row)).logits() for row in range(3)]
    if case.row.task == "question_answering":
        for row, (starts, ends) in enumerate(alone):
            width = len(starts)
            torch.testing.assert_close(together[row, :width], starts, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(together[row + 3, :width], ends, rtol=1e-5, atol=2e-6)
    else:
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=2e-6)


def test_probes_in_one_pass_are_probes_one_by_one(case: Case) -> None:
    """Or are taken one by one after all, which is said."""
    if any("expert" in key for key in case.row.sizes):  # loaded for forward mode, they have another kernel
        case = Case(case.row, case.folder, "central")
        assert case.parts.trainables.count
    together, remarks = case.slopes("central", 2)
    single, silent = case.slopes("central", 1)
    assert not silent
    if case.row.batches:
        assert not remarks
        np.testing.assert_allclose(together, single, rtol=1e-4, atol=2e-4)
    else:
        assert "fwdllm.probes_per_batch 2" in remarks[0] and "one by one" in remarks[0]
        assert (together == single).all()


def test_forward_mode_is_backpropagation_times_the_direction(case: Case) -> None:
    """Or is refused by the key, before the first round."""
    if not case.row.forward_mode:
        with pytest.raises(EstimatorError, match=r"fwdllm\.estimator 'forward_mode'.*use fwdllm\.estimator: central"):
            case.slopes("forward_mode", 1)
        return
    batch_loss, trainables = case.objective.on(case.batch), case.parts.trainables
    Backprop(case.loaded.model).gradient(batch_loss)
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainables.tensors]
    case.loaded.model.zero_grad(set_to_none=True)
    directions = list(stack_directions(batch_loss, KEYS, make_distribution("rademacher")))
    expected = [
        sum(float((z[k] * g).sum()) for z, g in zip(directions, gradient, strict=True)) for k in range(len(KEYS))
    ]
    for size in (1, 2):
        measured, remarks = case.slopes("forward_mode", size)
        np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-5)
        assert bool(remarks) == (size == 2 and "one by one" in "".join(remarks))


def test_the_adapter_loads_in_plain_peft(case: Case, tmp_path: Path) -> None:
    saved = save_trained(case.loaded, tmp_path)
    with quiet_transformers():
        labels = {"num_labels": 3} if case.row.task == "classification" else {}
        auto = getattr(transformers, AUTO_CLASSES[case.row.task])
        base = auto.from_pretrained(case.folder, attn_implementation="eager", **labels)
        again = PeftModel.from_pretrained(base, saved).eval()
    batch = row_of(case.batch, 0)
    ours = hugging_face(case.loaded.model, case.row, batch)
    torch.testing.assert_close(
        every_logit(case.row, hugging_face(again.get_base_model(), case.row, batch)), every_logit(case.row, ours),
        rtol=1e-5, atol=2e-6,
    )  # fmt: skip


def test_the_whole_model_loads_in_plain_transformers(case: Case, tmp_path: Path) -> None:
    """Bit for bit: positions, padding and ties are those of the run."""
    loaded = case.load("full")
    parts = case.assemble(loaded)
    with torch.no_grad():
        ours = every_logit(case.row, hugging_face(loaded.model, case.row, row_of(case.batch, 0)))
    saved = save_trained(loaded, tmp_path, dict(zip(parts.trainables.names, parts.trainables.tensors, strict=True)))
    with quiet_transformers():
        again = getattr(transformers, AUTO_CLASSES[case.row.task]).from_pretrained(saved).eval()
    assert torch.equal(every_logit(case.row, hugging_face(again, case.row, row_of(case.batch, 0))), ours)


@pytest.mark.parametrize("name", _rows([name for name, row in ARCHITECTURES.items() if row.refused]))
def test_what_cannot_be_trained_says_what_to_do(tmp_path: Path, name: str) -> None:
    row = ARCHITECTURES[name]
    config = row.run_config(row.save(tmp_path / "model"), "lora")
    with pytest.raises(ModelError, match=row.refused) as error:
        load_model(config, load_tokenizer(config), 3)
    assert isinstance(error.value, FwdLLMError)


def test_the_documentation_has_this_matrix() -> None:
    """Paste what ``python -m tests.model.architectures`` prints where it is."""
    assert described() in PAGE.read_text(encoding="utf-8")
    assert len({row.name for row in ARCHITECTURES.values()}) >= 80
