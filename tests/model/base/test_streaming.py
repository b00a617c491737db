"""A base on the disk computes to the bit what the same base in memory does, and reads no byte twice in a pass."""

from __future__ import annotations

import copy
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fs_fwdllm.config.registries import ESTIMATORS
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.inference.merging import merge
from fs_fwdllm.model import load_model, load_saved, load_tokenizer, save_trained
from fs_fwdllm.model.base.packed import PackedLinear, elements_of, packed_layers, reader_of
from fs_fwdllm.model.base.packing import Form
from fs_fwdllm.model.base.quantising import quantise_folder
from fs_fwdllm.model.base.streaming import Reader
from fs_fwdllm.model.base.tables import StreamedEmbedding
from tests.model.base.test_reading import load, refusal, slopes
from tests.model.test_prefix_cache import Twin
from tests.model.tiny import LAYERS, save_tiny_model, tiny_batch, tiny_config

STREAM = {"stream": True}


def model_folder(tmp_path: Path, architecture: str, form: str, **changes: Any) -> Path:
    folder = save_tiny_model(tmp_path / f"{architecture}-float", architecture, **changes)
    if form == "float":
        return folder
    quantise_folder(folder, tmp_path / f"{architecture}-{form}", Form(form, 32))  # type: ignore[arg-type]
    return tmp_path / f"{architecture}-{form}"


def reader(model: Any) -> Reader:
    found = reader_of(model)
    assert found is not None
    return found


@pytest.mark.parametrize("form", ["float", "int4", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "bert", "albert", "distilbert", "roberta"])
def test_a_pass_over_the_disk_is_a_pass_over_memory(tmp_path: Path, architecture: str, form: str) -> None:
    classifier = architecture not in ("llama", "gpt2", "qwen2")
    folder = model_folder(tmp_path, architecture, form)
    resident = load(folder, classifier=classifier)
    streamed = load(folder, classifier=classifier, base=STREAM)
    batch = tiny_batch(classifier=classifier)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(streamed.model(**inputs).logits, resident.model(**inputs).logits)
    assert elements_of(streamed.model) == elements_of(resident.model)
    held = sum(p.numel() for p in streamed.model.parameters()) + sum(b.numel() for b in streamed.model.buffers())
    assert held < 0.6 * elements_of(resident.model)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_tables_stay_on_the_disk(tmp_path: Path, tied: bool) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=tied)
    resident, streamed = load(folder), load(folder, base=STREAM)
    ids = tiny_batch(classifier=False).input_ids
    with torch.no_grad():
        torch.testing.assert_close(streamed.model(ids).logits, resident.model(ids).logits)
    assert isinstance(streamed.model.get_input_embeddings(), StreamedEmbedding)
    assert isinstance(streamed.model.get_output_embeddings(), PackedLinear)
    assert elements_of(streamed.model) == elements_of(resident.model)


_ESTIMATORS = [
    ("central", {}, 2), ("one_sided", {}, 1), ("central", {"probes_per_batch": 6}, 1),
    ("one_sided", {"probes_per_batch": 6}, 1), ("one_sided", {"probes_per_batch": 2}, 1),
    ("forward_mode", {"probes_per_batch": 6}, 1), ("forward_mode", {}, 6),
    ("projected", {"gradient_checkpointing": True}, 3), ("projected", {}, 2),
]  # fmt: skip


@pytest.mark.parametrize("form", ["float", "int4"])
@pytest.mark.parametrize(("estimator", "own", "passes"), _ESTIMATORS)
def test_slopes_are_equal_to_the_bit_and_every_byte_is_read_once_a_pass(
    tmp_path: Path, form: str, estimator: str, own: dict[str, Any], passes: int
) -> None:
    folder = model_folder(tmp_path, "llama", form)
    settings = {"fwdllm.estimator": estimator, "fwdllm.attention": "eager", "fwdllm.probes": 6}
    settings |= {f"fwdllm.{key}": own[key] for key in own}
    streamed = load(folder, base=STREAM, **settings)
    resident = load(folder, **settings)
    slopes(streamed, settings)  # the order of the layers is known from here on
    disk = reader(streamed.model)
    before = disk.bytes_read
    found = slopes(streamed, settings)
    read = disk.bytes_read - before
    if form == "int4":  # the very same code on the very same bytes
        assert np.array_equal(found, slopes(resident, settings))
    np.testing.assert_allclose(found, slopes(resident, settings), rtol=1e-3, atol=1e-6)
    # a layer may have been read ahead for the step that does not come
    largest = disk.buffer_bytes // 2
    own_section = tiny_config("unused", "lora", classifier=False, **settings).fwdllm
    assert ESTIMATORS[estimator].reads(own_section, 6) == passes
    assert read <= passes * disk.stored_bytes + 2 * largest
    if estimator != "projected":  # backpropagation needs neither what lies below the adapters nor the head twice
        assert read >= passes * disk.stored_bytes - 2 * largest


