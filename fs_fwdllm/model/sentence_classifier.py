"""A classifier on a sentence encoder: pool the tokens, scale the vector, one linear layer.

An architecture's own classifier reads a pooler or the first token, which a sentence encoder was never trained to put
anything into; its training ended in a pooling over all tokens, and that is what a head should read::

    text -> transformer -> [rows, tokens, width] -> pooled -> scaled -> [rows, features] -> classifier -> logits

Everything up to the features is one module, so that the prefix cache of a run that trains the head alone keeps one
vector a sample. Pooling counts real tokens only, on whichever side padding stands, so that a row alone is the row in a
batch; its operations have derivatives of either mode and can be batched over probes.

``scale: layer_norm`` takes each vector's own mean away and makes its own deviation one (no parameters, no statistics of
anybody's data, equal on every machine). The features' squared length is then their number, whatever the encoder, which
bounds the curvature of the head's loss and so makes rates comparable between data sets:
:mod:`fs_fwdllm.core.safe_rate`.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.model.sentence_layout import SentenceLayout, read_layout, transformer_folder
from fs_fwdllm.model.trial import drop_unknown_mask

__all__ = [
    "SentenceClassifier",
    "SentenceFeatures",
    "empty_transformer",
    "load_transformer",
    "pooled",
    "scaled",
    "with_head",
]

#: As sentence-transformers' LayerNorm has it.
_EPSILON = 1e-5
#: Options of ``from_pretrained`` that say where files may be looked for.
_OF_THE_HUB = ("local_files_only", "trust_remote_code", "revision")


def pooled(hidden: torch.Tensor, mask: torch.Tensor, words: tuple[str, ...]) -> torch.Tensor:
    """Vectors of texts from those of their tokens, as sentence-transformers' ``Pooling`` makes them.

    Args:
        hidden: ``[rows, tokens, width]``.
        mask: ``[rows, tokens]``, 1 for a real token; padding may stand on either side.
        words: of :data:`~fs_fwdllm.model.sentence_layout.POOLINGS`.

    Returns:
        ``[rows, width * len(words)]`` in the dtype of ``hidden``; sums are taken in float32 at least.
    """
    kept = mask.bool()
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).masked_fill(~kept.unsqueeze(-1), 0)
    positions = kept.cumsum(dim=1) * kept
    rows = torch.arange(len(mask), device=mask.device)

    def mean(weights: torch.Tensor, power: float = 1.0) -> torch.Tensor:
        total = weights.sum(dim=1, keepdim=True).clamp_min(1).to(wide.dtype)
        return (wide * weights.unsqueeze(-1).to(wide.dtype)).sum(dim=1) / total**power

    vectors = {
        "cls": lambda: wide[rows, (positions == 1).int().argmax(dim=1)],
        "lasttoken": lambda: wide[rows, positions.argmax(dim=1)],
        "max": lambda: wide.masked_fill(~kept.unsqueeze(-1), torch.finfo(wide.dtype).min).amax(dim=1),
        "mean": lambda: mean(kept.int()),
        "mean_sqrt_len": lambda: mean(kept.int(), 0.5),
        "weightedmean": lambda: mean(positions),
    }
    return torch.cat([vectors[word]() for word in words], dim=-1).to(hidden.dtype)


def scaled(vectors: torch.Tensor, scale: str) -> torch.Tensor:
    """Rows of ``[rows, features]``: as they are (``none``), at length one (``unit``), standardised (``layer_norm``)."""
    if scale == "unit":
        return F.normalize(vectors, dim=-1)
    return F.layer_norm(vectors, vectors.shape[-1:], eps=_EPSILON) if scale == "layer_norm" else vectors


class SentenceFeatures(nn.Module):
    """Texts to vectors: ``[rows, features]`` of token ids.

    Args:
        transformer: an encoder, or a decoder's body, whose output has ``last_hidden_state``.
        layout: how its tokens become one vector.
    """

    def __init__(self, transformer: nn.Module, layout: SentenceLayout) -> None:
        super().__init__()
        self.transformer = transformer
        self.layout = layout
        drop_unknown_mask(transformer)

    @property
    def token_width(self) -> int:
        """Numbers in a token's vector."""
        config: Any = self.transformer.config
        return int(config.get_text_config().hidden_size)

    @property
    def width(self) -> int:
        """Numbers in a text's vector."""
        return self.token_width * len(self.layout.pooling)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any) -> torch.Tensor:
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        return scaled(pooled(hidden, attention_mask, self.layout.pooling), self.layout.scale)


