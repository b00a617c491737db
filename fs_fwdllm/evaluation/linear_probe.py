"""What a linear classifier reaches on the features that a run's head reads: the reference a run should come near.

A run that trains a head over a frozen body solves, in the end, a logistic regression, with the data divided over
clients and with noisy gradients. Here it is solved as such: the features of all clients' training rows are computed
once, scikit-learn fits the weights, the strength of the regularisation is chosen on validation rows, and the accuracy
on the evaluation split is what is left to say. No client would send its features; this is for a simulation, which
holds everybody's data.

The features are what the last linear layer of the classifier is given before anything was trained. Adapters start as
the identity, so they are those of the frozen base.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from fs_fwdllm.data.types import Batch
from fs_fwdllm.errors import ConfigError, DataError, EstimatorError
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.model.output_layer import OutputLayer

__all__ = ["STRENGTHS", "LinearProbe", "features_of", "fit_linear_probe"]

#: What is tried for the inverse of the penalty on the weights, of features at deviation one.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
#: Share of the training rows that stand in for validation rows where there are none.
_HELD_OUT = 0.2
_MOST_STEPS = 1000

#: ``[rows, features]`` and ``[rows]``.
Rows = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class LinearProbe:
    """The reference.

    Attributes:
        accuracy: on the evaluation split.
        rows: training rows, of all clients together.
        features: numbers that describe one.
        strength: of :data:`STRENGTHS`, the best on the validation rows.
    """

    accuracy: float
    rows: int
    features: int
    strength: float

    def __str__(self) -> str:
        return (
            f"logistic regression on the same frozen features: accuracy {self.accuracy:.4f} ({self.rows:,} rows of all "
            f"clients, {self.features:,} features)"
        )


def features_of(objective: Objective, batches: Sequence[Batch]) -> Rows:
    """What the last linear layer of a classifier reads of every row, and the labels.

    Raises:
        ConfigError: the logits are not what a linear layer puts out.
        DataError: there is no row.
    """
    if not batches:
        raise DataError("fwdllm.report.linear_probe: a split that it needs has no row; check data.splits")
    layer, found = OutputLayer(objective), []
    for batch in batches:
        try:
            found.append(layer.run(objective.on(batch)).features.cpu().numpy().astype(np.float64))
        except EstimatorError as error:
            raise ConfigError(
                "fwdllm.report.linear_probe: this classifier does not end in a linear layer; set fwdllm.pooling "
                "(mean, for one), or leave the key out"
            ) from error
    return np.concatenate(found), np.concatenate([batch.labels for batch in batches])


def fit_linear_probe(training: Rows, validation: Rows | None, evaluated: Rows) -> LinearProbe:
    """Fit on training rows, choose the penalty on validation rows, and count on the evaluated ones.

    Args:
        validation: ``None`` holds a fifth of the training rows out for the choice, and fits all of them in the end.

    Raises:
        DataError: the training rows have a single class.
    """
    if len(np.unique(training[1])) < 2:
        raise DataError("fwdllm.report.linear_probe: all training rows have one label; there is nothing to tell apart")
    scaler = StandardScaler().fit(training[0])
    known = scaler.transform(training[0]), training[1]
    fitted, chooser = known, validation and (scaler.transform(validation[0]), validation[1])
    if chooser is None:
        order = np.random.default_rng(0).permutation(len(known[1]))
        cut = max(1, round(_HELD_OUT * len(order)))
        chooser, fitted = _taken(known, order[:cut]), _taken(known, order[cut:])
        if len(np.unique(fitted[1])) < 2:
            raise DataError("fwdllm.report.linear_probe: too few training rows to hold some out; give validation rows")
    models = {strength: _fitted(fitted, strength) for strength in STRENGTHS}
    best = max(STRENGTHS, key=lambda strength: float(models[strength].score(*chooser)))
    model = models[best] if validation is not None else _fitted(known, best)
    accuracy = float(model.score(scaler.transform(evaluated[0]), evaluated[1]))
    return LinearProbe(accuracy, len(known[1]), known[0].shape[1], best)


def _taken(rows: Rows, which: np.ndarray) -> Rows:
    return rows[0][which], rows[1][which]


def _fitted(rows: Rows, strength: float) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what is not reached in so many steps changes no figure
        return LogisticRegression(C=strength, max_iter=_MOST_STEPS).fit(*rows)