@pytest.mark.parametrize("cache_mib", [0, 64])
@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *itertools.product(["llama", "albert", "qwen2", "roberta"], ["lora", "ia3", "bottleneck"]),
        *itertools.product(["llama", "qwen2"], ["layernorm"]),
    ],
)
def test_passes_side_by_side_are_passes_one_by_one(
    tmp_path: Path, architecture: str, method: str, cache_mib: int
) -> None:
    """Whatever an adapter hangs on: parts that only containers hold stand perturbed over several layers."""
    classifier = architecture in ("albert", "roberta")
    folder = model_folder(tmp_path, architecture, "int4")
    settings = {"fwdllm.prefix_cache_mib": cache_mib, "fwdllm.probes": 7, "fwdllm.attention": "eager"}
    own: dict[str, Any] = {}
    if cache_mib and method == "lora" and architecture != "albert":
        own["layers_to_transform"] = [LAYERS - 1]  # with something below it to play back
    for estimator, together in (("central", 1), ("one_sided", 1), ("central", 2), ("one_sided", 3)):
        settings |= {"fwdllm.estimator": estimator, "fwdllm.probes_per_batch": together}
        resident = load(folder, method, classifier, **own, **settings)
        streamed = load(folder, method, classifier, base={**STREAM, "passes_per_read": 5}, **own, **settings)
        expected = slopes(resident, settings, classifier)
        assert np.array_equal(slopes(streamed, settings, classifier), expected) and expected.any()
        for mine, theirs in zip(
            Trainables.of_model(streamed.model).tensors, Trainables.of_model(resident.model).tensors, strict=True
        ):
            assert torch.equal(mine, theirs)


def test_what_is_played_back_is_not_read(tmp_path: Path) -> None:
    last = LAYERS - 1
    twin = Twin(
        tmp_path, "llama", "lora", {"layers_to_transform": [last]}, **{"fwdllm.base": STREAM}
    )  # fmt: skip
    disk = reader(twin.model)
    loss = twin.cached.on(twin.batch())
    with torch.no_grad():
        loss.here()
        before = disk.bytes_read
        for _ in range(4):
            loss.here()
    assert disk.bytes_read - before < 4 * 0.8 * disk.stored_bytes
    assert torch.equal(loss.here(), twin.plain.on(twin.batch()).here())


@pytest.mark.parametrize("method", ["lora", "ia3", "layernorm", "bottleneck", "output_residual", "head"])
def test_an_adapter_over_the_disk_is_saved_and_loaded(tmp_path: Path, method: str) -> None:
    folder = model_folder(tmp_path, "llama", "int4")
    loaded = load(folder, method, base=STREAM)
    trainables = Trainables.of_model(loaded.model)
    with torch.no_grad():
        for tensor in trainables.tensors:
            tensor.add_(0.03)
    saved = save_trained(
        loaded, tmp_path / "saved", dict(zip(trainables.names, trainables.tensors, strict=True))
    )  # fmt: skip
    again, config, _ = load_saved(saved)
    assert config.fwdllm.base.stream and reader_of(again.model) is not None
    ids = tiny_batch(classifier=False).input_ids
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["float", "int4"])
def test_merging_brings_everything_into_memory(tmp_path: Path, form: str, tied: bool) -> None:
    loaded = load(model_folder(tmp_path, "llama", form, tie_word_embeddings=tied), base=STREAM)
    trainables = Trainables.of_model(loaded.model)
    with torch.no_grad():
        for tensor in trainables.tensors:
            tensor.add_(0.03)
    save_trained(loaded, tmp_path / "run", dict(zip(trainables.names, trainables.tensors, strict=True)))
    again, _, _ = load_saved(merge(tmp_path / "run", tmp_path / "merged"))
    ids = tiny_batch(classifier=False).input_ids
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, loaded.model(ids).logits, rtol=1e-4, atol=1e-5)
    assert not packed_layers(again.model)


