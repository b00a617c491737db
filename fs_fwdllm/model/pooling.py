"""What ``fwdllm.pooling`` and ``fwdllm.feature_scale`` come to for a model: from which vector a classifier reads.

``auto`` follows the model's own ``modules.json``: a sentence encoder is read the way it was trained to be read, every
other model by its architecture's own head. A new head on a sentence encoder reads standardised vectors.
"""

from __future__ import annotations

from dataclasses import replace

from fs_fwdllm.config import Config
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.model.sentence_layout import SentenceLayout, read_layout
from fs_fwdllm.model.source import ModelSource

__all__ = ["chosen_layout", "layout_remarks", "resolved"]

#: How a new head's vectors are scaled; docs/results-learning.md has what was compared.
_DEFAULT_SCALE = "layer_norm"


def chosen_layout(config: Config, source: ModelSource) -> SentenceLayout | None:
    """How a classifier makes the vectors that its head reads; ``None`` for the architecture's own head.

    Raises:
        ConfigError: a key is set for a model that is no classifier, or a scale without a pooling.
        ModelError: the model's ``modules.json`` is damaged.
    """
    pooling: str = config.fwdllm.pooling
    scale: str = config.fwdllm.feature_scale
    if source.task != "classification" and pooling not in ("auto", "none"):
        raise ConfigError(
            f"fwdllm.pooling: is {pooling!r}, but only a classifier (PATH@transformers with model.task "
            "SequenceClassification) pools its tokens; leave the key out"
        )
    own = read_layout(source.location) if source.task == "classification" and pooling != "none" else None
    if pooling == "auto":
        chosen = own if own is not None and not own.unknown else None
    else:
        chosen = None if pooling == "none" else SentenceLayout(tuple(pooling.split("+")))
    if chosen is None:
        if scale not in ("auto", "none"):
            raise ConfigError(
                f"fwdllm.feature_scale: is {scale!r}, but this model's head is its architecture's own, which scales "
                "nothing; leave the key out, or set fwdllm.pooling (mean, for one)"
            )
        return None
    has_head = own is not None and bool(own.head) and chosen.pooling == own.pooling
    if scale == "auto":
        scale = own.scale if own is not None and has_head else _DEFAULT_SCALE
    head = own.head if own is not None and has_head and scale == own.scale else ""
    return replace(chosen, scale=scale, head=head)


def resolved(layout: SentenceLayout | None) -> dict[str, str]:
    """The two keys of ``fwdllm`` as ``auto`` has come out."""
    if layout is None:
        return {"pooling": "none", "feature_scale": "none"}
    return {"pooling": "+".join(layout.pooling), "feature_scale": layout.scale}


def layout_remarks(config: Config, source: ModelSource, layout: SentenceLayout | None) -> list[str]:
    """What a user should know of ``auto``."""
    if config.fwdllm.pooling != "auto" or source.task != "classification":
        return []
    own = read_layout(source.location)
    if layout is not None:
        return [
            f"classifies by the vectors of a sentence encoder: pooling {'+'.join(layout.pooling)}, as its modules.json "
            f"says, scale {layout.scale} (fwdllm.pooling none takes the architecture's own head)"
        ]
    if own is not None:
        return [
            f"warning: {source.name} is a sentence encoder whose vectors also pass {', '.join(own.unknown)}, which is "
            "not supported; it classifies by its architecture's own head; set fwdllm.pooling "
            f"{'+'.join(own.pooling)} to read what comes before"
        ]
    return []
