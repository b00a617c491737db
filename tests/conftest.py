"""Fixtures every test may use. Real data is optional: a test that asks for an absent file skips and names it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Shared machines are noisy: a slow example is not a failing one. Examples are derived from the code, not from chance.
settings.register_profile("fs_fwdllm", deadline=None, derandomize=True)
settings.load_profile("fs_fwdllm")


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """``shared_data("ag_news/train_10k.jsonl")`` is that file's path, or skips the test when it is absent.

    The folder is ``$FS_FWDLLM_DATA``, else ``shared/data`` beside the checkout.
    """
    root = Path(os.environ.get("FS_FWDLLM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

    def find(name: str) -> Path:
        path = root / name
        if not path.exists():
            pytest.skip(f"real data file {name} is absent; set FS_FWDLLM_DATA to the folder that has it")
        return path

    return find
