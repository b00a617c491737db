"""Where a model comes from: ``model.type`` taken apart and resolved.

``PATH_OR_NAME@huggingface_llm`` is a causal language model; ``PATH_OR_NAME@transformers`` a sequence classifier or,
with ``model.task: QuestionAnswering``, an encoder that points at the first and the last token of an answer.
``PATH_OR_NAME`` is a folder, a GGUF file, ``package:MODULE/SUBFOLDER`` for a folder inside an installed Python package
(which is found, not imported), or the name of a model on the hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fs_fwdllm.config import Config
from fs_fwdllm.data.types import Task
from fs_fwdllm.errors import ConfigError, FwdLLMError, ModelError, nearest
from fs_fwdllm.model.folder import check_folder
from fs_fwdllm.model.gguf_file import gguf_files
from fs_fwdllm.model.gguf_settings import check_gguf, files_beside
from fs_fwdllm.model.hub import hub_options
from fs_fwdllm.model.sentence_layout import layout_files, transformer_folder

__all__ = ["ModelSource", "folder_files", "model_source", "model_task", "reading"]

_END_BYTES = 64 << 10

#: ``{suffix: {model.task: what the model is loaded for}}``
_TASKS: dict[str, dict[str, Task]] = {
    "huggingface_llm": {"": "causal_lm", "CausalLM": "causal_lm"},
    "transformers": {"SequenceClassification": "classification", "QuestionAnswering": "question_answering"},
}


@dataclass(frozen=True)
class ModelSource:
    """A resolved ``model.type``.

    Attributes:
        name: what the configuration says before the ``@``.
        location: a folder, a GGUF file, or the hub name; what ``adapter_config.json`` records.
        task: what the model is loaded for.
    """

    name: str
    location: str
    task: Task

    @property
    def is_local(self) -> bool:
        """Whether the model is a folder or a file of this machine, not a name on the hub."""
        return Path(self.location).is_dir() or self.gguf is not None

    @property
    def gguf(self) -> Path | None:
        """The file, where the model is a GGUF file."""
        return Path(self.location) if Path(self.location).is_file() else None

    @property
    def transformer(self) -> str:
        """What ``from_pretrained`` receives: :attr:`location`, or the folder inside that has the transformer."""
        is_folder = self.is_local and self.gguf is None
        return str(transformer_folder(Path(self.location))) if is_folder else self.location

    def files(self) -> str:
        """What tells this model's files from changed ones, as :func:`folder_files`; empty for a name on the hub."""
        if self.gguf is not None:
            return _listed([self.gguf, *files_beside(self.gguf)], self.gguf.parent)
        return folder_files(Path(self.location)) if self.is_local else ""


def folder_files(folder: Path) -> str:
    """What tells a folder's files from changed ones, cheaply: names, sizes, and both ends of each.

    The files of a sentence encoder's modules are among them, since they decide what a text's vector is.
    """
    return _listed(sorted(path for path in folder.iterdir() if path.is_file()) + layout_files(folder), folder)


def _listed(paths: list[Path], folder: Path) -> str:
    return "\n".join(f"{path.relative_to(folder)} {path.stat().st_size} {_ends_of(path)}" for path in paths)


@contextmanager
def reading(source: ModelSource, what: str) -> Iterator[dict[str, Any]]:
    """Options for ``from_pretrained``, whose errors inside become ours; ``what`` is to be read.

    Raises:
        ModelError: the source gives no such thing.
    """
    # Said, since transformers otherwise asks on standard input whether to run code from the model's folder.
    options: dict[str, Any] = {"trust_remote_code": False}
    if not source.is_local:
        options |= hub_options(source.name)
    try:
        yield options
    except FwdLLMError:
        raise
    except Exception as error:  # transformers meets files of any kind, and fails in as many ways
        place, advice = "hub name", "; without the hub, give model.type a local folder"
        if source.gguf is not None:
            place, advice = (
                "file",
                "; the model's own config.json and tokenizer, beside the file, say more than it does",
            )
        elif source.is_local:
            place, advice = "folder", ""
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise ModelError(f"{source.name}: the {place} gives no {what}: {reason}{advice}") from error


