"""Tiny sentence encoders: a tiny transformer and the files sentence-transformers would lay beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.model.tiny import HIDDEN, save_tiny_model

__all__ = ["save_tiny_encoder"]


def save_tiny_encoder(
    folder: Path,
    architecture: str = "bert",
    *,
    pooling: str = "mean",
    then: tuple[str, ...] = ("Normalize",),
    **own: Any,
) -> Path:
    """Write a tiny encoder to ``folder`` and return it.

    Args:
        pooling: sentence-transformers' word.
        then: classes of the modules after the pooling.
    """
    save_tiny_model(folder, architecture, **own)
    kinds = ["Transformer", "Pooling", *then]
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    settings = {"word_embedding_dimension": HIDDEN, "pooling_mode": pooling}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return folder
