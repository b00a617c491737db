"""Names on the hub: the cache first, then one request, then both ways out, all within seconds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fs_fwdllm.config import parse_config
from fs_fwdllm.errors import DataError, ModelError
from fs_fwdllm.model import load_tokenizer
from fs_fwdllm.model.hub import hub_options
from fs_fwdllm.running.session import Session
from tests.model.tiny import save_tiny_model, tiny_config


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A machine with an empty cache whose network is down; the list has every name that was looked up."""
    asked: list[str] = []

    def look_up(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.getaddrinfo", look_up)
    return asked


def test_an_unreachable_hub_is_asked_once(hub: list[str]) -> None:
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(ModelError) as error:
            load_tokenizer(tiny_config("some-organisation/some-model"))
    said = str(error.value)
    assert "'some-organisation/some-model'" in said and "cannot be reached" in said
    assert "give the folder of a model" in said and "hf download some-organisation/some-model" in said
    assert time.monotonic() - started < 10
    assert len(hub) <= 4, "one request may try two addresses"


def test_the_data_is_looked_at_before_the_hub(hub: list[str], tmp_path: Path) -> None:
    config = parse_config(
        {
            "model": {"type": "some-organisation/some-model@huggingface_llm"},
            "data": {"type": "absent.jsonl@llm", "root": str(tmp_path)},
            "federate": {"method": "fedmezo"},
        }
    )
    with pytest.raises(DataError, match=r"absent\.jsonl: does not exist"):
        Session.open(config)
    assert not hub


def test_offline_by_choice_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        hub_options("some-organisation/another-model")


@pytest.mark.parametrize("name", ["a b", "x" * 200, "-/-", "ends-with.git"])
def test_what_cannot_be_a_name(hub: list[str], name: str) -> None:
    with pytest.raises(ModelError, match="neither a folder here nor a possible name on the hub"):
        hub_options(name)
    assert not hub


def test_what_is_in_the_cache_needs_no_hub(hub: list[str], tmp_path: Path) -> None:
    """The layout is the one the hub's own client writes."""
    place = tmp_path / "cache" / "models--tiny--llama"
    save_tiny_model(place / "snapshots" / ("0" * 40), "llama")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    assert hub_options("tiny/llama") == {"local_files_only": True}
    assert not hub
