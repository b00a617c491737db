"""What a saved folder must know to be used as it was evaluated, beside the tensors.

Weights alone do not say how a text became tokens (which template, cut where), what the classes are called, which
parts were trained over which base, or in which precision the base computed. A saved folder says so in
``fs_fwdllm.json``: the few sections of the run's configuration that decide it, with what the run resolved (dtype,
attention kernel) in place of ``auto``. :func:`~fs_fwdllm.model.reloading.load_saved` needs nothing else; other programs
need not know the file, since names of classes, tokenizer and base are in the files of Hugging Face and PEFT as well.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from fs_fwdllm._version import __version__
from fs_fwdllm.config import Config, parse_config
from fs_fwdllm.data.types import Task
from fs_fwdllm.errors import ModelError, shown
from fs_fwdllm.model.source import ModelSource

__all__ = ["FACTS_FILE", "SavedFacts", "find_saved"]

FACTS_FILE = "fs_fwdllm.json"

#: What of a configuration decides how texts become tokens, and tokens logits.
_SECTIONS: dict[str, Any] = {
    "seed": True,
    "federate": {"method"},
    "trainer": {"type"},
    "data": {"type"},
    "model": True,
    "llm": {"tok_len", "adapter"},
    "fwdllm": {"data", "estimator", "radius", "base"},
}
#: Where a run keeps what it saved, in the order in which it is looked for.
_SAVED = ("adapter", "model")


@dataclass(frozen=True)
class SavedFacts:
    """The contents of ``fs_fwdllm.json``.

    Attributes:
        task: what the labels of the data meant.
        classes: in index order; empty for tasks without.
        trained: the ``adapter_method``, ``full`` without one.
        base_name: the base as ``model.type`` names it.
        base_location: the folder or hub name it was read from.
        base_digest: names the base's files; empty for a name on the hub.
        tree: sections of the configuration, resolved, as :func:`~fs_fwdllm.config.parse_config` takes them.
        results: what the run reached and cost, by the names of ``metrics.jsonl``; empty where nobody said.
        format_version: of this file.
        written_by: the version that wrote it.
    """

    task: Task
    classes: tuple[str, ...]
    trained: str
    base_name: str
    base_location: str
    base_digest: str
    tree: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    format_version: int = 1
    written_by: str = __version__

    @classmethod
    def of_run(
        cls,
        config: Config,
        source: ModelSource,
        *,
        task: Task,
        classes: tuple[str, ...],
        trained: str,
        base_dtype: str,
        attention: str | None,
        features: dict[str, str],
    ) -> SavedFacts:
        """The facts of a model loaded by ``config``.

        ``base_dtype``, ``attention`` and ``features`` (the keys ``pooling`` and ``feature_scale``) are what ``auto``
        came to.
        """
        tree = config.model_dump(mode="json", include=_SECTIONS, exclude_defaults=True)
        own = tree.setdefault("fwdllm", {})
        own |= {"base": {**own.get("base", {}), "compute_dtype": base_dtype}, **features}
        if attention in ("eager", "sdpa"):
            own["attention"] = attention
        return cls(task, classes, trained, source.name, source.location, digest_of_files(source), tree)

    @classmethod
    def read(cls, folder: str | Path) -> SavedFacts:
        """The facts in a saved folder.

        Raises:
            ModelError: the file is missing, damaged, or of a newer version.
        """
        file = Path(folder) / FACTS_FILE
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(
                f"{folder}: has no {FACTS_FILE}, so it was not saved by a run of this version; plain transformers or "
                "peft may load it, or fs_fwdllm.load_bottleneck"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{file}: cannot be read ({error})") from error
        return cls._parse(tree, file)

    @classmethod
    def _parse(cls, tree: Any, file: Path) -> SavedFacts:
        version = tree.get("format_version") if isinstance(tree, dict) else None
        if version != 1:
            raise ModelError(
                f"{file}: format_version is {shown(version)}, but this version of fs-fwdllm reads 1; "
                "install the version that wrote it"
            )
        texts = ("task", "trained", "base_name", "base_location", "base_digest")
        wrong = [name for name in texts if not isinstance(tree.get(name), str)]
        wrong += [name for name in ("tree", "results") if not isinstance(tree.get(name), dict)]
        classes = tree.get("classes")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            wrong.append("classes")
        if tree.get("task") not in get_args(Task):
            wrong.append("task")
        if not _names_a_model(tree.get("tree")):
            wrong.append("tree.model.type")
        if wrong:
            wrong = list(dict.fromkeys(wrong))
            raise ModelError(f"{file}: {', '.join(wrong)}: missing or of another kind; the file is damaged")
        known = {name: tree[name] for name in (*texts, "tree", "results")}
        return cls(**known, classes=tuple(classes or ()), written_by=str(tree.get("written_by", "")))

    def write(self, folder: Path) -> None:
        """Put the file into ``folder``."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=True)
        (folder / FACTS_FILE).write_text(text + "\n", encoding="utf-8", errors="replace")

    def with_results(self, results: dict[str, Any]) -> SavedFacts:
        """The same with what the run reached."""
        return replace(self, results=results)

    @property
    def pools(self) -> bool:
        """Whether the model is a classifier on a sentence encoder's vectors."""
        return bool(self.tree.get("fwdllm", {}).get("pooling", "none") != "none")

    @property
    def compute_dtype(self) -> str:
        """In which the base computed, by PyTorch's name."""
        own = self.tree.get("fwdllm", {})
        return str(own.get("base", {}).get("compute_dtype") or own.get("base_dtype") or "float32")

    def with_base(self, **settings: Any) -> SavedFacts:
        """The same with other keys of ``fwdllm.base``."""
        own = {name: value for name, value in self.tree.get("fwdllm", {}).items() if name != "base_dtype"}
        base = {"compute_dtype": self.compute_dtype, **own.get("base", {}), **settings}
        return replace(self, tree={**self.tree, "fwdllm": {**own, "base": base}})

    def without_packing(self) -> SavedFacts:
        """The same for weights that are read as they are, packed or not."""
        kept = self.with_base()
        own = {**kept.tree["fwdllm"], "base": {"compute_dtype": self.compute_dtype}}
        return replace(self, tree={**kept.tree, "fwdllm": own})

    def with_data(self, **settings: Any) -> SavedFacts:
        """The same with what keys of ``fwdllm.data`` came to: ``template`` instead of ``auto``, for one."""
        own = self.tree.get("fwdllm", {})
        data = {**own.get("data", {}), **settings}
        return replace(self, tree={**self.tree, "fwdllm": {**own, "data": data}})

    def config(self, location: str | Path | None = None) -> Config:
        """The configuration that loads the saved model.

        Args:
            location: what to load in place of the base as it was named: a folder or a hub name.

        Raises:
            ConfigError: the sections are not those of this version.
        """
        tree = json.loads(json.dumps(self.tree))
        own = tree.setdefault("fwdllm", {})
        own.setdefault("pooling", "none")  # as it was before there was a choice
        if location is not None:
            suffix = str(tree["model"]["type"]).rpartition("@")[2]
            tree["model"]["type"] = f"{location}@{suffix}"
        return parse_config(tree)


