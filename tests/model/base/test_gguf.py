"""A GGUF file is a base like any other: transformers' logits, packed or on the disk, trained beside, saved, loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.inference.merging import merge
from fs_fwdllm.model import load_saved, load_tokenizer, save_trained
from fs_fwdllm.model.base.identity import base_digest
from fs_fwdllm.model.base.packed import PackedLinear, elements_of, packed_layers, reader_of, unpack
from fs_fwdllm.model.base.packing import Form
from fs_fwdllm.model.base.quantising import quantise_folder
from fs_fwdllm.model.base.tables import PackedEmbedding, StreamedEmbedding
from fs_fwdllm.model.gguf_settings import gguf_config
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.model.source import model_source
from tests.model.base.test_reading import load, refusal, slopes
from tests.model.tiny import tiny_config
from tests.model.tiny_gguf import VOCABULARY, save_tiny_gguf

STREAM = {"stream": True}
IDS = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))


def mixed(name: str) -> str:
    """As llama-quantize's Q4_K_M has it: a table and some layers in a finer form."""
    return "Q6_K" if name in ("output.weight", "token_embd.weight") or "ffn_down" in name else "Q4_K"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
        return found


def reference(file: Path) -> Any:
    """What transformers makes of it, in float32."""
    with quiet_transformers():
        return transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        ).eval()


def test_heads_are_as_wide_as_the_file_says(tmp_path: Path) -> None:
    """transformers does not read that of every architecture, and takes the width of the family's first models."""
    file = save_tiny_gguf(tmp_path / "model.gguf", "Q8_0", "qwen3")
    config = gguf_config(file)
    assert config.head_dim == 64 != transformers.Qwen3Config().head_dim
    with quiet_transformers():
        told = {"gguf_file": file.name, "config": config, "dtype": torch.float32}
        expected = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **told).eval())
    torch.testing.assert_close(logits(load(file).model), expected, rtol=1e-5, atol=1e-5)
    config.head_dim = 32
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json: head_dim is 32, but model\.gguf beside it says 64"):
        load(file)


