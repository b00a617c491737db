"""Making the basis of an adapter from public text: ``fs-fwdllm basis``.

The configured base runs over a text that nobody has to protect, forward only, and the principal directions of what the
configured adapter will read become a file (:mod:`~fs_fwdllm.model.activations` says how). Every machine of a run gets
the same file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fs_fwdllm._version import __version__
from fs_fwdllm.config import Config
from fs_fwdllm.data.batches import evaluation_batches
from fs_fwdllm.data.plain_text import read_plain_texts
from fs_fwdllm.data.types import Batch, Example
from fs_fwdllm.data.whole_text import token_ids
from fs_fwdllm.errors import ConfigError, DataError
from fs_fwdllm.model.activations import see
from fs_fwdllm.model.basis_file import basis_fingerprint
from fs_fwdllm.model.facts import digest_of_files
from fs_fwdllm.model.inputs import batch_on, groups_of
from fs_fwdllm.model.loading import LoadedModel, load_model
from fs_fwdllm.model.tokenizer import load_tokenizer
from fs_fwdllm.model.trainable_parts import PARTS, adapter_request
from fs_fwdllm.model.trial import foreign_code

__all__ = ["BasisFile", "make_basis"]

_TEXTS_IN_A_PASS = 8


@dataclass(frozen=True)
class BasisFile:
    """What was written.

    Attributes:
        path: the file.
        digest: of all its bytes.
        tokens: that were looked at.
        passes: forward passes of up to eight texts.
        places: per tensor its name, rows, width, and the share of the variance that the rows span.
    """

    path: Path
    digest: str
    tokens: int
    passes: int
    places: tuple[tuple[str, int, int, float], ...]


def make_basis(config: Config, text: Path, output: Path, device: torch.device, tokens: int) -> BasisFile:
    """Write the basis of the adapter of ``config``.

    Args:
        text: the public text (:func:`~fs_fwdllm.data.plain_text.read_plain_texts`); ``fwdllm.data.text`` names the
            field of a table. Each is cut at ``llm.tok_len``.
        output: the file to write, ``.safetensors``; it must not exist.
        device: where the model runs.
        tokens: the texts that are looked at have about this many together: the first ones of the file.

    Raises:
        ConfigError: the adapter takes no basis, or ``output`` exists or cannot be written.
        DataError: the text cannot be read, or is too short.
        ModelError: the base cannot be loaded or run.
    """
    if output.exists():
        raise ConfigError(f"{output}: exists already, and a run may depend on it; name another file")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output}: its folder does not exist; make it, or name another")
    method, arguments = adapter_request(config)
    places_of = PARTS[method].places
    if places_of is None:
        able = ", ".join(name for name, part in PARTS.items() if part.places is not None)
        raise ConfigError(f"llm.adapter.args: adapter_method {method!r} takes no basis; these do: {able}")
    texts = read_plain_texts(text, config.fwdllm.data.text, config.fwdllm.data.columns, config.fwdllm.data.encoding)
    tokenizer = load_tokenizer(config)
    loaded = load_model(_plain(config, method, arguments), tokenizer, _classes(config))
    loaded.model.to(device)
    places = places_of(loaded.model, arguments)
    passes = 0
    examples = list(_examples(texts, tokenizer, config.llm.tok_len, tokens))
    for batch in evaluation_batches(examples, _TEXTS_IN_A_PASS, tokenizer.pad_token_id):
        for inputs in _inputs(batch, loaded, device):
            with foreign_code(f"{loaded.source.name}: a forward pass failed"):
                see(loaded.model, inputs, places)
            passes += 1
    found = {
        rows.name: place.moments.principal_rows(rows.rank, scaled=rows.scaled)
        for place in places
        for rows in place.wanted
    }
    seen = sum(len(example.input_ids) for example in examples)
    _write(output, {name: rows for name, (rows, _) in found.items()}, _origin(loaded, method, text, seen))
    shapes = tuple((name, len(rows), rows.shape[1], share) for name, (rows, share) in found.items())
    return BasisFile(output, basis_fingerprint(str(output)), seen, passes, shapes)


def _plain(config: Config, method: str, arguments: dict[str, Any]) -> Config:
    """The configuration of the same adapter without a basis, which does not exist yet."""
    kept = {name: value for name, value in arguments.items() if name not in PARTS[method].basis_arguments}
    adapter = config.llm.adapter.model_copy(update={"args": [{"adapter_method": method, **kept}]})
    return config.model_copy(update={"llm": config.llm.model_copy(update={"adapter": adapter})})


def _classes(config: Config) -> int:
    """Of a classifier whose head is not looked at: as many as the configuration says, or the fewest there can be."""
    return config.model.num_labels or 2


def _examples(texts: list[str], tokenizer: Any, longest: int, tokens: int) -> Iterator[Example]:
    """The tokens of the first texts, cut at ``longest``, until there are enough."""
    seen = 0
    for ids in token_ids(tokenizer, texts, truncation=True, max_length=longest):
        if seen >= tokens:
            return
        if ids:
            seen += len(ids)
            yield Example(np.array(ids, dtype=np.int32), np.array(0, dtype=np.int32))
    if not seen:
        raise DataError("the text has no token")


def _inputs(batch: Batch, loaded: LoadedModel, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """What the model is called with for a batch, in as many passes as it takes."""
    for group in groups_of(batch_on(device, batch), loaded.conduct, segments=False):
        yield group.inputs


def _origin(loaded: LoadedModel, method: str, text: Path, tokens: int) -> dict[str, str]:
    return {
        "format": "pt",
        "adapter_method": method,
        "base_name": loaded.source.name,
        "base_digest": digest_of_files(loaded.source),
        "text": text.name,
        "text_digest": basis_fingerprint(str(text)),
        "tokens": str(tokens),
        "written_by": f"fs-fwdllm {__version__}",
    }


def _write(output: Path, tensors: dict[str, torch.Tensor], origin: dict[str, str]) -> None:
    staging = output.with_name(f".{output.name}-{os.getpid()}")
    try:
        save_file({name: rows.contiguous() for name, rows in tensors.items()}, staging, metadata=origin)
        os.replace(staging, output)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{output}: cannot be written ({error})") from error
    finally:
        staging.unlink(missing_ok=True)
