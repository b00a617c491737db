"""Running FederatedScope's own ``main`` with our methods registered, and no file added to its checkout."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from fs_fwdllm.errors import ConfigError, FwdLLMError, HostError

__all__ = ["describe_home", "find_host", "launch"]

_HOME = "FEDERATEDSCOPE_HOME"
_INSTALL = "what it needs beside this package: pip install 'fs-fwdllm[federatedscope]'"
_DEFAULT_HOME = Path("~/.cache/fs_fwdllm/FederatedScope")


def find_host() -> Path | None:
    """Where a FederatedScope checkout is: ``$FEDERATEDSCOPE_HOME``, or the default place; ``None`` if it is installed.

    Raises:
        ConfigError: it is nowhere.
    """
    configured = os.environ.get(_HOME)
    candidates = [Path(configured)] if configured else []
    if not configured and importlib.util.find_spec("federatedscope") is not None:
        return None
    for place in candidates or [_DEFAULT_HOME.expanduser()]:
        if (place / "federatedscope" / "register.py").is_file():
            return place
    nowhere = f"it is not installed, {_HOME} is not set and {_DEFAULT_HOME}"
    said = f"{_HOME} is {configured!r}, which" if configured else nowhere
    raise ConfigError(
        f"FederatedScope is not found: {said} is no checkout of it. Clone alibaba/FederatedScope, branch llm, and set "
        f"{_HOME} to the clone (or pip install --no-deps -e it)"
    )


def describe_home() -> str:
    """Where FederatedScope is, in words. Raises as :func:`find_host`."""
    home = find_host()
    return f"checkout in {home}" if home is not None else "federatedscope found"


def launch(arguments: Sequence[str]) -> None:
    """Run the host's ``main`` in this process with ``arguments`` (``--cfg FILE key value ...``).

    The file may be the name of a packaged configuration, as everywhere in this package.

    Raises:
        ConfigError: FederatedScope is not found, or the file or an override is wrong.
        FwdLLMError: whatever stops a run of ours.
        HostError: something else does, inside the host; its traceback goes to the host's log file.
    """
    home = find_host()
    if home is not None:
        sys.path.insert(0, str(home))
    try:
        arguments, is_ours = _register(arguments)
    except ImportError as error:
        raise HostError(f"FederatedScope cannot be imported ({type(error).__name__}: {error}); {_INSTALL}") from error
    before = sys.argv
    sys.argv = ["federatedscope/main.py", *arguments]
    try:
        runpy.run_module("federatedscope.main", run_name="__main__", alter_sys=True)
        importlib.import_module("fs_fwdllm.host.federatedscope.run_state").require_end()
    except FwdLLMError:
        raise
    except Exception as error:
        if is_ours:
            raise HostError(_explain(error)) from error
        raise
    finally:
        sys.argv = before


def _explain(error: Exception) -> str:
    """What stopped the host in words, on one line; where from is written to its log file, if it has one by now."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    words = " ".join(str(error).split()) or f"no reason given, {Path(last.filename).name} line {last.lineno}"
    advice = f"; {_INSTALL}" if isinstance(error, ImportError) else ""
    text = f"FederatedScope stops with {type(error).__name__}: {words}{advice}"
    for handler in logging.getLogger("federatedscope").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(logging.LogRecord("federatedscope", logging.ERROR, "", 0, text, (), sys.exc_info()))
            return f"{text} (the traceback is in {handler.baseFilename})"
    return text


def _register(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Fill the registries, and the configuration once more after the host: registered first, we were overwritten.

    Returns the arguments as the host understands them, and whether they ask for a run of ours.
    """
    importlib.import_module("fs_fwdllm.host.federatedscope.plugin")  # it prepares the process, so it goes first
    from federatedscope.core.configs.config import global_cfg

    from fs_fwdllm.host.federatedscope.command_line import check_command_line, with_found_file
    from fs_fwdllm.host.federatedscope.settings import extend_host_config

    extend_host_config(global_cfg)
    found = with_found_file(arguments)
    return found, bool(check_command_line(found, global_cfg))