def _names_a_model(tree: Any) -> bool:
    """Whether sections of a configuration have ``model.type``, the one key that loading cannot do without."""
    model = tree.get("model") if isinstance(tree, dict) else None
    return isinstance(model, dict) and isinstance(model.get("type"), str)


def digest_of_files(source: ModelSource) -> str:
    """Names the files of a base, so that a changed one is noticed; empty for a name on the hub."""
    files = source.files()
    return hashlib.blake2b(files.encode(), digest_size=16).hexdigest() if files else ""


def find_saved(path: str | Path) -> Path:
    """The saved folder a user means by ``path``: itself, or ``adapter`` or ``model`` inside a run folder.

    Raises:
        ModelError: there is none.
    """
    folder = Path(path)
    if (folder / FACTS_FILE).is_file():
        return folder
    inside = [folder / name for name in _SAVED if (folder / name / FACTS_FILE).is_file()]
    if inside:
        return inside[0]
    if not folder.is_dir():
        raise ModelError(f"{folder}: there is no such folder; give a run folder, or the adapter or model inside one")
    if any((folder / name).is_dir() for name in _SAVED):
        SavedFacts.read(next(folder / name for name in _SAVED if (folder / name).is_dir()))
    raise ModelError(
        f"{folder}: holds no trained model (no adapter/ or model/ with {FACTS_FILE}); a run that was stopped has one "
        f"once it is finished: fs-fwdllm resume {folder}"
    )
