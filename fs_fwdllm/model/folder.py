"""What a model's folder holds, looked at before transformers is.

A folder that cannot become a model here is refused in words, with the way out: an adapter, weights that are pickled or
quantised in a way nobody here reads, an architecture whose code lies in the folder, a configuration with impossible
numbers, weights that are cut short or missing. Only ``config.json`` and the headers of the safetensors files are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fs_fwdllm.errors import ModelError, nearest, shown

__all__ = [
    "QUANTISATION_METHODS",
    "check_configuration",
    "check_folder",
    "check_numbers",
    "checkpoint_dtype",
    "checkpoint_elements",
    "quantisation",
    "read_settings",
    "weight_files",
]

_CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
#: Weights in forms that are not read: a pattern, what it is, and what to do.
_OTHER_WEIGHTS = (
    ("*.gguf", "GGUF", "name the file itself in model.type"),
    ("pytorch_model*.bin", "pickled, and nothing is unpickled here", "{convert}"),
    ("*.pth", "pickled, and nothing is unpickled here", "convert them with the script transformers has for this model"),
    ("tf_model*.h5", "TensorFlow's", "save the model with PyTorch as safetensors"),
    ("flax_model*.msgpack", "Flax's", "save the model with PyTorch as safetensors"),
    ("*.onnx", "ONNX", "give the folder of the PyTorch model it was made from"),
)
_CONVERT = (
    "convert them once, where you trust their source: python -c \"import transformers as t; m = '{folder}'; "
    "t.AutoModelForCausalLM.from_pretrained(m).save_pretrained(m + '-safe'); "
    "t.AutoTokenizer.from_pretrained(m).save_pretrained(m + '-safe')\" (AutoModel for an encoder)"
)
#: ``quant_method`` of what is read, by :mod:`fs_fwdllm.model.base`.
QUANTISATION_METHODS = ("compressed-tensors", "bitsandbytes", "gptq", "awq")
#: Files beside the configuration in which older tools say what theirs is.
_QUANTISATION_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": "",
    "hf_quant_config.json": "modelopt",
}
_ADAPTER_FILES = ("adapter_config.json", "bottleneck_config.json", "output_residual_config.json")
#: How architectures call the numbers without which there is no model.
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "intermediate_size", "d_ff", "vocab_size")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
           "num_decoder_layers", "decoder_layers")  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
#: More positions than any model has: a table of them would not fit a machine.
_MOST_POSITIONS = 1 << 27
_FLOATS = ("F64", "F32", "F16", "BF16")
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds no model of a known architecture.

    Raises:
        ModelError: names the folder, the file in it, and what to do.
    """
    # transformers would load an adapter's base from elsewhere, and the adapter with it
    is_adapter = any((folder / name).is_file() for name in _ADAPTER_FILES)
    if is_adapter or not (folder / _CONFIG).is_file():
        raise ModelError(f"model.type: {_without_config(folder)}")
    settings = check_configuration(folder)
    shards = weight_files(folder)
    tensors = {name: entry for shard in shards for name, entry in _header(shard)}
    if not _quantisation(folder, settings):
        _refuse_integers(folder, tensors)
    check_numbers(folder / _CONFIG, settings, sum(_count(shape) for _, shape in tensors.values()), len(tensors))


def check_configuration(folder: Path) -> dict[str, Any]:
    """The configuration in ``folder``, whose weights may be elsewhere yet; refused where they are of no use here.

    Raises:
        ModelError: weights that are packed in a way nobody here reads, or an architecture that transformers does not
            have.
    """
    settings = read_settings(folder / _CONFIG)
    _quantisation(folder, settings)
    _check_architecture(folder, settings)
    return settings


