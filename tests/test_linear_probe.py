"""The reference against scikit-learn called by hand, on features taken from the model by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers.modeling_outputs import SequenceClassifierOutput
from typer.testing import CliRunner

from fs_fwdllm.cli.main import app
from fs_fwdllm.config import dump_config
from fs_fwdllm.data.batches import evaluation_batches
from fs_fwdllm.errors import ConfigError, DataError
from fs_fwdllm.evaluation.linear_probe import STRENGTHS, features_of, fit_linear_probe
from fs_fwdllm.forecast.plan import make_plan
from fs_fwdllm.forecast.reference import reference_of
from fs_fwdllm.running.session import Session
from tests.host.fixtures import models, world
from tests.host.small import World
from tests.model.architectures import ARCHITECTURES
from tests.model.sentence import save_tiny_encoder

__all__ = ["models", "world"]

ASKED = {"fwdllm.report.linear_probe": True, "data.splits": [0.6, 0.2, 0.2]}


@pytest.mark.parametrize("method", ["head", "lora", "bottleneck"])
@pytest.mark.parametrize("pools", [True, False])
def test_features_are_what_the_classifier_reads(world: World, method: str, pools: bool) -> None:
    folder = save_tiny_encoder(world.root / "encoder")
    settings = {
        **ASKED, "llm.adapter.args": [{"adapter_method": method}], "model.type": f"{folder}@transformers",
        "fwdllm.pooling": "auto" if pools else "none",
    }  # fmt: skip
    session = Session.open(world.config(settings))
    batches = evaluation_batches(session.data.test, 4, 1, "by hand")
    found, labels = features_of(session.parts.objective, batches)
    assert labels.tolist() == [label for batch in batches for label in batch.labels.tolist()]
    model = session.loaded.model
    (classifier,) = [
        module for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad and module.out_features == 3
    ]  # fmt: skip
    by_hand = torch.from_numpy(found).float() @ classifier.weight.T + classifier.bias
    logits = torch.cat([session.parts.objective.on(batch).logits() for batch in batches])
    torch.testing.assert_close(by_hand, logits, rtol=1e-5, atol=1e-5)


def test_the_strength_is_chosen_on_validation_rows_alone() -> None:
    generator = np.random.default_rng(0)
    truth = generator.normal(size=5)

    def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
        features = 3 + 2 * generator.normal(size=(count, 5))
        return features, (features @ truth + 4 * generator.normal(size=count) > 3 * truth.sum()).astype(int)

    training, validation, evaluated = rows(60), rows(200), rows(300)
    found = fit_linear_probe(training, validation, evaluated)
    mean, deviation = training[0].mean(axis=0), training[0].std(axis=0)
    scores = {}
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1000).fit((training[0] - mean) / deviation, training[1])
        pairs = (((split[0] - mean) / deviation, split[1]) for split in (validation, evaluated))
        scores[strength] = [model.score(*pair) for pair in pairs]
    best = max(scores, key=lambda strength: scores[strength][0])
    assert (found.strength, found.accuracy) == (best, pytest.approx(scores[best][1]))
    assert (found.rows, found.features) == (60, 5)
    alone = fit_linear_probe(training, None, evaluated)
    assert alone.strength in STRENGTHS and alone.rows == 60


def test_the_plan_prints_it_on_request_only(world: World) -> None:
    config = world.config({**ASKED, "federate.method": "fedfwd"})
    session = Session.open(config)
    expected = reference_of(session)
    splits = {"train": [row for client in session.data.clients.values() for row in client.train]}
    splits |= {"val": session.data.val, "test": session.data.test}
    rows = {
        name: features_of(session.parts.objective, evaluation_batches(examples, 5, 1, f"by hand, {name}"))
        for name, examples in splits.items()
    }
    assert expected.accuracy == fit_linear_probe(rows["train"], rows["val"], rows["test"]).accuracy
    plan = make_plan(config)
    assert plan.reference == expected
    assert expected.rows == sum(len(client.train) for client in session.data.clients.values())
    config.fwdllm.report.linear_probe = False
    assert make_plan(config).reference is None and "reference" not in dict(make_plan(config).rows())
    file = world.root / "run.yaml"
    file.write_text(dump_config(config))
    printed = CliRunner().invoke(
        app, ["plan", str(file), "fwdllm.report.linear_probe", "True"], env={"COLUMNS": "300", "NO_COLOR": "1"}
    )
    assert printed.exit_code == 0, printed.output
    assert f"logistic regression on the same frozen features: accuracy {expected.accuracy:.4f}" in printed.output


def test_where_validation_is_evaluated_it_does_not_choose(world: World) -> None:
    session = Session.open(world.config({**ASKED, "data.splits": [0.8, 0.2, 0.0], "eval.split": ["val"]}))
    found = reference_of(session)
    assert 0 <= found.accuracy <= 1 and found.rows == sum(session.client_samples.values())


@pytest.mark.parametrize("name", ["fnet/classes", "gpt2/classes"])
def test_rows_keep_their_labels_whatever_the_model_makes_of_a_batch(world: World, name: str) -> None:
    """One gets rows of one length at a time; the other's head reads every token, and one of them is the row's."""
    folder = ARCHITECTURES[name].save(world.root / "model")
    session = Session.open(world.config({**ASKED, "model.type": f"{folder}@transformers", **HEAD}))
    together, one_by_one = (
        features_of(session.parts.objective, evaluation_batches(session.data.test, size, 1, f"{size} rows"))
        for size in (32, 1)
    )
    assert together[1].tolist() == one_by_one[1].tolist()
    np.testing.assert_allclose(together[0], one_by_one[0], rtol=1e-4, atol=1e-5)


HEAD = {"llm.adapter.args": [{"adapter_method": "head"}]}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"llm.adapter.use": False}, "this run trains the parameters that make them"),
        ({"federate.method": "fedcybgd", "llm.adapter.use": False}, "this run trains the parameters"),
        ({"model.num_labels": 1}, "is a reference for classifiers"),
    ],
)
def test_it_is_refused_where_nothing_is_frozen_or_classified(world: World, own: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"fwdllm\.report\.linear_probe: .*{message}"):
        make_plan(world.config({**ASKED, **own}))
    with pytest.raises(ConfigError, match="task is causal_lm"):
        make_plan(world.config(ASKED, language_model=True))


def test_a_head_that_is_not_linear_names_the_way_out(world: World) -> None:
    session = Session.open(world.config({**ASKED, **HEAD}))
    session.loaded.model.register_forward_hook(
        lambda module, given, output: SequenceClassifierOutput(logits=output.logits.tanh())
    )
    batches = evaluation_batches(session.data.test, 4, 1, "bent")
    with pytest.raises(ConfigError, match=r"does not end in a linear layer; set fwdllm\.pooling \(mean"):
        features_of(session.parts.objective, batches)


def test_one_label_is_no_classification() -> None:
    same = np.ones((4, 2)), np.zeros(4)
    with pytest.raises(DataError, match="all training rows have one label"):
        fit_linear_probe(same, None, same)