@pytest.mark.parametrize("estimator", ["closed_form", "projected"])
def test_whoever_looks_into_the_head_has_it_in_memory(tmp_path: Path, estimator: str) -> None:
    settings = {"fwdllm.estimator": estimator, "fwdllm.probes": 6, "rank": 4}
    folder = model_folder(tmp_path, "llama", "int4")
    streamed = load(folder, "output_residual", base=STREAM, **settings)
    assert streamed.model.get_output_embeddings().weight.isfinite().all()
    settings.pop("rank")
    assert np.array_equal(
        slopes(streamed, settings), slopes(load(folder, "output_residual", rank=4, **settings), settings)
    )


@pytest.mark.parametrize("form", ["float", "int4"])
@pytest.mark.parametrize(
    ("architecture", "estimator"), [("llama", "closed_form"), ("albert", "closed_form"), ("roberta", "central")]
)
def test_a_new_head_is_in_memory_over_what_is_on_the_disk(
    tmp_path: Path, architecture: str, estimator: str, form: str
) -> None:
    """The law of a classifier's head alone: the slopes of memory, and its own few kilobytes on the disk."""
    folder = model_folder(tmp_path, architecture, form)
    settings = {"fwdllm.estimator": estimator, "fwdllm.probes": 5}
    streamed = load(folder, "head", True, base=STREAM, **settings)
    expected = slopes(load(folder, "head", True, **settings), settings, True)
    assert expected.any() and np.array_equal(slopes(streamed, settings, True), expected)
    saved = save_trained(streamed, tmp_path / "saved")
    assert sum(file.stat().st_size for file in saved.glob("*.safetensors")) < 300_000
    again, _, _ = load_saved(saved)
    assert reader_of(again.model) is not None
    assert np.array_equal(slopes(again, settings, True), expected)


@pytest.mark.parametrize(
    ("method", "own", "pattern"),
    [
        ("full", {}, r"llm\.adapter\.use: is false.*leaves it on the disk"),
        ("bitfit", {}, r"adapter_method: 'bitfit' trains in place what .* leaves it on the disk"),
    ],
)
def test_what_would_have_to_be_in_memory_is_refused(
    tmp_path: Path, method: str, own: dict[str, Any], pattern: str
) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama")
    assert re.search(pattern, refusal(folder, method, base=STREAM, **own))


@pytest.mark.parametrize("base", [STREAM, {"quantise": "int4", "group": 32}, {}])
def test_an_adapter_that_looks_into_the_weights_is_refused(tmp_path: Path, base: dict[str, Any]) -> None:
    folder = model_folder(tmp_path, "llama", "float" if base else "int4")
    said = refusal(folder, base=base or None, use_dora=True)
    assert re.search(r"llm\.adapter\.args: .*use_dora.*reads the numbers.*float model, resident", said), said


@pytest.mark.parametrize(
    ("own", "base", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, STREAM, r"modules_to_save: \['lm_head'\].*lm_head\)"),
        ({"modules_to_save": ["embed_tokens"]}, STREAM, "modules_to_save.*embed_tokens"),
        ({"trainable_token_indices": [3, 4]}, STREAM, "trainable_token_indices.*embed_tokens"),
        ({"modules_to_save": ["down_proj"]}, None, "modules_to_save.*down_proj"),
        ({"target_parameters": ["q_proj.weight"]}, None, "target_parameters"),
    ],
)
def test_what_has_no_numbers_is_not_left_untrained_in_silence(
    tmp_path: Path, own: dict[str, Any], base: dict[str, Any] | None, named: str
) -> None:
    folder = model_folder(tmp_path, "llama", "int4")
    assert re.search(rf"llm\.adapter\.args {named}.*cannot be trained.*resident", refusal(folder, base=base, **own))


def test_a_head_in_memory_is_trained_beside_a_packed_base(tmp_path: Path) -> None:
    loaded = load(model_folder(tmp_path, "llama", "int4"), modules_to_save=["lm_head"])
    assert any("lm_head" in name for name in Trainables.of_model(loaded.model).names)