def read_settings(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model's folder. Raises :class:`~fs_fwdllm.errors.ModelError`."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{file}: must be a JSON object, but is {shown(settings, 40)}")
    return settings


def checkpoint_elements(folder: Path) -> int:
    """Numbers in all tensors of the weights."""
    return sum(_count(shape) for shard in weight_files(folder) for _, (_, shape) in _header(shard))


def checkpoint_dtype(folder: Path) -> str:
    """The dtype most of the weights are saved in, by PyTorch's name; empty where the headers do not tell."""
    elements: dict[str, int] = {}
    for shard in weight_files(folder):
        for _, (dtype, shape) in _header(shard):
            elements[dtype] = elements.get(dtype, 0) + _count(shape)
    return _TORCH_NAMES.get(max(elements, key=lambda dtype: elements[dtype]), "") if elements else ""


def _without_config(folder: Path) -> str:
    for name in _ADAPTER_FILES:
        if (folder / name).is_file():
            base = shown(read_settings(folder / name).get("base_model_name_or_path"))
            return (
                f"{str(folder)!r} is an adapter, not a model ({name}); give model.type the model it was trained on "
                f"({base}) and the adapter's folder to fwdllm.init_adapter"
            )
    inside = sorted(child.name for child in folder.iterdir() if (child / _CONFIG).is_file())
    if inside:
        return f"{str(folder)!r} holds no {_CONFIG}, but {', '.join(inside[:3])} in it does; name that folder"
    if (folder / "adapter").is_dir():
        return (
            f"{str(folder)!r} is a run's folder: give the adapter in it to fwdllm.init_adapter, or merge it into a "
            "model first"
        )
    found = sorted(child.name for child in folder.iterdir())
    return (
        f"{str(folder)!r} holds no {_CONFIG} (but {', '.join(found[:5]) or 'nothing'}); it must be a folder that "
        "save_pretrained or a hub download wrote"
    )


def quantisation(folder: Path) -> dict[str, Any]:
    """What a folder says of how its weights are packed; empty where they are floats.

    Raises:
        ModelError: packed in a way that is not read here.
    """
    return _quantisation(folder, read_settings(folder / _CONFIG))


def _quantisation(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    found, place = settings.get("quantization_config") or settings.get("compression_config"), _CONFIG
    for name, method in _QUANTISATION_FILES.items():
        if not found and (folder / name).is_file():
            found, place = {"quant_method": method, **read_settings(folder / name)}, name
    if not found:
        return {}
    method = found.get("quant_method") or "bitsandbytes" if isinstance(found, dict) else ""
    if method not in QUANTISATION_METHODS:
        raise ModelError(
            f"model.type: {str(folder)!r} is quantised by {shown(method)} (see {place}), which is not read here; known "
            f"are {', '.join(QUANTISATION_METHODS)}; or give the float model it was made from, with "
            "fwdllm.base.quantise int4 to save memory"
        )
    return {**found, "quant_method": method}


def _check_architecture(folder: Path, settings: dict[str, Any]) -> None:
    kind, known = settings.get("model_type"), list(CONFIG_MAPPING.keys())
    if kind is None or kind in known:
        return
    if settings.get("auto_map"):
        code = sorted(file.name for file in folder.glob("*.py"))
        raise ModelError(
            f"model.type: {str(folder)!r} is of an architecture of its own, {shown(kind)}, whose code "
            f"({', '.join(code[:3]) or 'on the hub'}; auto_map in {_CONFIG}) is never run here; take a model of an "
            "architecture that transformers has, or a conversion of this one to such"
        )
    raise ModelError(
        f"{folder / _CONFIG}: the installed transformers knows no model_type {shown(kind)}{nearest(kind, known)} "
        "(newer architectures need a newer transformers)"
    )


def weight_files(folder: Path) -> list[Path]:
    """The weight files, by the index if there is one. Raises :class:`~fs_fwdllm.errors.ModelError`."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        raise ModelError(f"model.type: {_without_weights(folder)}")
    places = read_settings(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(f"{folder / _INDEX}: must hold weight_map, the file of each tensor")
    names = sorted(set(places.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{folder / _INDEX}: names the file {shown(outside[0])}, which is not in this folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(
            f"{folder / _INDEX}: names {len(missing)} files that are not there ({', '.join(missing[:3])}); "
            "the download or copy is incomplete"
        )
    return [folder / name for name in names]


def _without_weights(folder: Path) -> str:
    for pattern, what, cure in _OTHER_WEIGHTS:
        if files := sorted(file.name for file in folder.glob(pattern)):
            cure = cure.format(convert=_CONVERT.format(folder=folder))
            return f"{str(folder)!r}: its weights are {what} ({files[0]}); {cure}"
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    hint = f"; it has {', '.join(others[:3])}, which no {_INDEX} names" if others else ""
    return f"{str(folder)!r} holds no weights: neither {_WEIGHTS} nor {_INDEX}{hint}"


def _header(file: Path) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """``(tensor, (dtype, shape))`` of a safetensors file."""
    try:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                yield name, (part.get_dtype(), part.get_shape())
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{file}: is damaged or cut short ({str(error).splitlines()[0]}); copy it anew") from error


def _refuse_integers(folder: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    for name, (dtype, _) in tensors.items():
        if name.endswith(("weight", "_scale", "_scales")) and dtype not in _FLOATS:
            raise ModelError(
                f"model.type: {str(folder)!r}: {name} is saved as {dtype}, so the weights are quantised or damaged; "
                "give the float model"
            )


def check_numbers(file: Path, settings: Mapping[str, Any], elements: int, tensors: int) -> None:
    """Refuse settings whose model would be larger than its weights by far: memory would be taken for it.

    Args:
        file: where they stand.
        elements: of all weights.
        tensors: how many there are.

    Raises:
        ModelError: names the file and the setting.
    """
    limits = {
        **dict.fromkeys((*_WIDTHS, *_HEADS), (elements, "more than all weights together")),
        **dict.fromkeys(_LAYERS, (tensors, "more layers than there are tensors")),
        **dict.fromkeys(_POSITIONS, (_MOST_POSITIONS, f"more than {_MOST_POSITIONS:,}")),
    }
    nested = settings.get("text_config")
    for key, value in [*settings.items(), *(nested.items() if isinstance(nested, dict) else ())]:
        if key not in limits or value is None or isinstance(value, list):
            continue
        most, reason = limits[key]
        if type(value) is not int or value < 1:
            raise ModelError(f"{file}: {key} must be a whole number above 0, but is {shown(value, 40)}")
        if value > most:
            raise ModelError(f"{file}: {key} is {value:,}, {reason}")


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
