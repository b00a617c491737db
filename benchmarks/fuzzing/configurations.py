"""Configurations that nobody would write."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from fs_fwdllm.config.load import CONFIGS, dump_config, load_config
from fs_fwdllm.errors import FwdLLMError

from .damage import damaged

__all__ = ["configuration", "try_configuration"]

#: Words, and pieces of YAML, that may stand where a value is.
_WORDS = (
    "", "~", "null", "true", "yes", "off", "0", "-1", "1", "2.5", "1e-5", "1e999", "-1e999", ".nan", ".inf", "-.inf",
    "1e5",
    "0x1f", "0o17", "0b1", "1_000", "1:30", "1:30:99", "190:20:30.15", "9" * 400, "9" * 5000, "1" + "0" * 20, "-0.0",
    "2026-11-26", "2026-13-45", "2026-11-26T99:00:00Z", "=", "<<", "*x", "&x", "&x y", "!!int x", "!!float x",
    "!!bool x",
    "!!int ''", "!!int '9'", "!!null x", "!!binary x", "!!binary 'AA='", "!!timestamp x", "!!set {a, b}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]", "!!str 5", "!!seq x", "!!map [1]", "!!python/object/apply:os.getcwd []", "!x y", "[", "]", "{",
    "}",
    "[]", "{}", "[1, 2]", "{a: 1}", "{[1]: 2}", "{{a: 1}: 2}", "? a", "- a", "- - - a", "a: b: c", "'", '"', "'a",
    '"\\x00"',
    '"\\ud800"', '"\\uDFFF"', '"\\0"', '"\\a"', '"\\N"', "|", ">", "|9", "%YAML 9.9", "---", "...", "#", "@", "`",
    "a\tb",
    "[" * 50 + "]" * 50, "[" * 400 + "]" * 400, "{a: " * 300 + "}" * 300, "/", "..", "a/../b", "~/x",
    "x" * 5000,
    "ä", "\u2028", "\ufeff", "\U0001f600", "fedfwd", "fedmezo", "iid", "[[0.5, 0.5]]", "{adapter_method: lora}",
)  # fmt: skip
#: Bombs: few lines that stand for many values, or for themselves.
_BOMBS = (
    "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
    ),
    "a: &a [*a]\n", "a: &a {b: *a}\n", "a: &a {<<: *a}\n", "&a ? *a : *a\n", "a: &a [1]\n<<: *a\n",
    "a: &a {b: 1}\nc: {<<: [*a, *a, *a]}\n", "federate: &f {client_num: 3}\ntrain: *f\n",
    "x: " + "[" * 2000 + "]" * 2000,
    "".join(f"{' ' * n}a{n}:\n" for n in range(500)),
)  # fmt: skip


@cache
def _texts() -> tuple[tuple[list[str], ...], ...]:
    """The shipped configurations of the embedded host without their comments, as lines, section by section."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(CONFIGS.rglob("*.yaml")) if "fedml" not in path.parts]
    found = []
    for text in texts:
        sections: list[list[str]] = []
        for line in text.splitlines():
            if line.strip() and line.strip()[0] != "#":
                sections += [] if line[0] == " " else [[]]
                sections[-1].append(line)
        found.append(tuple(sections))
    return tuple(found)


@cache
def _keys() -> tuple[str, ...]:
    keys = [
        "",
        ".",
        "..",
        "a",
        "seed",
        "seed.x",
        "fwdllm",
        "fwdllm.",
        ".fwdllm",
        "\0",
        "\ud800",
        "x" * 3000,
        "data.args",
    ]
    for section in ("federate", "data", "llm", "model", "train", "dataloader", "eval", "fwdllm", "fwdllm.base"):
        keys += [
            f"{section}.{leaf}"
            for leaf in (
                "method",
                "type",
                "client_num",
                "splits",
                "adapter.args",
                "optimizer.lr",
                "batch_size",
                "radius",
                "parts",
                "fleet",
                "probes",
                "labels",
                "dtype",
            )
        ]
    return tuple(keys)  # fmt: skip


def configuration(seed: int) -> tuple[bytes, list[str]]:
    """What may stand in a configuration file, and the words that may stand behind it on a command line."""
    draw = random.Random(seed)
    sections = draw.choice(_texts())
    kept = sorted(draw.sample(range(len(sections)), min(len(sections), draw.randint(1, 5))))
    lines = [line for index in kept for line in sections[index]]
    for _ in range(draw.choice((1, 1, 2, 3))):
        draw.choice(_CHANGES if draw.random() < 0.99 else (_bomb,))(draw, lines)
    data = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    if draw.random() < 0.1:
        data = damaged(data, draw)
    overrides: list[str] = []
    while draw.random() < 0.3:
        overrides += [draw.choice(_keys()), draw.choice((*_WORDS, "\0", "\ud800", "a\ud800b", '["\udcff"]'))]
    return data, overrides if draw.random() < 0.95 else overrides[:-1]


def _place(draw: random.Random, lines: Sequence[str]) -> int:
    return draw.randrange(len(lines)) if lines else 0


def _other_value(draw: random.Random, lines: list[str]) -> None:
    place = _place(draw, lines)
    key, colon, _ = lines[place].partition(":")
    lines[place] = f"{key}{colon} {draw.choice(_WORDS)}"


def _other_line(draw: random.Random, lines: list[str]) -> None:
    place = _place(draw, lines)
    change = draw.randrange(5)
    if change == 0:
        lines.insert(place, draw.choice(_WORDS))
    elif change == 1:
        lines.insert(place, lines[_place(draw, lines)])
    elif change == 2 and len(lines) > 1:
        del lines[place]
    elif change == 3:
        lines[place] = draw.choice((" ", "   ", "\t", "- ", "? ")) + lines[place]
    else:
        lines[place] = lines[place].lstrip()


def _other_characters(draw: random.Random, lines: list[str]) -> None:
    place = _place(draw, lines)
    at = draw.randrange(len(lines[place]) + 1)
    added = draw.choice(
        ("\0", "\t", ":", ": ", " #", "'", '"', "[", "}", "&", "*", "!", "%", "\x85", "\u2028", "\ufeff", "x")
    )
    lines[place] = lines[place][:at] + added + lines[place][at + draw.randrange(2) :]


def _bomb(draw: random.Random, lines: list[str]) -> None:
    lines.insert(draw.choice((0, len(lines))), draw.choice(_BOMBS))


_CHANGES = (_other_value, _other_value, _other_value, _other_line, _other_characters)


def try_configuration(folder: Path, given: tuple[bytes, list[str]]) -> str:
    """Read a configuration, and what it resolves to as it is written into a run's folder."""
    path = folder / "mutated.yaml"
    path.write_bytes(given[0])
    try:
        config = load_config(path, given[1])
    except FwdLLMError as error:
        return type(error).__name__
    path.write_text(dump_config(config), encoding="utf-8")
    load_config(path)
    return "accepted"
