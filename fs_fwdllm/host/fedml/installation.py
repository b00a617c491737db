"""Whether FedML can be used here, and how to get it where it cannot.

FedML 0.9.6 is two years older than most of what it stands on. What it silently needs is written into our extra
``fedml`` and ``constraints-fedml.txt``; what cannot be written there is said here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from fs_fwdllm.errors import HostError

__all__ = [
    "HOW_TO_INSTALL", "LAST_PYTHON", "REPLACEMENTS", "describe_fedml", "import_fedml", "why_it_cannot_be_installed",
    "without_known_warnings",
]  # fmt: skip

#: The newest Python that FedML 0.9.6 installs on.
LAST_PYTHON = (3, 11)

#: What is put in the place of what FedML installs, and cannot be asked for beside it; setup.cfg says why.
REPLACEMENTS = ("torchvision==0.16.2", "typer==0.29.1")

HOW_TO_INSTALL = (
    "in a virtual environment of its own: pip install -c constraints-fedml.txt -e '.[fedml,demo]', then "
    f"pip install --no-deps {' '.join(REPLACEMENTS)}"
)

#: An old torchvision without its image reader, requests beside newer libraries, and setuptools' farewell to a module.
_KNOWN_WARNINGS = ("Failed to load image Python extension", "urllib3 .* doesn't match", "pkg_resources is deprecated")


def why_it_cannot_be_installed(version: tuple[int, int] = sys.version_info[:2]) -> str:
    """The reason why FedML does not install on a Python ``version``; empty where it does."""
    if version <= LAST_PYTHON:
        return ""
    return (
        f"FedML 0.9.6 does not install on Python {version[0]}.{version[1]}: it insists on wandb 0.13.2, which needs "
        "pathtools, which builds with the module 'imp' that Python 3.12 removed. Use Python 3.10 or 3.11"
    )


def describe_fedml() -> str:
    """That FedML is installed, in words; it is not imported.

    Raises:
        HostError: it is not installed; the message says what to do.
    """
    if importlib.util.find_spec("fedml") is None:
        reason = why_it_cannot_be_installed() or f"the module fedml is not installed; {HOW_TO_INSTALL}"
        raise HostError(f"--host fedml: {reason}. --host local runs the same methods without it")
    return "fedml found"


def import_fedml() -> ModuleType:
    """The module ``fedml``, without the warnings its own imports make.

    Raises:
        HostError: it is not installed, or what it stands on is broken; the message says what to do.
    """
    describe_fedml()
    try:
        with without_known_warnings():
            return importlib.import_module("fedml")
    except (ImportError, RuntimeError) as error:
        raise HostError(
            f"--host fedml: FedML is installed but cannot be imported ({type(error).__name__}: {error}); install it "
            f"{HOW_TO_INSTALL}"
        ) from error


@contextmanager
def without_known_warnings() -> Iterator[None]:
    """Import what FedML drags along without being told that it is old: nothing a user could do about it."""
    with warnings.catch_warnings():
        for message in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield
