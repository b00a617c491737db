"""The documentation says what is true: pages that are generated are fresh, messages exist, commands and blocks run."""

from __future__ import annotations

import ast
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fs_fwdllm
from fs_fwdllm.config.load import find_config

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

#: A fenced block: its language, and what stands in it.
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: A heading of the page of messages; what varies in a message is an ellipsis.
MESSAGE = re.compile(r"^### `(.+)`$", re.MULTILINE)
#: What a shell says, and not the package.
OF_THE_SHELL = {"command not found"}


def templates() -> Iterator[str]:
    """Every text in the package's code, with an ellipsis wherever a value is put in."""
    for path in (ROOT / "fs_fwdllm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(templates())


@pytest.mark.parametrize("message", MESSAGE.findall((DOCS / "troubleshooting.md").read_text(encoding="utf-8")))
def test_every_message_that_is_explained_can_still_occur(message: str, texts: list[str]) -> None:
    pieces = [re.escape(piece.strip()) for piece in message.split("…") if piece.strip()]
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    assert sum(map(len, pieces)) >= 10
    assert message in OF_THE_SHELL or any(pattern.search(text) for text in texts)


def environment(**more: str) -> dict[str, str]:
    """Environment variables with which the checkout's package is found, and prints plainly."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1", **more}


@pytest.mark.slow
def test_generated_pages_are_fresh(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "reference.py", tmp_path], check=True, env=environment(), timeout=120
    )
    for page in ("configuration.md", "commands.md"):
        assert (DOCS / page).read_text(encoding="utf-8") == (tmp_path / page).read_text(encoding="utf-8"), (
            "run: scripts/tool python scripts/reference.py"
        )


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.encode()) <= 6000
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    """Pages that are planned stand there as comments, until they come."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w-]+\.md$", text, re.MULTILINE))
    assert {page.name for page in PAGES} <= named
    commented = set(re.findall(r"# - .*?([\w-]+\.md)$", text, re.MULTILINE))
    assert {name for name in named if (DOCS / name).exists()} & commented == set(), "take the comment signs away"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_command_that_is_shown_exists(page: Path) -> None:
    """Its first word after ``fs-fwdllm`` is a command, in blocks and within lines."""
    commands = set(
        re.findall(r"^## `fs-fwdllm (\S+)`", (DOCS / "commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    shown = re.findall(r"(?:`|^|\n|\| )fs-fwdllm ([a-z]+)", page.read_text(encoding="utf-8"))
    assert set(shown) <= commands


#: A dotted key where one may stand: not within a longer name or a path.
KEY = re.compile(r"(?<![\w./])(?:federate|data|llm|model|train|dataloader|eval|early_stop|grad|wandb|fwdllm)\.[\w.]*\w")
#: Endings of files and of made-up machines.
NOT_OF_KEYS = {".csv", ".example", ".h5", ".json", ".jsonl", ".md", ".py", ".safetensors", ".tsv", ".yaml"}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_key_and_configuration_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = set(re.findall(r'<a id="([^"]+)"', (DOCS / "configuration.md").read_text(encoding="utf-8")))
    known |= {key.rpartition(".")[0] for key in known} | {"fwdllm.ext.NAME", "fwdllm.ext.fzoo"}
    assert {key for key in KEY.findall(text) if Path(key).suffix not in NOT_OF_KEYS} <= known
    for name in re.findall(r"\b(?:fs_fwdllm/)?configs/([\w/]+)\.yaml", text):
        assert find_config(name).exists()


def test_every_public_name_is_documented() -> None:
    shown = set(re.findall(r"^::: fs_fwdllm\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(fs_fwdllm.__all__) - {"__version__"} <= shown


def story(title: str) -> list[tuple[str, str]]:
    """The blocks of a section of the quickstart: language and text."""
    text = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return BLOCK.findall(section)


def play(title: str, folder: Path, **variables: str) -> str:
    """Run the section's blocks of shell and Python in a folder, as a reader would who pastes them; what they print."""
    programs = folder / "bin"
    programs.mkdir()
    command = programs / "fs-fwdllm"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fs_fwdllm "$@"\n', encoding="utf-8")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    desk = folder / "desk"
    desk.mkdir()
    variables = environment(PATH=f"{programs}{os.pathsep}{os.environ['PATH']}", **variables)
    words = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    printed = ""
    for language, text in story(title):
        if language in words:
            done = subprocess.run(
                [*words[language], text], cwd=desk, env=variables, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            printed += done.stdout
    return printed


@pytest.mark.slow
def test_a_reader_gets_from_a_csv_to_a_prediction(tmp_path: Path) -> None:
    printed = play("Own CSV to prediction", tmp_path)
    assert printed.splitlines()[-1] == "billing", "what sentence-transformers answers"
    assert (tmp_path / "desk" / "predicted.csv").exists()


@pytest.mark.slow
def test_a_reader_gets_from_instructions_to_a_chat(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    printed = play("Own instructions to chat", tmp_path, MODEL=str(shared_data("models/stories260K")))
    losses = [float(loss) for loss in re.findall(r"eval loss ([\d.]+)", printed)]
    assert losses[-1] < losses[0] - 0.05
    assert (tmp_path / "desk" / "merged" / "config.json").exists()
