"""The model card: ``README.md`` of a saved folder, so that whoever finds it knows what it is and how to use it.

The head is the metadata Hugging Face's hub reads; the body says how to load the folder, what it was trained on and by
what method, what it reached, and what that cost. Everything in it is a fact of the run; nothing is praise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from fs_fwdllm.model.facts import SavedFacts
from fs_fwdllm.model.sentence_classifier import SentenceClassifier

__all__ = ["model_card", "results_of"]

_PIPELINES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "question_answering": "question-answering",
    "causal_lm": "text-generation",
    "label_words": "text-generation",
}
_AUTO_CLASSES = {
    "classification": "ModelForSequenceClassification",
    "regression": "ModelForSequenceClassification",
    "question_answering": "ModelForQuestionAnswering",
    "causal_lm": "ModelForCausalLM",
    "label_words": "ModelForCausalLM",
}
#: ``{name in results: (name on the card, how to write it)}``
_COSTS = {
    "rounds": ("rounds", "{:,}"),
    "forward_passes": ("forward passes, all clients", "{:,}"),
    "backward_passes": ("backward passes, all clients", "{:,}"),
    "upload_bytes": ("bytes uploaded", "{:,}"),
    "download_bytes": ("bytes downloaded", "{:,}"),
    "seconds": ("seconds of the simulating process", "{:,.0f}"),
}


def model_card(facts: SavedFacts, saved_as: str, rounded_by_others: bool) -> str:
    """The text of the card.

    Args:
        facts: of the saved folder, with what the run reached.
        saved_as: ``peft``, ``model``, or the kind of an adapter of this package.
        rounded_by_others: whether a program that loads the folder in the base's half precision rounds trained values.
    """
    data = ModelCardData(
        base_model=None if facts.base_digest else facts.base_name,  # the hub knows names of its own only
        library_name=_library(facts, saved_as),
        pipeline_tag=_PIPELINES[facts.task],
        tags=["federated-learning", "fs-fwdllm", facts.trained],
    )
    results = facts.results
    evaluation = {name: value for name, value in results.get("eval", {}).items() if _is_number(value)}
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {_code(facts.base_name)}, {facts.trained}, trained federatedly\n",
        f"Trained with fs-fwdllm {facts.written_by}{_by(results)}.\n",
        _use(facts, saved_as, rounded_by_others),
        _table("What it was trained on", _training(facts)),
        _table("What it reached", [(name, f"{value:.4g}") for name, value in evaluation.items()]),
        _table("What that cost", _costs(results)),
    ]
    return "\n".join(part for part in parts if part)


def _library(facts: SavedFacts, saved_as: str) -> str:
    whole = "sentence-transformers" if facts.pools else "transformers"
    return {"peft": "peft", "model": whole}.get(saved_as, "fs-fwdllm")


def _by(results: Mapping[str, Any]) -> str:
    return f": {results['method']}" if "method" in results else ""


def _costs(results: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    return ((label, form.format(results[name])) for name, (label, form) in _COSTS.items() if name in results)


def _use(facts: SavedFacts, saved_as: str, rounded_by_others: bool) -> str:
    ask = '.generate(["..."])' if facts.task == "causal_lm" else '.predict(["..."])'
    if facts.task == "question_answering":
        ask = '.predict(["the question"], ["the text that holds the answer"])'
    lines = ["## Use it\n", "```python", "import fs_fwdllm", "", f'print(fs_fwdllm.load("THIS_FOLDER"){ask})', "```\n"]
    dtype = ", dtype=torch.float32" if rounded_by_others else ""
    if facts.pools:
        lines += _use_of_sentence_classifier(saved_as, dtype)
    elif saved_as == "peft" and Path(facts.base_location).is_file():
        lines += _use_over_gguf(Path(facts.base_location).name)
    elif saved_as in ("peft", "model") and facts.task != "question_answering":
        library, prefix = ("peft", "AutoPeft") if saved_as == "peft" else ("transformers", "Auto")
        auto = f"{prefix}{_AUTO_CLASSES[facts.task]}"
        lines += ["Without fs-fwdllm:\n", "```python", *(["import torch"] if dtype else [])]
        lines += [f"from {library} import {auto}", "", f'model = {auto}.from_pretrained("THIS_FOLDER"{dtype})', "```\n"]
    if rounded_by_others:
        lines.append(
            f"The base computed in {facts.compute_dtype}, but what was trained is float32. Loading "
            "everything in half precision rounds the trained values and loses part of what was learned: load in "
            "float32, or by fs_fwdllm.load.\n"
        )
    return "\n".join(lines)


def _use_over_gguf(file: str) -> list[str]:
    """PEFT's automatic loading knows folders only."""
    return [
        "Without fs-fwdllm, with all of the base as floats:\n",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("FOLDER_OF_THE_BASE", gguf_file={file!r})',
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        "```\n",
    ]


def _use_of_sentence_classifier(saved_as: str, dtype: str) -> list[str]:
    module, name = SentenceClassifier.__module__, SentenceClassifier.__name__
    if saved_as == "model":
        return [
            "Without fs-fwdllm, the logits; transformers alone has no class for this model:\n",
            "```python",
            "from sentence_transformers import SentenceTransformer",
            "",
            'logits = SentenceTransformer("THIS_FOLDER").encode(["..."])',
            "```\n",
        ]
    if saved_as != "peft":
        return []
    return [
        f"By PEFT, with fs-fwdllm installed, since transformers alone has no class for the base ({name}):\n",
        "```python",
        *(["import torch"] if dtype else []),
        "from peft import AutoPeftModel",
        "",
        f'model = AutoPeftModel.from_pretrained("THIS_FOLDER", import_allowlist=["{module}"]{dtype})',
        "```\n",
    ]


def _training(facts: SavedFacts) -> list[tuple[str, str]]:
    tree, results = facts.tree, facts.results
    rows = [
        ("data", _code(results.get("data", tree.get("data", {}).get("type", "")))),
        ("base model", _code(facts.base_name)),
        ("digest of the base's files", facts.base_digest),
        ("trained", facts.trained),
        ("longest sequence, tokens", str(facts.config().llm.tok_len)),
    ]
    rows += [("classes", ", ".join(map(_code, facts.classes)))] if facts.classes else []
    rows += [("prompt", _code(facts.config().fwdllm.data.prompt))] if facts.task == "label_words" else []
    return [(name, value) for name, value in rows if value]


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    rows = list(rows)
    body = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *body, ""]) if rows else ""


def _code(text: str) -> str:
    """Text of a stranger's inside a table or a heading: on one line, with nothing that ends it."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "\\|") + "`"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def results_of(line: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a card says of a run, from its last line and the evaluation of what is saved."""
    found = {name: line[name] for name in _COSTS if name in line}
    if "round" in line:
        found["rounds"] = line["round"]
    return found | ({"eval": dict(evaluation)} if evaluation else {})