def _ends_of(path: Path) -> str:
    """A digest of the first and the last 64 KiB of a file."""
    with path.open("rb") as file:
        first = file.read(_END_BYTES)
        file.seek(max(0, path.stat().st_size - _END_BYTES))
        return hashlib.blake2b(first + file.read(), digest_size=16).hexdigest()


def model_source(config: Config) -> ModelSource:
    """Resolve ``model.type`` and ``model.task``.

    Raises:
        ConfigError: the suffix or the task is missing or unknown.
        ModelError: the folder, file or package does not exist, or holds no model that can be trained here.
    """
    task = model_task(config)
    name = config.model.type.rpartition("@")[0]
    source = ModelSource(name, _only_gguf(Path(_resolve(name))) or _resolve(name), task)
    if source.gguf is not None:
        if task != "causal_lm":
            raise ConfigError(
                f"model.type: {name!r} is a GGUF file, which is read as a language model: {name}@huggingface_llm; give "
                "the folder of the float model for another task"
            )
        check_gguf(source.gguf)
    elif source.is_local:
        check_folder(Path(source.transformer))
    return source


def _only_gguf(folder: Path) -> str:
    """The GGUF file of a folder that has no other weights; empty where it has some, or none at all.

    Raises:
        ModelError: there are several.
    """
    files = gguf_files(folder) if folder.is_dir() and not any(folder.glob("*.safetensors")) else []
    if len(files) > 1:
        listed = ", ".join(file.name for file in files[:5])
        raise ModelError(f"model.type: {str(folder)!r} holds {len(files)} GGUF files ({listed}); name one of them")
    return str(files[0]) if files else ""


def model_task(config: Config) -> Task:
    """What the model is loaded for. Raises :class:`ConfigError` where the suffix or the task is missing or unknown."""
    name, at, suffix = config.model.type.rpartition("@")
    allowed = " or ".join(f"PATH_OR_NAME@{known}" for known in _TASKS)
    if not at or not name:
        raise ConfigError(f"model.type: must be {allowed}, but the value is {config.model.type!r}")
    if suffix not in _TASKS:
        hint = nearest(suffix, _TASKS)
        raise ConfigError(f"model.type: must be {allowed}, but the value is {config.model.type!r}{hint}")
    tasks, wanted = _TASKS[suffix], config.model.task
    if wanted not in tasks:
        choices = " or ".join(repr(task) for task in tasks)
        raise ConfigError(
            f"model.task: must be {choices} for @{suffix}, but the value is {wanted!r}{nearest(wanted, tasks)}"
        )
    return tasks[wanted]


def _resolve(name: str) -> str:
    if name.startswith("package:"):
        return str(_package_folder(name))
    folder = Path(name).expanduser()
    if folder.is_dir() or folder.is_file():
        return str(folder.absolute())  # an adapter names its base, and is loaded from other folders than this one
    if folder.suffix == ".gguf":
        files = sorted(map(str, gguf_files(folder.parent)))
        raise ModelError(f"model.type: the file {name!r} does not exist{nearest(folder, files)}")
    looks_like_a_path = folder.is_absolute() or name[0] in "./~\\" or name.count("/") > 1 or "\\" in name
    if looks_like_a_path:
        siblings = sorted(str(near) for near in folder.parent.glob("*/")) if folder.parent.is_dir() else []
        raise ModelError(f"model.type: the folder {name!r} does not exist{nearest(folder, siblings)}")
    return name


def _package_folder(name: str) -> Path:
    module, _, subfolder = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module.split(".")[0]) if module.split(".")[0] else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model.type: {name!r} needs the Python package {module!r}, which is not installed; "
            "the demonstration model comes with: pip install fs-fwdllm[demo]"
        )
    for location in spec.submodule_search_locations:
        package = Path(location).joinpath(*module.split(".")[1:])
        if (package / subfolder).is_dir():
            return package / subfolder
    folders = sorted(child.name for child in package.glob("*/")) if package.is_dir() else []
    raise ModelError(
        f"model.type: {name!r}: the package has no folder {subfolder!r}, only {folders}{nearest(subfolder, folders)}"
    )