def test_packing_and_streaming_need_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name one in base\.folder"):
        tiny_config("m", "lora", **{"fwdllm.base": {"stream": True, "quantise": "int4"}})
    folder = save_tiny_model(tmp_path / "model", "llama")
    base = {"stream": True, "quantise": "int4", "group": 32, "folder": str(tmp_path / "kept")}
    loaded = load(folder, base=base)
    assert reader(loaded.model).stored_bytes < 60_000 and (tmp_path / "kept" / "config.json").is_file()


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@pytest.mark.parametrize("damage", ["cut", "changed", "touched"])
def test_a_file_that_changes_during_a_run_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    folder = model_folder(tmp_path, "llama", "int4")
    loaded = load(folder, base=STREAM)
    ids = tiny_batch(classifier=False).input_ids
    file = weights(folder)
    kept, state = file.read_bytes(), file.stat()
    with torch.no_grad():
        expected = loaded.model(ids).logits
        if damage == "cut":
            os.truncate(file, len(kept) // 2)
        else:
            with file.open("r+b") as opened:
                opened.seek(len(kept) - 9)
                opened.write(b"\x01" if damage == "changed" else kept[-9:-8])
            os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
        for _ in range(2):
            with pytest.raises(ModelError, match=rf"{re.escape(str(file))}: was changed.*resume"):
                loaded.model(ids)
        file.write_bytes(kept)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert torch.equal(loaded.model(ids).logits, expected)  # put back, it goes on


def test_a_file_that_is_shorter_than_its_header_says_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "llama", "int4")
    os.truncate(weights(folder), weights(folder).stat().st_size - 100)
    assert re.search(r"safetensors: is damaged or cut short", refusal(folder, base=STREAM))


def test_an_interrupt_inside_a_layer_leaves_everything_usable(tmp_path: Path) -> None:
    loaded = load(model_folder(tmp_path, "llama", "int4"), base=STREAM)
    ids = tiny_batch(classifier=False).input_ids
    with torch.no_grad():
        expected = loaded.model(ids).logits
        for name, layer in packed_layers(loaded.model)[::3]:

            def interrupt(*_: Any) -> None:
                raise KeyboardInterrupt

            handle = layer.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                loaded.model(ids)
            handle.remove()
            assert torch.equal(loaded.model(ids).logits, expected), name


def test_copies_of_a_model_share_what_is_on_the_disk(tmp_path: Path) -> None:
    loaded = load(model_folder(tmp_path, "llama", "int4"), base=STREAM)
    other = copy.deepcopy(loaded.model)
    ids = tiny_batch(classifier=False).input_ids
    with torch.no_grad():
        assert torch.equal(other(ids).logits, loaded.model(ids).logits)
    assert reader(other) is reader(loaded.model)


def test_a_tokenizer_that_wants_rows_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama", pad=False, vocab_size=99, eos=False)
    config = tiny_config(folder, "lora", classifier=False, **{"fwdllm.base": STREAM})
    with pytest.raises((ConfigError, ModelError), match=r"fwdllm\.base\.stream|tokenizer"):
        load_model(config, load_tokenizer(config))


_PEAK = """
import sys
from pathlib import Path
import torch
from fs_fwdllm.config import parse_config
from fs_fwdllm.model import load_model, load_tokenizer
config = parse_config({
    "model": {"type": sys.argv[1] + "@huggingface_llm"}, "llm": {"adapter": {"use": True}},
    "fwdllm": {"base": {"stream": sys.argv[2] == "stream"}},
})
loaded = load_model(config, load_tokenizer(config))
with torch.no_grad():
    loaded.model(torch.arange(3, 67)[None])
status = Path("/proc/self/status").read_text()  # what getrusage says begins with the parent's
print(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status")
def test_memory_holds_two_matrices_and_not_the_model(tmp_path: Path) -> None:
    """In a process of its own: float weights of 200 MiB, the largest of 5."""
    sizes = {"hidden_size": 512, "intermediate_size": 2560, "num_hidden_layers": 10, "num_attention_heads": 4}
    folder = save_tiny_model(tmp_path / "model", "llama", num_key_value_heads=4, **sizes)
    size_mib = weights(folder).stat().st_size >> 20
    assert size_mib > 180
    peaks = {}
    for way in ("resident", "stream"):
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(folder), way], capture_output=True, text=True, check=True
        )
        peaks[way] = int(done.stdout.split()[-1]) >> 10
    assert peaks["resident"] - peaks["stream"] > size_mib - 40, peaks
