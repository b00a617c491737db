"""How models are met: padding and special tokens as they take them, aliases kept, and what a run says about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.config import Config
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import ConfigError, EstimatorError, ModelError
from fs_fwdllm.forecast.plan import make_plan
from fs_fwdllm.model import load_model, load_tokenizer, save_trained
from fs_fwdllm.model.inputs import batch_on, groups_of
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.model.trial import Conduct, trial_rows
from fs_fwdllm.running.session import Session
from tests.model.architectures import ARCHITECTURES
from tests.model.tiny import save_tiny_model, save_tiny_tokenizer, tiny_batch, tiny_config

#: Encoders that count positions from their padding token, and a decoder that does.
COUNTING = ("roberta/classes", "xlm-roberta/classes", "mpnet/classes", "longformer/classes", "xglm")


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("method", ["full", "bitfit", "head"])
def test_positions_are_the_models_own_also_when_it_is_loaded_again(tmp_path: Path, name: str, method: str) -> None:
    """A tokenizer that pads with another token than the one positions are counted from."""
    row = ARCHITECTURES[name]
    if row.task == "causal_lm" and method == "head":
        pytest.skip("its head is tied to the embeddings")
    folder = row.save(tmp_path / "model")
    save_tiny_tokenizer(folder, pad=False)
    config = row.run_config(folder, method)
    loaded = load_model(config, load_tokenizer(config), 3)
    assert (loaded.tokenizer.pad_token_id, loaded.model.config.pad_token_id) == (2, 1)
    auto = {"causal_lm": transformers.AutoModelForCausalLM}.get(
        row.task, transformers.AutoModelForSequenceClassification
    )
    with quiet_transformers():
        saved, before = (auto.from_pretrained(place).eval() for place in (save_trained(loaded, tmp_path), folder))
    # Several: the last bit of a single row's product depends on where its weights lie in memory, on some processors.
    rows = torch.tensor([[5, 9, 2, 7, 1, 30], [2, 1, 8, 6, 40, 5], [7, 7, 2, 3, 1, 2], [1, 2, 30, 4, 9, 9]])
    inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    with torch.no_grad():
        ours = loaded.model(**inputs).logits
        assert torch.equal(saved(**inputs).logits, ours)
        assert torch.equal(before(**inputs).logits, ours), "nothing has been trained"


@pytest.mark.parametrize(("own", "expected"), [(1, "</s>"), (2, "</s>"), (None, "</s>")])
def test_a_missing_padding_token(tmp_path: Path, own: int | None, expected: str) -> None:
    """The model's own counts where the tokenizer has it as a special token."""
    folder = save_tiny_model(tmp_path / "model", "llama", pad=False, pad_token_id=own)
    assert load_tokenizer(tiny_config(folder, classifier=False)).pad_token == expected
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"extra_special_tokens": ["<pad>"]}))
    with_pad = load_tokenizer(tiny_config(folder, classifier=False)).pad_token
    assert with_pad == ("<pad>" if own == 1 else "</s>")


@pytest.mark.parametrize("name", ["t5/classes", "bart/classes"])
def test_texts_end_where_the_model_looks(tmp_path: Path, name: str) -> None:
    """With a tokenizer that adds no token of its own, for one text and for two, and again when it is saved."""
    row = ARCHITECTURES[name]
    folder = row.save(tmp_path / "model")
    config = row.run_config(folder, "lora")
    tokenizer = load_tokenizer(config)
    assert tokenizer(["w5 w6"])["input_ids"] == [[5, 6, 2]]
    assert tokenizer("w5", "w6")["input_ids"] == [5, 2, 6, 2]
    assert tokenizer([" ".join(["w5"] * 40)], truncation=True)["input_ids"][0][-2:] == [5, 2]
    tokenizer.save_pretrained(tmp_path / "again")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again")("w5 w6")["input_ids"] == [5, 6, 2]
    save_tiny_tokenizer(folder, pad=False)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"eos_token_id": 4_000}))
    with pytest.raises(ModelError, match=r"classifies a text by its end-of-text token.*give it the tokenizer"):
        load_tokenizer(config)


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    """Its results see the token that is to be predicted: a loss near zero that means nothing."""
    folder = save_tiny_model(tmp_path / "model", "bert", model_class="BertForMaskedLM")
    config = tiny_config(folder, "lora", classifier=False)
    with pytest.raises(ModelError, match=r"depends on later ones.*no causal language model.*@transformers"):
        load_model(config, load_tokenizer(config))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from(["right", "left", "none"]))
def test_rows_are_put_as_asked_and_none_is_lost(lengths: list[int], padding: str) -> None:
    width = max(lengths)
    ids = torch.arange(1, len(lengths) * width + 1).reshape(len(lengths), width)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    batch = batch_on("cpu", tiny_batch()).__class__(ids * mask, mask, torch.zeros(len(lengths)))
    seen: dict[int, list[int]] = {}
    for group in groups_of(batch, Conduct(padding), segments=False):
        rows = range(len(lengths)) if group.rows is None else group.rows.tolist()
        for row, tokens, kept in zip(rows, group.inputs["input_ids"], group.inputs["attention_mask"], strict=True):
            seen[row] = tokens[kept == 1].tolist()
            assert padding != "none" or kept.all()
            assert padding != "left" or kept[-1] == 1
    assert seen == {row: ids[row, :length].tolist() for row, length in enumerate(lengths)}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("accident", [None, RuntimeError, KeyboardInterrupt])
