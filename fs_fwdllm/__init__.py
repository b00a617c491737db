"""Federated fine-tuning of language models on devices that can run a model but cannot train it by backpropagation.

The decision everything rests on: a perturbation is never a tensor that travels, it is a seed. A client that measured
the slope ``g`` of its loss along the direction ``z(seed)`` uploads the scalar; whoever knows ``(seed, g)`` rebuilds the
update, bit for bit, on any machine.

Start with ``fs-fwdllm run --cfg demo``, or from Python::

    from fs_fwdllm import load_config, run
    folder = run(load_config("demo"))

The parts, from the bottom up: :mod:`~fs_fwdllm.core` (seeded directions, replay from scalars to updates, what travels),
:mod:`~fs_fwdllm.data` and :mod:`~fs_fwdllm.model`, :mod:`~fs_fwdllm.estimator` (slopes), :mod:`~fs_fwdllm.method`
(client and server), :mod:`~fs_fwdllm.run` (a run on any host), :mod:`~fs_fwdllm.host` (processes and messages).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fs_fwdllm._version import __version__

if TYPE_CHECKING:
    from fs_fwdllm.config import Config, load_config
    from fs_fwdllm.model import load_bottleneck
    from fs_fwdllm.run.local import resume, run

__all__ = ["Config", "__version__", "load_bottleneck", "load_config", "resume", "run"]

_HOMES = {
    "Config": "fs_fwdllm.config",
    "load_bottleneck": "fs_fwdllm.model",
    "load_config": "fs_fwdllm.config",
    "resume": "fs_fwdllm.run.local",
    "run": "fs_fwdllm.run.local",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``fs-fwdllm --help`` need not load PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
