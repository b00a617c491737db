"""The configuration that tests of block training start from."""

from __future__ import annotations

from typing import Any

__all__ = ["BLOCKS", "blocks"]

#: Three steps of AdamW a visit, on the whole of a tiny model.
BLOCKS: dict[str, Any] = {
    "federate.method": "fedcybgd",
    "llm.adapter.use": False,
    "llm.adapter.args": [{}],
    "train.optimizer.type": "AdamW",
    "train.optimizer.lr": 0.01,
    "train.local_update_steps": 3,
}


def blocks(**changes: Any) -> dict[str, Any]:
    """:data:`BLOCKS` with changes below ``fwdllm.blocks``; ``download_`` leads one level down."""
    named = {key.replace("download_", "download.", 1): value for key, value in changes.items()}
    return {**BLOCKS, **{f"fwdllm.blocks.{key}": value for key, value in named.items()}}