def test_parameters_that_are_shared_are_what_they_were(
    tmp_path: Path, architecture: str, accident: type | None
) -> None:
    """``trainable_token_indices`` of tied embeddings: two modules hold one container of parameters."""
    folder = save_tiny_model(tmp_path / "model", architecture, tie_word_embeddings=True)
    config = tiny_config(folder, "lora", classifier=False, trainable_token_indices=[5, 6])
    loaded = load_model(config, load_tokenizer(config))
    trainables = Trainables.of_model(loaded.model)
    batch_loss = Objective(loaded.model, trainables, "causal_lm").on(tiny_batch(classifier=False))
    held = {name: parameter for name, parameter in loaded.model.named_parameters(remove_duplicate=False)}
    before, digest = float(batch_loss.here()), trainables.digest()
    points = [torch.stack([tensor.detach() + 0.01, tensor.detach() - 0.01]) for tensor in trainables.tensors]
    if accident is None:
        losses = batch_loss.at_stack(points)
        for index in range(2):
            one = batch_loss.at([stack[index] for stack in points])
            assert float(losses[index]) == pytest.approx(float(one), rel=1e-6)
    else:

        def stop(*_: object) -> None:
            raise accident("planned")

        handle = loaded.model.get_output_embeddings().register_forward_pre_hook(stop)
        with pytest.raises(EstimatorError if accident is RuntimeError else accident):
            batch_loss.at_stack(points)
        handle.remove()
    after = dict(loaded.model.named_parameters(remove_duplicate=False))
    assert after.keys() == held.keys() and all(after[name] is held[name] for name in held)
    assert float(batch_loss.here()) == before
    assert trainables.digest() == digest


def test_trial_samples_are_framed_like_texts(tmp_path: Path) -> None:
    folder = ARCHITECTURES["t5/classes"].save(tmp_path / "model")
    tokenizer = load_tokenizer(ARCHITECTURES["t5/classes"].run_config(folder, "lora"))
    short, long = trial_rows(tokenizer, 100, 16)
    assert short[-1] == long[-1] == 2 and len(short) < len(long) <= 16
    assert [len(row) for row in trial_rows(tokenizer, 100, 3)] == [3, 3]
    assert all(len(row) >= 1 for row in trial_rows(tokenizer, 1, 1))


def run_config(folder: Path, architecture: str, **own: object) -> Config:
    rows = [json.dumps({"instruction": "w5 w6", "input": "", "output": f"w{7 + row} w9"}) for row in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    place = folder / architecture
    if not place.exists():
        ARCHITECTURES[architecture].save(place)
    config = ARCHITECTURES[architecture].run_config(place, "lora", **own)
    data = {"type": "rows.jsonl@llm", "root": str(folder), "splits": [0.8, 0.1, 0.1]}
    update = {"data": config.data.model_copy(update=data), "llm": config.llm.model_copy(update={"tok_len": 64})}
    return config.model_copy(update=update | {"federate": config.federate.model_copy(update={"client_num": 2})})


def test_a_run_and_its_plan_say_that_probes_go_one_by_one(tmp_path: Path) -> None:
    config = run_config(tmp_path, "bloom", probes=4, probes_per_batch=2)
    said: list[str] = []
    session = Session.open(config)
    session.announce(said.append)
    remark = [line for line in said if "fwdllm.probes_per_batch 2" in line]
    assert len(remark) == 1 and "one by one" in remark[0]
    plan = make_plan(config)
    assert remark[0] in plan.remarks
    assert plan.memory.peak_bytes <= make_plan(run_config(tmp_path, "bloom", probes=4)).memory.peak_bytes * 1.05


def test_a_run_and_its_plan_refuse_forward_mode_by_its_key(tmp_path: Path) -> None:
    config = run_config(tmp_path, "bloom", estimator="forward_mode")
    for opened in (Session.open, make_plan):
        with pytest.raises(EstimatorError, match=r"fwdllm\.estimator 'forward_mode'.*fwdllm\.estimator: central"):
            opened(config)


@pytest.mark.parametrize(
    ("saved", "wanted", "method", "words"),
    [
        (
            "bfloat16",
            "auto",
            "lora",
            ["saved in bfloat16 and loaded as float32", "bfloat16 halves that, with fwdllm.estimator"],
        ),
        ("bfloat16", "auto", "full", ["saved in bfloat16 and loaded as float32", "what is trained is float32"]),
        ("bfloat16", "bfloat16", "full", ["fwdllm.base.compute_dtype bfloat16 has no effect", "trains all parameters"]),
        ("float32", "auto", "lora", []),
        ("bfloat16", "float32", "lora", []),
    ],
)
def test_what_becomes_of_a_half_precision_checkpoint_is_said(
    tmp_path: Path, saved: str, wanted: str, method: str, words: list[str]
) -> None:
    folder = ARCHITECTURES["llama"].save(tmp_path / "llama")
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, saved))
        model.save_pretrained(folder)
    config = run_config(tmp_path, "llama", base_dtype=wanted)
    if method == "full":
        adapter = config.llm.adapter.model_copy(update={"use": False})
        config = config.model_copy(update={"llm": config.llm.model_copy(update={"adapter": adapter})})
    remarks = [line for line in Session.open(config).remarks() if "float" in line]
    assert len(remarks) == bool(words)
    assert all(word in "".join(remarks) for word in words)


def test_no_target_for_an_adapter_is_said_with_a_way_out(tmp_path: Path) -> None:
    folder = ARCHITECTURES["olmo"].save(tmp_path / "model")
    config = ARCHITECTURES["olmo"].run_config(folder, "layernorm")
    with pytest.raises((ConfigError, ModelError), match=r"its norms have no weights.*use lora"):
        load_model(config, load_tokenizer(config))
