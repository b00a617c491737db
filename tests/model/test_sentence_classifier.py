"""A classifier on a sentence encoder reads the vector the encoder was trained to make, and nothing loads it wrongly.

The slow reference of pooling is a loop over single rows; where sentence-transformers is installed, its own modules are
asked, too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import AutoPeftModel, AutoPeftModelForSequenceClassification, PeftModel
from torch import nn

import fs_fwdllm
from fs_fwdllm.config import parse_config
from fs_fwdllm.config.own_sections import POOLING_WORDS
from fs_fwdllm.core.direction import DirectionKey, make_distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.estimator import Backprop
from fs_fwdllm.estimator.base import stack_directions
from fs_fwdllm.method import Parts
from fs_fwdllm.model import LoadedModel, load_model, load_saved, load_tokenizer, save_trained
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.model.sentence_classifier import SentenceClassifier, pooled, scaled
from fs_fwdllm.model.sentence_layout import POOLINGS, read_layout
from fs_fwdllm.model.source import folder_files
from fs_fwdllm.model.trainable_parts import PARTS
from fs_fwdllm.running.evaluating import evaluate_run
from tests.host.small import METHODS, World, read_jsonl
from tests.host.test_resume import interrupted_at
from tests.model.architectures import ARCHITECTURES, row_of
from tests.model.sentence import save_tiny_encoder
from tests.model.test_bottleneck import logits, shake
from tests.model.tiny import HIDDEN, save_tiny_model, tiny_batch, tiny_config

ALLOWED = ["fs_fwdllm.model.sentence_classifier"]


def load(folder: Path, method: str = "head", classes: Any = 3, **changes: Any) -> LoadedModel:
    config = tiny_config(folder, method, **changes)
    return load_model(config, load_tokenizer(config), classes)


def one_row(hidden: torch.Tensor, word: str) -> torch.Tensor:
    """The definition, for a text of ``[tokens, width]`` without padding."""
    tokens = len(hidden)
    if word in ("cls", "lasttoken"):
        return hidden[0 if word == "cls" else -1]
    if word == "max":
        return torch.stack([column.max() for column in hidden.T])
    if word == "weightedmean":
        return sum((place + 1) * hidden[place] for place in range(tokens)) / sum(range(1, tokens + 1))
    total = sum(hidden[place] for place in range(tokens))
    return total / (tokens if word == "mean" else tokens**0.5)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    word=st.sampled_from(POOLING_WORDS),
    left=st.booleans(),
    seed=st.integers(0, 100),
)
def test_pooling_is_its_definition_on_whichever_side_padding_stands(
    lengths: list[int], word: str, left: bool, seed: int
) -> None:
    """What stands in padding may be anything, also not a number."""
    width, tokens = 3, max(lengths)
    hidden = torch.randn(len(lengths), tokens, width, generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    hidden[mask == 0] = torch.nan
    expected = torch.stack([one_row(rows[kept == 1], word) for rows, kept in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(pooled(hidden, mask, (word,)), expected)


@pytest.mark.parametrize("words", [*((word,) for word in POOLING_WORDS), ("cls", "mean"), POOLING_WORDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_is_sentence_transformers(words: tuple[str, ...], dtype: torch.dtype) -> None:
    modules = pytest.importorskip("sentence_transformers.models", reason="sentence-transformers is not installed")
    hidden = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.as_tensor(tiny_batch().attention_mask)
    theirs = modules.Pooling(4, tuple(POOLINGS[word] for word in words))
    expected = theirs({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(pooled(hidden, mask, words), expected)


def test_scales() -> None:
    vectors = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)) + 3
    assert torch.equal(scaled(vectors, "none"), vectors)
    torch.testing.assert_close(scaled(vectors, "unit").norm(dim=1), torch.ones(4))
    standardised = scaled(vectors, "layer_norm")
    torch.testing.assert_close(standardised.mean(dim=1), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(standardised.pow(2).sum(dim=1), torch.full((4,), 9.0), rtol=1e-4, atol=0)


def test_the_words_of_the_key_are_those_that_can_be_pooled() -> None:
    assert tuple(POOLINGS) == POOLING_WORDS


@pytest.mark.parametrize("word", [*POOLING_WORDS, "cls+mean"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_every_pooling_has_every_kind_of_slope(tmp_path: Path, architecture: str, word: str) -> None:
    """Rows alone, probes in one pass, and forward mode: against a batch, probes one by one, and backpropagation."""
    folder = save_tiny_model(tmp_path / "m", architecture)
    changes = {"fwdllm.pooling": word, "fwdllm.estimator": "forward_mode", "fwdllm.attention": "eager"}
    config = tiny_config(folder, "lora", **changes)
    loaded = load_model(config, load_tokenizer(config), 3)
    shake(loaded.model)
    parts = Parts.build(
        config, loaded.model, loaded.task, 1, full=False, conduct=loaded.conduct, trial=loaded.trial
    )  # fmt: skip
    batch = tiny_batch()
    together = parts.objective.on(batch)
    alone = [parts.objective.on(row_of(batch, row)).logits() for row in range(3)]
    torch.testing.assert_close(together.logits(), torch.cat(alone), rtol=1e-5, atol=2e-6)

    keys = [DirectionKey(5, seed) for seed in range(3)]
    directions = list(stack_directions(together, keys, make_distribution("rademacher")))
    Backprop(loaded.model).gradient(together)
    gradient = [tensor.grad for tensor in parts.trainables.tensors]
    exact = [sum(float((z[k] * g).sum()) for z, g in zip(directions, gradient, strict=True)) for k in range(3)]
    for estimator, size, tolerance in (("forward_mode", 1, 1e-4), ("forward_mode", 3, 1e-4), ("central", 3, 2e-2)):
        own = config.fwdllm.model_copy(update={"estimator": estimator, "probes_per_batch": size, "radius": 1e-3})
        measuring = parts.with_config(config.model_copy(update={"fwdllm": own})).measuring(
            make_distribution("rademacher")
        )
        np.testing.assert_allclose(measuring(1).slopes(together, [keys]).values, exact, rtol=tolerance, atol=tolerance)


def test_the_closed_form_of_its_head_is_backpropagation(tmp_path: Path) -> None:
    config = tiny_config(save_tiny_encoder(tmp_path / "m"), "head", **{"fwdllm.estimator": "closed_form"})
    loaded = load_model(config, load_tokenizer(config), 3)
    shake(loaded.model)
    parts = Parts.build(config, loaded.model, loaded.task, 1, full=False, conduct=loaded.conduct, trial=loaded.trial)
    batch_loss, distribution = parts.objective.on(tiny_batch()), make_distribution("rademacher")
    keys = [DirectionKey(5, seed) for seed in range(3)]
    measured = parts.measuring(distribution)(1).slopes(batch_loss, [keys]).values
    directions = list(stack_directions(batch_loss, keys, distribution))
    Backprop(loaded.model).gradient(batch_loss)
    gradient = [tensor.grad for tensor in parts.trainables.tensors]
    exact = [sum(float((z[k] * g).sum()) for z, g in zip(directions, gradient, strict=True)) for k in range(3)]
    np.testing.assert_allclose(measured, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["bert/classes", "fnet/classes", "longformer/classes", "roberta/classes", "xlnet/classes"]
)
def test_a_sample_alone_is_the_sample_in_a_batch_in_other_architectures(tmp_path: Path, name: str) -> None:
    row = ARCHITECTURES[name]
    config = row.run_config(row.save(tmp_path / "m"), "head", pooling="mean")
    loaded = load_model(config, load_tokenizer(config), 3)
    assert isinstance(loaded.model, SentenceClassifier)
    shake(loaded.model)
    objective = Objective(
        loaded.model, Trainables.of_model(loaded.model), loaded.task, conduct=loaded.conduct
    )  # fmt: skip
    alone = [objective.on(row_of(row.batch(), index)).logits() for index in range(3)]
    torch.testing.assert_close(objective.on(row.batch()).logits(), torch.cat(alone), rtol=1e-5, atol=2e-6)


def test_of_an_encoder_decoder_the_encoder_is_read_and_one_without_such_a_class_is_refused(tmp_path: Path) -> None:
    config = ARCHITECTURES["t5/classes"].run_config(
        ARCHITECTURES["t5/classes"].save(tmp_path / "t5"), "head", pooling="mean"
    )
    model: Any = load_model(config, load_tokenizer(config), 3).model
    assert type(model.features.transformer).__name__ == "T5EncoderModel"
    config = ARCHITECTURES["bart/classes"].run_config(
        ARCHITECTURES["bart/classes"].save(tmp_path / "bart"), "head", pooling="mean"
    )
    with pytest.raises(ModelError, match=r"has a decoder.*fwdllm\.pooling none"):
        load_model(config, load_tokenizer(config), 3)


def test_the_models_own_files_decide_and_the_key_overrides_them(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "m", pooling="cls")
    loaded = load(folder)
    assert isinstance(loaded.model, SentenceClassifier)
    assert loaded.facts.tree["fwdllm"]["pooling"] == "cls"
    assert loaded.facts.tree["fwdllm"]["feature_scale"] == "layer_norm"
    assert "pooling cls, as its modules.json says" in "".join(loaded.remarks)
    assert load(folder, **{"fwdllm.pooling": "mean + cls"}).facts.tree["fwdllm"]["pooling"] == "cls+mean"
    plain = load(folder, **{"fwdllm.pooling": "none"})
    assert type(plain.model).__name__ == "BertForSequenceClassification" and not plain.remarks
    assert plain.facts.tree["fwdllm"]["pooling"] == "none"
    assert type(load(save_tiny_model(tmp_path / "plain", "bert")).model).__name__ == "BertForSequenceClassification"


def test_of_a_hub_name_that_is_in_the_cache_the_files_there_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout is the one the hub's own client writes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, save in (("encoder", save_tiny_encoder), ("plain", lambda folder: save_tiny_model(folder, "bert"))):
        place = tmp_path / f"models--tiny--{name}"
        save(place / "snapshots" / ("0" * 40))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0" * 40)
    assert read_layout("tiny/plain") is None
    layout = read_layout("tiny/encoder")
    assert layout is not None and layout.pooling == ("mean",)
    loaded = load(Path("tiny/encoder"), "lora")
    shake(loaded.model)
    again = load_saved(save_trained(loaded, tmp_path / "run"))[0]
    assert torch.equal(logits(again.model, tiny_batch()), logits(loaded.model, tiny_batch()))


def test_recomputed_activations_give_the_same_gradient(tmp_path: Path) -> None:
    loaded = load(save_tiny_encoder(tmp_path / "m"), "lora")
    shake(loaded.model)
    trainables = Trainables.of_model(loaded.model)
    batch_loss = Objective(loaded.model, trainables, loaded.task).on(tiny_batch())
    gradients = []
    for checkpointing in (False, True):
        Backprop(loaded.model, gradient_checkpointing=checkpointing).gradient(batch_loss)
        gradients.append([tensor.grad.clone() for tensor in trainables.tensors if tensor.grad is not None])
        loaded.model.zero_grad(set_to_none=True)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_older_files_say_it_by_flags(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "m")
    flags = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": HIDDEN, **flags}))
    layout = read_layout(str(folder))
    assert layout is not None and layout.pooling == ("cls", "mean") and layout.scale == "unit"
    model: Any = load(folder).model
    assert model.classifier.in_features == 2 * HIDDEN


def test_modules_that_are_not_known_are_told_and_the_plain_head_is_taken(tmp_path: Path) -> None:
    loaded = load(save_tiny_encoder(tmp_path / "m", then=("Dense", "Normalize")))
    assert not isinstance(loaded.model, SentenceClassifier)
    assert any("also pass Dense" in remark and "fwdllm.pooling mean" in remark for remark in loaded.remarks)
    assert isinstance(load(tmp_path / "m", **{"fwdllm.pooling": "mean"}).model, SentenceClassifier)


def test_a_transformer_in_a_folder_of_its_own(tmp_path: Path) -> None:
    flat, nested = save_tiny_encoder(tmp_path / "flat"), save_tiny_encoder(tmp_path / "nested")
    (nested / "0_BERT").mkdir()
    for path in nested.iterdir():
        if path.is_file() and path.name != "modules.json":
            shutil.move(path, nested / "0_BERT")
    listed = json.loads((nested / "modules.json").read_text())
    listed[0]["path"] = "0_BERT"
    (nested / "modules.json").write_text(json.dumps(listed))
    assert torch.equal(logits(load(flat).model, tiny_batch()), logits(load(nested).model, tiny_batch()))


def test_only_the_classifier_is_trained_and_its_start_is_keyed_by_the_seed(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "m")
    one, other = load(folder).model, load(folder).model
    trained = [name for name, parameter in one.named_parameters() if parameter.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]
    assert Trainables.of_model(one).digest() == Trainables.of_model(other).digest()
    assert float(one.get_parameter("classifier.weight").detach().abs().max()) > 0
    assert not any("pooler" in name for name, _ in one.named_parameters()), "nobody reads it"


def test_the_prefix_cache_keeps_one_vector_a_sample(tmp_path: Path) -> None:
    loaded = load(save_tiny_encoder(tmp_path / "m"))
    objective = Objective(loaded.model, Trainables.of_model(loaded.model), loaded.task, prefix_cache_bytes=1 << 20)
    batch = tiny_batch()
    batch = type(batch)(batch.input_ids, batch.attention_mask, batch.labels, key="one")
    with torch.no_grad():
        first, again = float(objective.on(batch).here()), float(objective.on(batch).here())
    assert first == again and objective.cache.hits == 1
    assert objective.cache.used_bytes == len(batch) * HIDDEN * 4


DTYPES = ("float32", "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [method for method in PARTS if method != "output_residual"])  # of decoders
def test_what_is_saved_is_loaded_with_the_same_bits_and_by_nothing_else(
    tmp_path: Path, method: str, dtype: str
) -> None:
    folder = save_tiny_encoder(tmp_path / "m")
    loaded = load(folder, method, **{"fwdllm.base.compute_dtype": dtype})
    untrained = logits(loaded.model, tiny_batch())
    shake(loaded.model)
    ours = logits(loaded.model, tiny_batch())
    assert not torch.equal(ours, untrained)
    written = save_trained(loaded, tmp_path / "run")
    torch.manual_seed(99)
    assert torch.equal(logits(load_saved(written)[0].model, tiny_batch()), ours)
    with quiet_transformers():
        if PARTS[method].saved_as == "peft":
            check_adapter(written, folder, ours, exactly=dtype == "float32")
            return
        with pytest.raises((ValueError, OSError)):
            transformers.AutoModelForSequenceClassification.from_pretrained(written)
    if PARTS[method].saved_as == "model":
        shutil.rmtree(folder)
        assert torch.equal(logits(load_saved(written)[0].model, tiny_batch()), ours)
        if dtype == "float32":
            assert torch.equal(logits(SentenceClassifier.from_pretrained(written), tiny_batch()), ours)


def check_adapter(written: Path, base: Path, ours: torch.Tensor, *, exactly: bool) -> None:
    again = AutoPeftModel.from_pretrained(str(written), import_allowlist=ALLOWED).eval()
    if exactly:
        assert torch.equal(logits(again, tiny_batch()), ours)
    else:
        torch.testing.assert_close(logits(again, tiny_batch()).float(), ours.float(), rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match=r"import_allowlist=\['fs_fwdllm\.model\.sentence_classifier'\]"):
        AutoPeftModelForSequenceClassification.from_pretrained(str(written))
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    with pytest.raises(ValueError, match="No modules were targeted"):
        PeftModel.from_pretrained(plain, written)


@pytest.mark.parametrize("pooling", ["mean", "cls+max"])
@pytest.mark.parametrize("scale", ["none", "unit", "layer_norm"])
def test_sentence_transformers_gives_the_logits_of_a_saved_folder(tmp_path: Path, pooling: str, scale: str) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folder = save_tiny_encoder(tmp_path / "m")
    loaded = load(folder, "full", **{"fwdllm.pooling": pooling, "fwdllm.feature_scale": scale})
    shake(loaded.model)
    written = save_trained(loaded, tmp_path / "run")
    card = (written / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and 'SentenceTransformer("THIS_FOLDER")' in card
    batch = tiny_batch()
    rows = zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True)
    texts = [" ".join(f"w{token}" for token, kept in zip(*row, strict=True) if kept) for row in rows]
    with quiet_transformers():
        theirs = library.SentenceTransformer(str(written), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(theirs, logits(loaded.model, batch))


def test_a_merged_adapter_is_a_sentence_classifier_too(tmp_path: Path) -> None:
    loaded = load(save_tiny_encoder(tmp_path / "m"), "lora")
    shake(loaded.model)
    save_trained(loaded, tmp_path / "run")
    merged = fs_fwdllm.merge(tmp_path / "run", tmp_path / "merged")
    again, _, facts = load_saved(merged)
    assert facts.trained == "full" and isinstance(again.model, SentenceClassifier)
    torch.testing.assert_close(logits(again.model, tmp := tiny_batch()), logits(loaded.model, tmp))


def test_a_run_goes_on_from_a_saved_folder_as_base_or_as_start(world: World) -> None:
    folder = save_tiny_encoder(world.root / "encoder")
    head = {"model.type": f"{folder}@transformers", "llm.adapter.args": [{"adapter_method": "head"}]}
    settings = {**head, "federate.method": "fedavg", "federate.total_round_num": 3, "train.optimizer.lr": 0.5}
    result = fs_fwdllm.run(world.config(settings))
    reached = evaluate_run(result.folder)
    idle = {**settings, "federate.total_round_num": 1, "train.optimizer.lr": 0.0}
    as_base, as_start = {"model.type": f"{result.folder}/model@transformers"}, {"fwdllm.init_adapter": result.folder}
    for start in (as_base, as_start):
        started = fs_fwdllm.run(world.config({**idle, **{key: str(value) for key, value in start.items()}}))
        assert evaluate_run(started.folder)["loss"] == pytest.approx(reached["loss"], rel=1e-6)
    with pytest.raises(ConfigError, match=r"fwdllm\.pooling: is none here, but mean in fwdllm\.init_adapter"):
        fs_fwdllm.run(world.config({**settings, "fwdllm.init_adapter": str(result.folder), "fwdllm.pooling": "none"}))
    with pytest.raises(ConfigError, match=r"fwdllm\.feature_scale: is unit here, but layer_norm in"):
        fs_fwdllm.run(
            world.config({**settings, "fwdllm.init_adapter": str(result.folder), "fwdllm.feature_scale": "unit"})
        )


@pytest.mark.parametrize("method", ["mezo", "forward_gradient", "fedavg", "cybgd"])
def test_every_method_trains_saves_and_resumes_it(world: World, method: str) -> None:
    """Each run compares what it saved with what it evaluated."""
    folder = save_tiny_encoder(world.root / "encoder")
    own: dict[str, dict[str, Any]] = {
        "mezo": METHODS["mezo"],
        "forward_gradient": {
            **METHODS["forward_gradient"], "fwdllm.estimator": "forward_mode",
            "llm.adapter.args": [{"adapter_method": "bottleneck"}],
        },
        "fedavg": {**METHODS["fedavg"], "llm.adapter.args": [{"adapter_method": "head"}]},
        "cybgd": METHODS["cybgd"],
    }  # fmt: skip
    settings = {**own[method], "model.type": f"{folder}@transformers", "fwdllm.checkpoint_every": 1}
    config = world.config({**settings, "federate.total_round_num": 3})
    whole = fs_fwdllm.run(config)
    texts = [row["text"] for row in read_jsonl(world.root / "texts.jsonl")][:5]
    assert len(whole.load().predict(texts)) == 5
    with interrupted_at(2, 1):
        fs_fwdllm.run(config)
    resumed = fs_fwdllm.resume(f"{whole.folder}-2")
    digests = [read_jsonl(Path(run.folder) / "metrics.jsonl")[-1]["digest"] for run in (whole, resumed)]
    assert digests[0] == digests[1]


def test_folders_of_earlier_versions_keep_the_head_they_were_trained_with(tmp_path: Path) -> None:
    """They say nothing of pooling, and their base may have a modules.json that nobody read then."""
    folder = save_tiny_encoder(tmp_path / "m")
    loaded = load(folder, "lora", **{"fwdllm.pooling": "none"})
    shake(loaded.model)
    written = save_trained(loaded, tmp_path / "run")
    facts = json.loads((written / "fs_fwdllm.json").read_text())
    del facts["tree"]["fwdllm"]["pooling"], facts["tree"]["fwdllm"]["feature_scale"]
    (written / "fs_fwdllm.json").write_text(json.dumps(facts))
    again = load_saved(written)[0]
    assert torch.equal(logits(again.model, tiny_batch()), logits(loaded.model, tiny_batch()))


def test_another_number_of_classes_gets_a_head_of_its_own(tmp_path: Path) -> None:
    loaded = load(save_tiny_encoder(tmp_path / "m"), "full")
    shake(loaded.model)
    written = save_trained(loaded, tmp_path / "run")
    same, other = load(written), load(written, classes=2)
    assert not {name for name in same.fresh if name.startswith("classifier")}
    assert {name for name in other.fresh if name.startswith("classifier")}
    assert isinstance(other.model, nn.Module) and logits(other.model, tiny_batch(labels=2)).shape[-1] == 2


def test_a_changed_pooling_is_a_changed_model(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "m")
    before = folder_files(folder)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    assert folder_files(folder) != before


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"pooling": "men"}, r"fwdllm\.pooling"),
        ({"pooling": "mean+auto"}, r"fwdllm\.pooling"),
        ({"pooling": ""}, r"fwdllm\.pooling"),
        ({"feature_scale": "batch_norm"}, r"fwdllm\.feature_scale"),
    ],
)
def test_words_that_are_none_are_refused(own: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"fwdllm": own})


def test_keys_for_a_model_that_pools_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fwdllm\.pooling: is 'mean', but only a classifier"):
        load(save_tiny_model(tmp_path / "llama", "llama"), "lora", classifier=False, **{"fwdllm.pooling": "mean"})
    with pytest.raises(ConfigError, match=r"fwdllm\.feature_scale: is 'unit'.*set fwdllm\.pooling"):
        load(save_tiny_model(tmp_path / "bert", "bert"), **{"fwdllm.feature_scale": "unit"})


def without(folder: Path, name: str) -> None:
    (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "modules.json").write_text("{"), r"modules\.json: must be a list of modules"),
        (lambda f: (f / "modules.json").write_text("[]"), r"modules\.json: names no module"),
        (lambda f: (f / "modules.json").write_text('[{"name": "0"}]'), r"modules\.json: must be a list of modules"),
        (
            lambda f: (f / "modules.json").write_text('[{"name": "0", "type": "a", "path": "../x"}]'),
            r"modules\.json: names '\.\./x', which is not in this folder",
        ),
        (lambda f: without(f, "1_Pooling/config.json"), r"names a pooling that has no config\.json"),
        (
            lambda f: (f / "1_Pooling" / "config.json").write_text('{"pooling_mode": "median"}'),
            r"pooling_mode must be of cls, .*but is 'median'",
        ),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: Any, message: str) -> None:
    folder = save_tiny_encoder(tmp_path / "m")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_a_saved_head_that_is_gone_is_told(tmp_path: Path) -> None:
    written = save_trained(load(save_tiny_encoder(tmp_path / "m")), tmp_path / "run")
    without(written, "3_Dense/model.safetensors")
    with pytest.raises(ModelError, match=r"3_Dense/model\.safetensors: cannot be read as a head"):
        load_saved(written)
