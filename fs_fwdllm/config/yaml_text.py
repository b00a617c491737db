"""YAML as people write it: ``1e-5`` is a number, and a key that stands twice is a mistake.

PyYAML follows YAML 1.1, where a float needs a point (``1.e-5``) and the last of two equal keys wins silently; a
learning rate would become a string and a whole section could vanish. The loader and the dumper here share one rule for
numbers, that of YAML 1.2, so that what is written is read back as the same value. YAML 1.2 knows no dates either:
``expname: 2026-11-26`` is a text.

A file may come from anybody, so whatever is wrong with it is one kind of error, and what it expands to is bounded
before it is built: a few lines of aliases can stand for more values than a machine holds.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["dump_yaml", "parse_yaml"]

#: The largest configuration that ships has some two hundred.
_MOST_VALUES = 100_000
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


# Of our own class alone: the tables are PyYAML's own until they are copied.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value ``text`` stands for: plain values only.

    Raises:
        yaml.YAMLError: it is not YAML, a key stands twice in one mapping, a value is not what its tag says, a text
        holds
            a character that no file name may, or aliases stand for too many values.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError:
        raise
    except RecursionError as error:
        raise yaml.YAMLError("values are nested too deeply") from error
    except Exception as error:  # PyYAML's constructors raise whatever int, float and datetime do
        raise yaml.YAMLError(f"a value is not what its tag says ({type(error).__name__}: {error})") from error


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, aliases counted as often as they are used."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.YAMLError(f"an alias stands for something that contains it{node.start_mark}")
        return known[id(node)]
    known[id(node)] = 0
    if isinstance(node, yaml.ScalarNode):
        children: list[yaml.Node] = []
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in node.value):
            raise yaml.YAMLError(f"a text holds a character that is none: {node.value!r:.40}{node.start_mark}")
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    else:
        children = node.value
    count = 1 + sum(_expanded(child, known) for child in children)
    if count > _MOST_VALUES:
        raise yaml.YAMLError(f"aliases stand for more than {_MOST_VALUES:,} values{node.start_mark}")
    known[id(node)] = count
    return count


def dump_yaml(tree: Any) -> str:
    """``tree`` (dictionaries, lists, plain values) as YAML text that :func:`parse_yaml` reads back to an equal tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