FORMS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", mixed]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form if isinstance(form, str) else "mixed")
@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", False), ("llama", True), ("qwen2", True), ("gemma2", True), ("gemma3", True)]
)
def test_logits_are_those_of_transformers_and_the_disk_s_those_of_memory(
    tmp_path: Path, architecture: str, tied: bool, form: str | Callable[[str], str]
) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", form, architecture, tied=tied)
    expected = logits(reference(file))
    resident, streamed = load(file), load(file, base=STREAM)
    torch.testing.assert_close(logits(resident.model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(streamed.model), logits(resident.model))
    assert expected.std() > 0.1  # rows in another order would show
    assert elements_of(resident.model) == elements_of(streamed.model)
    is_float = form in ("F32", "F16", "BF16")
    assert bool(packed_layers(resident.model)) != is_float and len(packed_layers(streamed.model)) >= 14
    if not architecture.startswith("gemma"):  # whose table is scaled, and read as floats
        assert isinstance(streamed.model.get_input_embeddings(), StreamedEmbedding)
        assert isinstance(resident.model.get_input_embeddings(), PackedEmbedding) != is_float
        assert isinstance(resident.model.get_output_embeddings(), PackedLinear) != is_float


def test_packed_matrices_take_the_memory_that_they_take_in_the_file(tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", mixed, tied=True)
    model = load(file).model
    held = {tensor.data_ptr(): tensor.nbytes for tensor in model.buffers() if tensor.dtype == torch.uint8}
    assert sum(held.values()) > 0.9 * file.stat().st_size - 20_000  # of vocabulary and norms
    assert sum(held.values()) < file.stat().st_size
    floats = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    assert floats < 10_000


@pytest.mark.parametrize(
    ("estimator", "own"),
    [
        ("central", {}), ("one_sided", {"probes_per_batch": 3}), ("forward_mode", {"probes_per_batch": 6}),
        ("projected", {"gradient_checkpointing": True}),
    ],
)  # fmt: skip
def test_slopes_over_the_disk_memory_and_numbers_are_the_same(
    tmp_path: Path, estimator: str, own: dict[str, Any]
) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", mixed)
    settings = {"fwdllm.estimator": estimator, "fwdllm.attention": "eager", "fwdllm.probes": 6}
    settings |= {f"fwdllm.{key}": own[key] for key in own}
    found = slopes(load(file, base=STREAM, **settings), settings)
    resident = load(file, **settings)
    assert np.array_equal(found, slopes(resident, settings)) and np.abs(found).max() > 1e-4
    unpack(resident.model)
    np.testing.assert_allclose(found, slopes(resident, settings), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("base", [None, STREAM], ids=["memory", "disk"])
@pytest.mark.parametrize("method", ["lora", "ia3", "layernorm", "bottleneck", "output_residual"])
def test_what_is_saved_is_loaded_over_the_same_file(tmp_path: Path, method: str, base: dict[str, Any] | None) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", mixed)
    loaded = load(file, method, base=base)
    trainables = Trainables.of_model(loaded.model)
    with torch.no_grad():
        for tensor in trainables.tensors:
            tensor.add_(0.03)
    saved = save_trained(loaded, tmp_path / "saved", dict(zip(trainables.names, trainables.tensors, strict=True)))
    again, config, _ = load_saved(saved)
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert len(packed_layers(again.model)) == len(packed_layers(loaded.model)) > 0
    assert config.fwdllm.base.stream == (base is not None) == (reader_of(again.model) is not None)
    told = [json.loads(path.read_text()).get("base_model_name_or_path") for path in saved.glob("*_config.json")]
    assert str(file) in told


def test_peft_reads_the_adapter_as_its_card_says(tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", mixed)
    loaded = load(file)
    trainables = Trainables.of_model(loaded.model)
    values = {
        name: torch.full_like(tensor, 0.02) for name, tensor in zip(trainables.names, trainables.tensors, strict=True)
    }
    saved = save_trained(loaded, tmp_path / "saved", values)
    code = (saved / "README.md").read_text().split("```python")[2].split("```")[0]
    known: dict[str, Any] = {}
    with quiet_transformers():
        exec(code.replace("FOLDER_OF_THE_BASE", str(tmp_path)).replace("THIS_FOLDER", str(saved)), known)
    again, _, _ = load_saved(saved)
    torch.testing.assert_close(logits(known["model"].eval()), logits(again.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [None, STREAM], ids=["memory", "disk"])
@pytest.mark.parametrize(
    ("method", "arguments", "tied"),
    [("lora", {}, True), ("lora", {}, False), ("output_residual", {"bias": False}, True)],
)
def test_merging_unpacks_the_file(
    tmp_path: Path, method: str, arguments: dict[str, Any], tied: bool, base: dict[str, Any] | None
) -> None:
    loaded = load(save_tiny_gguf(tmp_path / "model.gguf", mixed, tied=tied), method, base=base, **arguments)
    trainables = Trainables.of_model(loaded.model)
    with torch.no_grad():
        for tensor in trainables.tensors:
            tensor.add_(0.02)
    save_trained(loaded, tmp_path / "adapter", dict(zip(trainables.names, trainables.tensors, strict=True)))
    merged = merge(tmp_path / "adapter", tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(plain), logits(loaded.model), rtol=1e-4, atol=1e-4)
    again, _, _ = load_saved(merged)
    assert not packed_layers(again.model)


def test_a_float_file_is_packed_as_it_is_read(tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", "F16")
    plain, packed = load(file), load(file, base={"quantise": "int8", "group": 32})
    assert len(packed_layers(packed.model)) == 14 and not packed_layers(plain.model)
    torch.testing.assert_close(logits(packed.model), logits(plain.model), rtol=0.05, atol=0.05)
    said = refusal(file, base={"quantise": "int8", "folder": str(tmp_path / "kept")})
    assert re.search(r"fwdllm\.base\.folder: .*is a GGUF file.*leave the key out", said)


@pytest.mark.parametrize("form", ["F16", "Q4_K"])
def test_the_model_s_own_files_beside_it_come_first(tmp_path: Path, form: str) -> None:
    file = save_tiny_gguf(
        tmp_path / "model.gguf", form, tokenizer=False, extra={"rope_freqs.weight": np.ones(32, np.float32)}
    )
    assert re.search(r"no vocabulary; put the model's tokenizer files beside it", refusal(file))
    with_one = save_tiny_gguf(tmp_path / "other" / "model.gguf" if (tmp_path / "other").mkdir() is None else file, form)
    config = tiny_config(with_one, "lora", classifier=False)
    load_tokenizer(config).save_pretrained(tmp_path)
    assert re.search(r"holds 1 tensors.*rope_freqs\.weight.*own config\.json", refusal(file))
    settings = load(with_one).model.config
    settings.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    settings.save_pretrained(tmp_path)
    loaded = load(file)
    assert loaded.model.config.rope_parameters["rope_type"] == "llama3"
    assert not torch.equal(logits(loaded.model), logits(load(with_one).model))
    assert (
        load_tokenizer(tiny_config(file, "lora", classifier=False))("the").input_ids
        == load_tokenizer(config)("the").input_ids
    )


@pytest.mark.parametrize(
    ("key", "value"), [("num_attention_heads", 8), ("num_key_value_heads", 4), ("hidden_size", 128)]
)
def test_the_configuration_of_another_model_beside_it_is_refused(tmp_path: Path, key: str, value: int) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", mixed)
    settings = load(file).model.config
    setattr(settings, key, value)
    settings.save_pretrained(tmp_path)
    assert re.search(rf"config\.json: {key} is {value}, but model\.gguf beside it says .*another model", refusal(file))


def test_the_tokenizer_is_transformers_but_for_tokens_without_a_row(tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf")
    ours = load_tokenizer(tiny_config(file, "lora", classifier=False))
    with quiet_transformers():
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    text = "the thin and <|end|> Ünïcode\n  42"
    assert ours(text).input_ids == theirs(text).input_ids and ours.decode(ours(text).input_ids) == text
    assert len(theirs) == VOCABULARY + 1 and len(ours) == VOCABULARY
    assert ours.special_tokens_map["eos_token"] == "<|end|>" and ours.bos_token_id == VOCABULARY - 2
    config = load(file).model.config
    assert (config.bos_token_id, config.eos_token_id) == (VOCABULARY - 2, VOCABULARY - 1)


def test_a_folder_stands_for_its_only_file(tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf")
    found = model_source(tiny_config(tmp_path, "lora", classifier=False))
    assert found.location == str(file) and found.gguf == file and found.is_local
    shutil.copyfile(file, tmp_path / "another.gguf")
    assert re.search(r"holds 2 GGUF files \(another\.gguf, model\.gguf\); name one", refusal(tmp_path))
    assert re.search(
        r"the file .*modle\.gguf' does not exist; did you mean .*model\.gguf", refusal(tmp_path / "modle.gguf")
    )


def test_the_digest_is_of_settings_tensors_and_form(tmp_path: Path) -> None:
    def digest(name: str, *arguments: Any, **own: Any) -> bytes:
        (tmp_path / name).mkdir()
        config = tiny_config(save_tiny_gguf(tmp_path / name / "m.gguf", *arguments, **own), "lora", classifier=False)
        return base_digest(model_source(config), config.fwdllm.base)

    first = digest("a", "Q8_0")
    assert len(first) == 16 and digest("b", "Q8_0") == first
    assert digest("c", "Q8_0", settings={"general.url": "x"}) == first  # of who wrote it
    others = {digest("d", "Q4_0"), digest("e", "Q4_K"), digest("f", "Q8_0", tied=True)}
    others.add(digest("g", "Q8_0", settings={"llama.expert_count": 0}))
    assert len(others | {first}) == 5


@pytest.mark.parametrize(
    ("method", "own", "pattern"),
    [
        ("full", {}, r"llm\.adapter\.use: is false.*is packed \(GGUF Q4_K, Q6_K\)"),
        ("bitfit", {}, r"'bitfit' trains in place what the layers of the base add.*folder of the float model"),
        ("lora", {"federate.method": "fedcybgd"}, r"federate\.method: is 'fedcybgd'.*GGUF"),
        (
            "lora",
            {"base": {"quantise": "int4"}},
            r"fwdllm\.base\.quantise: is int4.*packed already \(GGUF Q4_K, Q6_K\)",
        ),
        ("lora", {"use_dora": True}, r"llm\.adapter\.args: .*use_dora.*reads the numbers"),
        ("lora", {"modules_to_save": ["lm_head"]}, r"modules_to_save.*cannot be trained"),
        ("lora", {"trainable_token_indices": [3]}, r"trainable_token_indices.*cannot be trained"),
        ("lora", {"classifier": True}, r"model\.type: .*read as a language model: .*@huggingface_llm"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, method: str, own: dict[str, Any], pattern: str) -> None:
    said = refusal(save_tiny_gguf(tmp_path / "model.gguf", mixed), method, **own)
    assert re.search(pattern, said), said


def test_quantising_a_file_is_refused(tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"is a file; a GGUF file is packed already.*folder of a float model"):
        quantise_folder(file, tmp_path / "out", Form("int4"))
    with pytest.raises(ModelError, match=r"model\.gguf"):
        quantise_folder(tmp_path, tmp_path / "out", Form("int4"))


@pytest.mark.parametrize(
    ("architecture", "pattern"),
    [("gpt2", "not kept as the model has it"), ("wavtokenizer-dec", "gives no configuration: .*not supported")],
)
def test_architectures_that_are_kept_otherwise_are_refused(tmp_path: Path, architecture: str, pattern: str) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.add_tensor("blk.0.attn_qkv.weight", np.ones((96, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = refusal(file)
    assert re.search(pattern, said) and str(file) in said, said


def test_a_file_that_is_cut_during_a_run_stops_it(tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", mixed)
    loaded, kept = load(file, base=STREAM), file.read_bytes()
    logits(loaded.model)
    file.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ModelError, match=rf"{re.escape(str(file))}: was changed while a run was reading it"):
        logits(loaded.model)
    assert re.search(r"damaged or cut short", refusal(file))


def test_bfloat16_computes_over_the_same_bytes(tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", "Q8_0")
    wide, narrow = load(file), load(file, base={"compute_dtype": "bfloat16"})
    for (_, one), (_, other) in zip(packed_layers(wide.model), packed_layers(narrow.model), strict=True):
        assert torch.equal(one.dequantised(), other.dequantised())
    found = logits(narrow.model)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), logits(wide.model), rtol=0.1, atol=0.05)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(ModelError, match=r"pip install fs-fwdllm\[gguf\]"):
        model_source(tiny_config(file, "lora", classifier=False))


def test_a_closed_form_has_the_head_in_memory(tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", mixed, tied=True)
    settings = {"fwdllm.estimator": "closed_form", "fwdllm.probes": 6}
    for base in (None, STREAM):
        loaded = load(file, "output_residual", base=base, rank=4, **settings)
        assert loaded.model.get_output_embeddings().weight.isfinite().all()
        assert np.isfinite(slopes(loaded, settings)).all()


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", mixed)
    tokenizer = load_tokenizer(tiny_config(file, "lora", classifier=False))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"265 tokens and its table 264 rows.*packed or on the disk cannot grow"):
        load(file)
