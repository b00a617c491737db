"""Reading a configuration: YAML file, then ``key value`` overrides, then validation with useful messages.

The file is one of the user's or one that comes with the package and is known by its name: :func:`find_config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fs_fwdllm.config.schema import Config
from fs_fwdllm.config.section import is_host_only
from fs_fwdllm.config.yaml_text import dump_yaml, parse_yaml
from fs_fwdllm.errors import ConfigError, nearest, shown

__all__ = [
    "CONFIGS", "apply_overrides", "dump_config", "find_config", "load_config", "parse_config", "read_tree", "tree_of"
]  # fmt: skip

#: The configurations that come with the package. The name of one is its path in here, without the ending: ``demo``,
#: ``fwdllm/agnews_fwd``. Those below ``fedml/`` are in FedML's form and belong to its option ``--cf``.
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def find_config(given: str | Path, option: str = "--cfg", folder: Path = Path()) -> Path:
    """The file a user means: a path that exists, else a packaged configuration's name.

    The name may end in ``.yaml`` and may start with ``configs/``, as the same file is called in a checkout.

    Args:
        option: what the user gave it to, for the message.
        folder: where a relative path starts.

    Raises:
        ConfigError: it is neither; the message has the nearest file or name.
    """
    path = folder / given
    if path.exists() and not path.is_dir():
        return path
    name = Path(given).as_posix().removeprefix("configs/").removesuffix(".yaml")
    names = {file.relative_to(CONFIGS).with_suffix("").as_posix(): file for file in sorted(CONFIGS.rglob("*.yaml"))}
    if name in names:
        return names[name]
    reason = "is a folder" if path.is_dir() else "No such file"
    beside = sorted(str(near) for near in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    suited = [known for known in names if known.startswith("fedml/") == (option == "--cf")]
    hint = nearest(path, beside) or nearest(name, suited)
    raise ConfigError(
        f"{option} {given}: cannot be read ({reason}), and is no name of a packaged configuration{hint} "
        f"(the packaged ones are in {CONFIGS})"
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply ``overrides``.

    Args:
        path: a YAML file, or the name of a packaged configuration: ``demo``, ``fwdllm/agnews_fwd``.
        overrides: ``key value key value``, as FederatedScope's command line has them.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong type or is out of range.
    """
    file = find_config(path)
    tree = read_tree(file)
    apply_overrides(tree, overrides)
    config = parse_config(tree)
    if not config.expname:
        config.expname = file.stem
    return config


def read_tree(path: Path, option: str = "--cfg") -> dict[str, Any]:
    """The mapping in a YAML file, not validated; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing or not YAML, or holds something else than a mapping. ``option`` names, in the
            message, what the user gave the file to.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} {path}: is not UTF-8 text (byte {error.start}: {error.reason})") from error
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} {path}: is not YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{option} {path}: must be a mapping of sections, but is a {type(tree).__name__}")
    return tree


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate an already-read mapping. Raises :class:`~fs_fwdllm.errors.ConfigError` on the first mistakes found."""
    try:
        return Config.model_validate(_fill_empty_sections(tree, Config))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML text; :func:`load_config` reads it back to an equal object.

    Host-only keys that nobody set are left out, so that :meth:`Config.ignored_keys` stays true after the round trip.
    """
    return dump_yaml(_without_unset_host_keys(config, config.model_dump(mode="json")))


def tree_of(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested sections."""
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put ``key value key value`` texts into ``tree``, in place. Raises ``ConfigError`` for what is no such list."""
    if torn := _torn_value(overrides):
        raise ConfigError(f"the value {torn} has spaces and must be quoted: '{torn}'")
    if len(overrides) % 2:
        raise ConfigError(
            f"overrides come in pairs 'key value', but {overrides[-1]!r} stands alone; a value with spaces is quoted, "
            "as in eval.metrics '[exact_match, f1]'"
        )
    for key, text in zip(overrides[::2], overrides[1::2], strict=True):
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            child = node[section]
            if not isinstance(child, dict):
                raise ConfigError(f"{key} {shown(text)}: {section!r} is a value, not a section")
            node = child
        node[leaf] = _override_value(key, text)


def _torn_value(words: Sequence[str]) -> str:
    """A list or mapping that the shell has cut at its spaces, put together again; empty if there is none."""
    for first, word in enumerate(words):
        closing = {"[": "]", "{": "}"}.get(word[:1])
        if closing and closing not in word:
            last = next((place for place in range(first + 1, len(words)) if words[place].endswith(closing)), None)
            if last is not None:
                return " ".join(words[first : last + 1])
    return ""


def _override_value(key: str, text: str) -> Any:
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: the value {shown(text)} is not YAML: {error}") from error
    if value is None:
        return None if text in ("null", "~") else text  # an empty string is a value, not "nothing"
    field = _field(key.split("."))
    return text if field is not None and field.annotation is str and not isinstance(value, str) else value


def _fill_empty_sections(tree: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """A copy of ``tree`` where a section that is named but empty (``federate:`` and nothing below) has its defaults."""
    filled = dict(tree)
    for name, field in model.model_fields.items():
        section = _section_type(field.annotation)
        if section is not None and name in filled:
            value = {} if filled[name] is None else filled[name]
            filled[name] = _fill_empty_sections(value, section) if isinstance(value, dict) else value
    return filled


def _without_unset_host_keys(section: BaseModel, tree: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        child = getattr(section, name)
        if isinstance(child, BaseModel):
            kept[name] = _without_unset_host_keys(child, value)
        elif name in section.model_fields_set or not is_host_only(type(section).model_fields[name]):
            kept[name] = value
    return {name: value for name, value in kept.items() if value != {} or name in section.model_fields_set}


def _explain(item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    dotted = ".".join(path)
    if item["type"] == "extra_forbidden":
        known = _known_keys()
        siblings = [key for key in known if key.rpartition(".")[0] == ".".join(path[:-1])]
        hint = nearest(dotted, siblings) or nearest(path[-1], [key.rpartition(".")[2] for key in siblings])
        hint = hint or nearest(dotted, known)
        return f"{dotted}: unknown key (value {shown(item['input'])}){hint}"
    choices = item.get("ctx", {}).get("expected", "")
    hint = nearest(item["input"], [choice.strip(" '") for choice in choices.replace(" or ", ",").split(",")])
    message = item["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message}, but the value is {shown(item['input'])}{hint}{_describe(path)}"


def _section_type(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _field(path: list[str]) -> FieldInfo | None:
    """The field a dotted key names, or the list field an element belongs to; ``None`` where the schema has none."""
    model: type[BaseModel] | None = Config
    field: FieldInfo | None = None
    for name in path:
        if model is None:
            return field
        if name not in model.model_fields:
            return None
        field = model.model_fields[name]
        model = _section_type(field.annotation)
    return field


def _describe(path: list[str]) -> str:
    field = _field(path)
    if field is None or not field.description or get_origin(field.annotation) is Literal:
        return ""
    return f" ({field.description})"


def _known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        section = _section_type(field.annotation)
        if section is not None:
            keys += _known_keys(section, f"{prefix}{name}.")
    return keys
