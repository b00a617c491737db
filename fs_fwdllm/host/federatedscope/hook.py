"""Placing our one file in a FederatedScope checkout, and taking it out again."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.report.files import write_text_atomically

__all__ = ["HOOK_FILE", "install", "remove"]

#: Name of our file in ``federatedscope/contrib/configs/``.
HOOK_FILE = "fs_fwdllm_hook.py"


def install(tree: Path) -> Path:
    """Place the hook in the checkout ``tree``; doing it again changes nothing. Returns the file's path.

    Raises:
        ConfigError: ``tree`` is no FederatedScope checkout, or its file of that name is not ours.
    """
    path = _place(tree)
    if path.is_file() and "fs_fwdllm" not in path.read_text(encoding="utf-8"):
        raise ConfigError(f"{path}: exists and is not ours; move it away first")
    text = resources.files(__package__).joinpath("hook_file.py").read_text(encoding="utf-8")
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text_atomically(path, text)
    return path


def remove(tree: Path) -> Path | None:
    """Take the hook out of ``tree``. Returns the path of the file removed, ``None`` if there was none.

    Raises:
        ConfigError: as :func:`install`.
    """
    path = _place(tree)
    if not path.is_file():
        return None
    if "fs_fwdllm" not in path.read_text(encoding="utf-8"):
        raise ConfigError(f"{path}: exists and is not ours; it stays")
    path.unlink()
    return path


def _place(tree: Path) -> Path:
    package = tree / "federatedscope"
    folder = package / "contrib" / "configs"
    if not (package / "register.py").is_file() or not folder.is_dir():
        raise ConfigError(
            f"{tree}: is no FederatedScope checkout; its folder federatedscope/contrib/configs is expected there "
            "(clone alibaba/FederatedScope, branch llm)"
        )
    return folder / HOOK_FILE
