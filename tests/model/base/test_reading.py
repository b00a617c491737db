"""Models over packed bases: every architecture, slopes to the bit, what is saved and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from fs_fwdllm.core.direction import DirectionKey, make_distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.estimator import make_estimator
from fs_fwdllm.inference.merging import merge
from fs_fwdllm.model import load_model, load_saved, load_tokenizer, save_trained
from fs_fwdllm.model.base.checkpoint import SafetensorsCheckpoint
from fs_fwdllm.model.base.packed import elements_of, packed_layers, unpack
from fs_fwdllm.model.base.packing import Form, pack
from fs_fwdllm.model.base.quantising import quantise_folder
from fs_fwdllm.model.base.reading import read_base
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.model.quiet import quiet_transformers
from tests.model.architectures import ARCHITECTURES, AUTO_CLASSES, FAST, Architecture
from tests.model.test_prefix_cache import LATE, LATE_IDS, Twin, assert_same_everything
from tests.model.tiny import save_tiny_model, tiny_batch, tiny_config

#: What is not read without transformers' own loading: weights that it renames or puts together as it reads them.
_RENAMED = ("esm", "ibert", "gpt_neox")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("bert") / "model", "bert")


def load(folder: Path, method: str = "lora", classifier: bool = False, base: dict[str, Any] | None = None, **own: Any):  # type: ignore[no-untyped-def]
    keys = {"fwdllm.base": base} if base else {}
    config = tiny_config(folder, method, classifier=classifier, **keys, **own)
    return load_model(config, load_tokenizer(config), 3 if classifier else 0)


def refusal(folder: Path, method: str = "lora", **own: Any) -> str:
    with pytest.raises((ConfigError, ModelError)) as error:
        load(folder, method, **own)
    return str(error.value)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=() if name in FAST else pytest.mark.slow) for name, row in ARCHITECTURES.items()],
    ids=ARCHITECTURES,
)
def test_a_model_that_is_built_empty_and_filled_is_the_one_transformers_loads(
    row: Architecture, tmp_path: Path
) -> None:
    folder = row.save(tmp_path / "model")
    auto = getattr(transformers, AUTO_CLASSES[row.task])
    settings = transformers.AutoConfig.from_pretrained(folder)
    with quiet_transformers():
        expected, report = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)

        def read() -> tuple[nn.Module, set[str]]:
            return read_base(lambda: auto.from_config(settings), SafetensorsCheckpoint(folder), {}, torch.float32)

        if row.name in _RENAMED:
            config = row.run_config(folder, "lora", base={"stream": True})
            with pytest.raises(ModelError):
                load_model(config, load_tokenizer(config), 3)
            return
        try:
            found, fresh = read()
        except ModelError as error:
            assert "mixture of experts" in str(error) and any("experts" in name for name in expected.state_dict())
            return
    state, other = expected.state_dict(), found.state_dict()
    assert state.keys() == other.keys() and fresh == set(report["missing_keys"])
    drawn = {name for name in state if name in fresh}
    differing = [name for name in state if name not in drawn and not torch.equal(state[name], other[name])]
    written = SafetensorsCheckpoint(folder)  # transformers draws Funnel's table anew, whatever the file says
    assert all(torch.equal(other[name], written.read(name)) for name in differing) and len(differing) <= 1
    buffers = dict(found.named_buffers())
    assert not [name for name, buffer in expected.named_buffers() if not torch.equal(buffer, buffers[name])]


@pytest.mark.parametrize("quantise", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "albert", "distilbert"])
def test_packed_as_it_is_read_is_the_packed_folder(architecture: str, quantise: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", architecture)
    classifier = architecture not in ("llama", "gpt2")
    quantise_folder(folder, tmp_path / "packed", Form(quantise, 32))  # type: ignore[arg-type]
    one = load(folder, classifier=classifier, base={"quantise": quantise, "group": 32})
    other = load(tmp_path / "packed", classifier=classifier)
    assert len(packed_layers(one.model)) == len(packed_layers(other.model)) > 4
    assert elements_of(one.model) == elements_of(load(folder, classifier=classifier).model)
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize(
    ("estimator", "own"),
    [
        ("central", {}),
        ("one_sided", {"probes_per_batch": 4}),
        ("forward_mode", {"probes_per_batch": 2}),
        ("forward_mode", {}),
        ("projected", {}),
        ("projected", {"gradient_checkpointing": True}),
    ],
)
@pytest.mark.parametrize("quantise", ["int4", "nf4"])
def test_slopes_over_packed_weights_are_those_over_their_numbers(
    llama: Path, quantise: str, estimator: str, own: dict[str, Any]
) -> None:
    """To the bit where the product is one block; gradients differ in the order of their sums at most."""
    settings = {
        "fwdllm.estimator": estimator,
        "fwdllm.attention": "eager",
        "fwdllm.probes": 6,
        **{f"fwdllm.{key}": own[key] for key in own},
    }
    found = []
    for packed in (True, False):
        loaded = load(llama, base={"quantise": quantise, "group": 32}, **settings)
        if not packed:
            unpack(loaded.model)
        found.append(slopes(loaded, settings))
    if estimator in ("central", "one_sided", "forward_mode"):
        assert np.array_equal(*found)
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)
    assert np.abs(found[0]).max() > 1e-4


def slopes(loaded: Any, settings: dict[str, Any], classifier: bool = False) -> np.ndarray:
    config = tiny_config("unused", "lora", classifier=False, **settings).fwdllm
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".lora_B." in name:  # while it is zero, so are the slopes of A
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    trainables = Trainables.of_model(loaded.model)
    estimator = make_estimator(loaded.model, trainables, make_distribution("rademacher"), config, full=False)
    task, cache_bytes = "classification" if classifier else "causal_lm", config.prefix_cache_mib << 20
    objective = Objective(loaded.model, trainables, task, cache_bytes, conduct=loaded.conduct)  # type: ignore[arg-type]
    keys = [DirectionKey(3, seed) for seed in range(6)]
    return estimator.slopes(objective.on(tiny_batch(classifier=classifier)), keys).values


@pytest.mark.parametrize(("architecture", "method", "arguments"), LATE[1:18], ids=LATE_IDS[1:18])
def test_the_prefix_cache_changes_nothing_over_a_packed_base(
    tmp_path: Path, architecture: str, method: str, arguments: dict[str, Any]
) -> None:
    twin = Twin(tmp_path, architecture, method, arguments, **{"fwdllm.base": {"quantise": "int4", "group": 16}})
    assert packed_layers(twin.model)
    assert_same_everything(twin, twin.batch())
    twin.cached.on(twin.batch())
    assert twin.cache.hits


@pytest.mark.parametrize("method", ["lora", "ia3", "layernorm", "bitfit", "bottleneck", "output_residual", "head"])
@pytest.mark.parametrize("way", ["as it is read", "in its folder"])
def test_what_is_saved_is_loaded_over_the_same_packed_base(
    tmp_path: Path, llama: Path, bert: Path, method: str, way: str
) -> None:
    classifier = method in ("head", "bitfit", "bottleneck")
    folder, base = (bert if classifier else llama), {"quantise": "int4", "group": 32}
    if way == "in its folder":
        quantise_folder(folder, tmp_path / "packed", Form("int4", 32))
        folder, base = tmp_path / "packed", {}
    loaded = load(folder, method, classifier, base)
    trainables = Trainables.of_model(loaded.model)
    with torch.no_grad():
        for tensor in trainables.tensors:
            tensor.add_(0.03)
    values = dict(zip(trainables.names, trainables.tensors, strict=True))
    saved = save_trained(loaded, tmp_path / "saved", values)
    again, _, _ = load_saved(saved)
    batch = tiny_batch(classifier=classifier)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        assert torch.equal(again.model(**inputs).logits, loaded.model(**inputs).logits)
    assert len(packed_layers(again.model)) == len(packed_layers(loaded.model)) > 0


@pytest.mark.parametrize(("method", "arguments"), [("lora", {}), ("output_residual", {"bias": False})])
def test_merging_unpacks_the_base(tmp_path: Path, llama: Path, method: str, arguments: dict[str, Any]) -> None:
    loaded = load(llama, method, base={"quantise": "int8", "group": 32}, **arguments)
    trainables = Trainables.of_model(loaded.model)
    with torch.no_grad():
        for tensor in trainables.tensors:
            tensor.add_(0.02)
    save_trained(loaded, tmp_path / "adapter", dict(zip(trainables.names, trainables.tensors, strict=True)))
    merged = merge(tmp_path / "adapter", tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged)
    ids = tiny_batch(classifier=False).input_ids[:1]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, loaded.model(ids).logits, rtol=1e-4, atol=1e-5)
    assert not getattr(plain.config, "quantization_config", None)
    again, _, _ = load_saved(merged)
    assert not packed_layers(again.model)


def test_a_packed_folder_is_written_once_where_a_folder_is_named(tmp_path: Path, llama: Path) -> None:
    base = {"quantise": "int4", "group": 32, "folder": str(tmp_path / "kept")}
    first = load(llama, base=base)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}
    second = load(llama, base=base)
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    said = refusal(llama, base={**base, "group": 16})
    assert "kept" in said and "something else" in said


def test_a_head_that_is_packed_is_read_as_numbers(tmp_path: Path, llama: Path) -> None:
    """GPTQ and compressed-tensors can pack the output layer; what looks into it wants floats."""
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    quantise_folder(folder, tmp_path / "packed", Form("int8", 32))
    inner = load(tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model-00001-of-00001.safetensors")
    _, parts = pack(tensors.pop("lm_head.weight"), Form("int8", 32))
    tensors |= {f"lm_head.{name}": part for name, part in parts.items()}
    save_file(tensors, tmp_path / "packed" / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = tmp_path / "packed" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}))
    loaded = load(tmp_path / "packed", "output_residual", rank=4)
    head = loaded.model.get_output_embeddings()
    assert head.weight.isfinite().all() and "lm_head" not in dict(packed_layers(loaded.model))
    assert len(packed_layers(loaded.model)) == len(packed_layers(inner.model))


@pytest.mark.parametrize(
    ("own", "pattern"),
    [
        ({"llm.adapter.use": False}, r"llm\.adapter\.use: is false.*int4 packs it.*adapter"),
        (
            {"federate.method": "fedcybgd", "llm.adapter.use": False},
            r"federate\.method: is 'fedcybgd'.*float",
        ),
    ],
)
def test_packed_weights_are_not_trained(llama: Path, own: dict[str, Any], pattern: str) -> None:
    assert re.search(pattern, refusal(llama, base={"quantise": "int4"}, **own))


def test_packing_twice_is_refused(tmp_path: Path, llama: Path) -> None:
    quantise_folder(llama, tmp_path / "packed", Form("int4", 32))
    said = refusal(tmp_path / "packed", base={"quantise": "int8"})
    assert re.search(r"fwdllm\.base\.quantise: is int8.*packed already \(compressed-tensors\); set it to none", said)


@pytest.mark.parametrize(
    ("base", "pattern"),
    [
        ({"group": 32}, "group says how a base is packed, but base"),
        ({"folder": "x"}, "folder says"),
        ({"quantise": "nf4", "symmetric": False}, "nf4 has no zeros"),
        ({"quantise": "int3"}, "int8"),
        ({"quantise": "int4", "group": 4}, "8"),
        ({"compute_dtype": "bfloat16", "quantize": "int4"}, "quantise"),
    ],
)
def test_contradictions_in_the_section_are_named(base: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        tiny_config("unused", "lora", **{"fwdllm.base": base})


def test_the_former_name_of_the_dtype(tmp_path: Path, llama: Path) -> None:
    old = tiny_config(llama, "lora", classifier=False, **{"fwdllm.base_dtype": "bfloat16"})
    assert old.fwdllm.base.compute_dtype == "bfloat16"
    assert old == tiny_config(llama, "lora", classifier=False, **{"fwdllm.base.compute_dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"its present name base\.compute_dtype 'float16'"):
        tiny_config("m", **{"fwdllm.base_dtype": "bfloat16", "fwdllm.base.compute_dtype": "float16"})


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (lambda t: t.update({"weight_packed": t["weight_packed"][:, :-1]}), "neither 4 nor 8 bits"),
        (lambda t: t.update({"weight_packed": t["weight_packed"][:-1]}), "rows are not the layer's"),
        (lambda t: t.update({"weight_scale": t["weight_scale"].repeat(1, 3)}), "groups do not divide a row"),
        (lambda t: t.pop("weight_scale"), "weight_scale"),
        (lambda t: t.update({"weight": t.pop("weight_packed")}) or t.pop("weight_scale"), "int32, without the scales"),
    ],
)
def test_packed_tensors_of_another_matrix_are_refused(
    tmp_path: Path, llama: Path, damage: Callable[[dict[str, Any]], Any], pattern: str
) -> None:
    quantise_folder(llama, tmp_path / "packed", Form("int4", 32))
    file = tmp_path / "packed" / "model-00001-of-00001.safetensors"
    tensors, layer = load_file(file), "model.layers.1.mlp.up_proj."
    parts = {name.removeprefix(layer): tensors.pop(name) for name in list(tensors) if name.startswith(layer)}
    damage(parts)
    tensors |= {layer + name: part.contiguous() for name, part in parts.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    index = tmp_path / "packed" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file.name)}))
    said = refusal(tmp_path / "packed")
    assert "model.layers.1.mlp.up_proj" in said and re.search(pattern, said)


def test_bfloat16_computes_in_bfloat16_over_the_same_bytes(llama: Path) -> None:
    wide = load(llama, base={"quantise": "int4", "group": 32})
    narrow = load(llama, base={"quantise": "int4", "group": 32, "compute_dtype": "bfloat16"})
    for (_, one), (_, other) in zip(packed_layers(wide.model), packed_layers(narrow.model), strict=True):
        assert torch.equal(one.dequantised(), other.dequantised())
    ids = tiny_batch(classifier=False).input_ids
    found, expected = narrow.model(ids).logits, wide.model(ids).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)