class SentenceClassifier(nn.Module):
    """``classifier(features(text))``, with what this package and PEFT ask a Hugging Face model for.

    Args:
        transformer: as :class:`SentenceFeatures` takes it; its configuration becomes this model's.
        layout: how its tokens become one vector.
        classes: outputs of the head, whose weights are zero until somebody draws them.
    """

    base_model_prefix = "features"
    #: PEFT otherwise makes the embeddings' output require a gradient.
    is_gradient_checkpointing = False

    def __init__(self, transformer: nn.Module, layout: SentenceLayout, classes: int) -> None:
        super().__init__()
        self.features = SentenceFeatures(transformer, layout)
        self.classifier = nn.Linear(self.features.width, classes, dtype=next(transformer.parameters()).dtype)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> SentenceClassifier:
        """The classifier in a folder that this package saved; PEFT's ``AutoPeftModel`` asks for an adapter's base so.

        Args:
            options: go to the transformer's own ``from_pretrained``. A base that was saved for an adapter has no head:
                the adapter brings it.

        Raises:
            ModelError: the folder is none.
        """
        layout = read_layout(str(folder))
        if layout is None:
            raise ModelError(f"{folder}: holds no sentence encoder (no modules.json that ends in a pooling)")
        place = transformer_folder(Path(folder))
        with quiet_transformers():
            transformer = load_transformer(str(place), **options)
        model = cls(transformer, layout, transformer.config.num_labels)
        if layout.head:
            model.read_head(Path(folder) / layout.head)
        return model.eval()

    def read_head(self, folder: Path) -> bool:
        """Take the head over that was saved in ``folder``, if it is one for as many classes.

        Raises:
            ModelError: there is none.
        """
        file = folder / "model.safetensors"
        try:
            tensors = load_file(file)
            weight, bias = tensors["linear.weight"], tensors["linear.bias"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(f"{file}: cannot be read as a head, linear.weight and linear.bias ({error})") from error
        if weight.shape != self.classifier.weight.shape:
            return False
        with torch.no_grad():
            self.classifier.weight.copy_(weight)
            self.classifier.bias.copy_(bias)
        return True

    @property
    def config(self) -> Any:
        """The transformer's, with the classes' names."""
        return self.features.transformer.config

    def get_input_embeddings(self) -> nn.Module:
        """The transformer's table of tokens."""
        table: nn.Module = self.features.transformer.get_input_embeddings()  # type: ignore[operator]
        return table

    def get_output_embeddings(self) -> None:
        """None: there is no vocabulary at the output."""

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> nn.Module:
        """As transformers has it."""
        table: nn.Module = self.features.transformer.resize_token_embeddings(*arguments, **options)  # type: ignore[operator]
        return table

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any) -> SequenceClassifierOutput:
        """``logits`` ``[rows, classes]``; further ``inputs`` go to the transformer."""
        return SequenceClassifierOutput(logits=self.classifier(self.features(input_ids, attention_mask, **inputs)))


def with_head(
    transformer: nn.Module, fresh: set[str], layout: SentenceLayout, classes: int, folder: Path
) -> tuple[SentenceClassifier, set[str]]:
    """The classifier around a transformer, and the names of its parameters that no checkpoint has.

    Args:
        fresh: names of the transformer's own.
        folder: where the head is, if ``layout`` has one; it is new where it was for another number of classes.
    """
    model = SentenceClassifier(transformer, layout, classes)
    named = {f"features.transformer.{name}" for name in fresh}
    if layout.head and model.read_head(folder / layout.head):
        return model, named
    return model, named | {"classifier.weight", "classifier.bias"}


def load_transformer(folder: str, **options: Any) -> Any:
    """What ``from_pretrained`` gives for a sentence encoder's transformer, without a pooler that nobody reads.

    Of an encoder-decoder it is the encoder alone. ``options`` go to ``from_pretrained``.

    Raises:
        ModelError: transformers has no class for the encoder alone.
    """
    settings = AutoConfig.from_pretrained(folder, **{key: options[key] for key in _OF_THE_HUB if key in options})
    return _auto_class(settings).from_pretrained(folder, **options, **_without_pooler(settings))


def empty_transformer(settings: Any, **options: Any) -> Any:
    """As :func:`load_transformer`, from a configuration alone, with weights of any value. Raises as that."""
    return _auto_class(settings).from_config(settings, **options, **_without_pooler(settings))


def _auto_class(settings: Any) -> Any:
    if not settings.is_encoder_decoder:
        return AutoModel
    if type(settings) not in MODEL_FOR_TEXT_ENCODING_MAPPING:
        raise ModelError(
            f"model_type {settings.model_type!r}: has a decoder, and transformers has no class for its encoder alone; "
            "set fwdllm.pooling none to classify as the architecture does"
        )
    return AutoModelForTextEncoding


def _without_pooler(settings: Any) -> dict[str, bool]:
    kind: Any = MODEL_MAPPING.get(type(settings), None)
    if settings.is_encoder_decoder or not inspect.isclass(kind):  # some configurations are of several models
        return {}
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}
