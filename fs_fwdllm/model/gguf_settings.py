"""The configuration and the tokenizer of a GGUF file: of the files beside it, or of what the file says itself.

transformers reads both out of the file, and is asked here; but by a library that makes an object of every text of the
vocabulary, twice over. So it is given the settings without the vocabulary, in a file of its own for as long as that
takes, and the tokenizer's class without the detour over the settings. A model's own ``config.json`` and tokenizer,
where they lie beside the file, say more than the file does, and come first.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from fs_fwdllm.errors import ModelError, shown
from fs_fwdllm.model.folder import check_numbers, read_settings
from fs_fwdllm.model.gguf_file import GgufHeader, read_gguf

__all__ = ["check_gguf", "files_beside", "gguf_config", "gguf_tokenizer", "has_own_config"]

_CONFIG = "config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
               "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")  # fmt: skip
#: What the configuration calls the file's sizes, as far as they decide how large a model is.
_SIZES = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "vocab_size": "vocab_size", "max_position_embeddings": "context_length", "head_dim": "attention.key_length",
}  # fmt: skip
#: Those that a model's files agree in; a vocabulary may be padded, and a context be cut.
_DECISIVE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
             "head_dim")  # fmt: skip
#: And the file's tokens.
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def check_gguf(file: Path) -> GgufHeader:
    """Refuse a file that cannot become a model here, before transformers sees it.

    Raises:
        ModelError: it is no GGUF file that is read here, or the package that transformers reads them with is not there.
    """
    header = read_gguf(file)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"model.type: {str(file)!r} is a GGUF file, which needs the package gguf: pip install fs-fwdllm[gguf]"
        )
    scaling = header.settings.get(f"{header.architecture}.rope.scaling.type", "none")
    if scaling != "none" and not has_own_config(file):
        raise ModelError(
            f"{file}: stretches its positions (rope.scaling.type {shown(scaling)}), which transformers does not read "
            "from GGUF; put the model's own config.json beside the file"
        )
    _check_sizes(header)
    return header


def _check_sizes(header: GgufHeader) -> None:
    own = {name: header.settings.get(f"{header.architecture}.{key}") for name, key in _SIZES.items()}
    check_numbers(header.file, own, header.elements, len(header.tensors))
    if has_own_config(header.file):
        config = header.file.parent / _CONFIG
        check_numbers(config, read_settings(config), header.elements, len(header.tensors))


def has_own_config(file: Path) -> bool:
    """Whether the model's own configuration lies beside the file."""
    return (file.parent / _CONFIG).is_file()


def files_beside(file: Path) -> list[Path]:
    """The files beside a GGUF file that are read with it."""
    return [path for name in (_CONFIG, *_TOKENIZERS) if (path := file.parent / name).is_file()]


def gguf_config(file: Path, **changes: Any) -> Any:
    """The configuration of the model in a file.

    Args:
        changes: settings with other values, as for ``from_pretrained``.

    Raises:
        ModelError: the file cannot be read.
        Exception: whatever transformers raises for an architecture that it does not know.
    """
    header = check_gguf(file)
    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True, **changes}
    if has_own_config(file):
        config = AutoConfig.from_pretrained(file.parent, **local)
        vars(config).pop("quantization_config", None)  # of other weights
        _compare(config.get_text_config(), header)
        return config
    with tempfile.TemporaryDirectory(prefix="fs-fwdllm-") as folder:
        (Path(folder) / "settings.gguf").write_bytes(header.without_vocabulary())
        config = AutoConfig.from_pretrained(folder, gguf_file="settings.gguf", **local)
    own = config.get_text_config()
    for name, token in _TOKENS.items():
        if name not in changes:
            setattr(own, name, header.settings.get(f"tokenizer.ggml.{token}_token_id"))
    width = header.settings.get(f"{header.architecture}.{_SIZES['head_dim']}")
    if width is not None and getattr(own, "head_dim", None):
        own.head_dim = width  # which transformers does not read for every architecture
    return config


def _compare(config: Any, header: GgufHeader) -> None:
    """Refuse a configuration of another model: one folder may hold the files of several."""
    for name in _DECISIVE:
        own, said = getattr(config, name, None), header.settings.get(f"{header.architecture}.{_SIZES[name]}")
        if isinstance(own, int) and said is not None and own != said:
            raise ModelError(
                f"{header.file.parent / _CONFIG}: {name} is {own}, but {header.file.name} beside it says {said}; it is "
                "of another model: put the file into a folder of its own, with the model's own config.json or none"
            )


def gguf_tokenizer(file: Path, config: Any, **options: Any) -> Any:
    """The tokenizer of a file; ``options`` as for ``from_pretrained``.

    Raises:
        ModelError: the file has no vocabulary.
        Exception: whatever transformers raises for one that it does not know.
    """
    if any((file.parent / name).is_file() for name in _TOKENIZERS):
        return AutoTokenizer.from_pretrained(file.parent, **options)
    header = read_gguf(file)
    tokens = header.lengths.get("tokenizer.ggml.tokens", 0)
    if "tokenizer.ggml.model" not in header.settings or not tokens:
        raise ModelError(f"{file}: has no vocabulary; put the model's tokenizer files beside it")
    kind: Any = TOKENIZER_MAPPING.get(type(config), PreTrainedTokenizerFast)
    tokenizer = kind.from_pretrained(file.parent, gguf_file=file.name, **options)
    _forget_added(tokenizer, tokens)
    return tokenizer


def _forget_added(tokenizer: Any, tokens: int) -> None:
    """Take away what transformers adds to the file's tokens: a special token of another model's, without a row."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    own = [token for token in tree["added_tokens"] if token["id"] < tokens]
    if len(own) < len(tree["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps({**tree, "added_tokens": own}))
