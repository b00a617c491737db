"""YAML as people write it: ``1e-5`` is a number, and a key that stands twice is a mistake.

PyYAML follows YAML 1.1, where a float needs a point (``1.e-5``) and the last of two equal keys wins silently; a
learning rate would become a string and a whole section could vanish. The loader and the dumper here share one rule for
numbers, that of YAML 1.2, so that what is written is read back as the same value.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["dump_yaml", "parse_yaml"]

_EXPONENT_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Node] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    f"while reading a mapping, the key {key!r} stands twice; it stands first",
                    seen[key].start_mark,
                    "and again",
                    key_node.start_mark,
                )
            if isinstance(key, str):
                seen[key] = key_node
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    pass


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value ``text`` stands for. Raises ``yaml.YAMLError``, also for a key that stands twice in one mapping."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain values only


def dump_yaml(tree: Any) -> str:
    """``tree`` (dictionaries, lists, plain values) as YAML text that :func:`parse_yaml` reads back to an equal tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
