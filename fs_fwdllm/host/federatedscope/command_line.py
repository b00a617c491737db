"""What a user wrote, before the host has read it.

The host turns 2.7 into 2 where it expects an integer, without a word, and says of a misspelt key only that it does not
exist. So for our runs the file and the overrides are read once more, as our own reader would: what both of us do not
know is an error that names the nearest key, and what means something to us is validated as it was written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fs_fwdllm.config import Config, parse_config
from fs_fwdllm.config.load import apply_overrides, find_config, read_tree
from fs_fwdllm.config.methods import is_ours
from fs_fwdllm.config.schema import Section
from fs_fwdllm.config.section import is_host_only
from fs_fwdllm.errors import ConfigError, nearest
from fs_fwdllm.host.federatedscope.settings import section_of
from fs_fwdllm.report.files import require_writable
from fs_fwdllm.running.sampling import clients_per_round

__all__ = ["check_command_line", "with_found_file"]

_OPTION = "--cfg"


def check_command_line(arguments: Sequence[str], host: Any) -> dict[str, Any]:
    """Check ``--cfg FILE key value ...`` if it asks for a run of ours; say nothing of other runs.

    Returns:
        What a run of ours was told, as sections; empty where that cannot be seen.

    Args:
        host: the host's configuration with its defaults, to tell its keys from misspelt ones.

    Raises:
        ConfigError: a key that nobody knows, a value that is not what it should be, or a folder nobody can write to.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument(_OPTION)
    try:
        known, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError:
        return {}
    overrides = _without_options(rest)
    if not known.cfg or len(overrides) % 2:
        return {}  # the host says what is wrong
    tree = read_tree(Path(known.cfg))
    apply_overrides(tree, overrides)
    if not _is_ours(tree):
        return {}
    config = parse_config(_ours(tree, Config, host))
    require_writable(config.outdir)
    if config.federate.client_num:  # the host makes "all" of too many
        clients_per_round(config, config.federate.client_num)
    return tree


def with_found_file(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with the path after ``--cfg`` where the name of a packaged configuration may stand.

    Raises:
        ConfigError: there is no such file and no such name.
    """
    words = list(arguments)
    for index, word in enumerate(words):
        if word == _OPTION and index + 1 < len(words):
            words[index + 1] = str(find_config(words[index + 1]))
        elif word.startswith(f"{_OPTION}="):
            words[index] = f"{_OPTION}={find_config(word.removeprefix(f'{_OPTION}='))}"
    return words


def _without_options(words: list[str]) -> list[str]:
    """The key-value pairs; an option of the host's takes the word after it."""
    kept = list(words)
    while kept and kept[0].startswith("--"):
        del kept[:2]
    return kept


def _is_ours(tree: dict[str, Any]) -> bool:
    def value(section: str, key: str) -> str:
        node = tree.get(section)
        return str(node.get(key, "")).lower() if isinstance(node, dict) else ""

    return is_ours(value("federate", "method"), value("trainer", "type"))


def _ours(tree: dict[str, Any], section: type[Section], host: Any, prefix: str = "") -> dict[str, Any]:
    """``tree`` without the keys that only the host gives a meaning to."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in host and not host.is_new_allowed():
            raise ConfigError(f"{prefix}{name}: unknown key (value {value!r}){_nearest_key(prefix, name, host)}")
        field = section.model_fields.get(name)
        if field is None or is_host_only(field):
            continue
        child = section_of(field)
        nested = child is not None and isinstance(value, dict) and hasattr(host[name], "is_new_allowed")
        kept[name] = _ours(value, child, host[name], f"{prefix}{name}.") if nested and child else value
    return kept


def _nearest_key(prefix: str, name: str, host: Any) -> str:
    return nearest(f"{prefix}{name}", [f"{prefix}{known}" for known in host if not known.startswith("__")])
