"""FedML 0.9.6 as host: the methods of this package inside FedML's simulators and over its transports.

======================================  ================================================================
:mod:`~.settings`, :mod:`~.translation` FedML's file and our section ``fwdllm_args``
:mod:`~.trainer`, :mod:`~.aggregator`   a silo's and the server's half of a round, as FedML's classes
:mod:`~.payload`, :mod:`~.dataset`      frames in what FedML sends; what each silo's clients hold
:mod:`~.admission`                      which client processes get work: those with the server's base
:mod:`~.program`                        arguments in, what ``FedMLRunner`` is given out
:mod:`~.simulators`, :mod:`~.patches`   the simulators that use them, and what is changed inside FedML
:mod:`~.process`, :mod:`~.identity`     one process: its part, who it is and how it ends
:mod:`~.cluster`                        all of them, supervised
:mod:`~.watchdog`                       a deadline for every wait
:mod:`~.command`                        ``fedml run local``
======================================  ================================================================

A FedML program of one's own needs three names of this module:

    args = init()                                     # fedml.init, offline
    program = build(args)                             # dataset, model, trainer, aggregator
    FedMLRunner(args, program.device, program.dataset, program.model,
                program.client_trainer, program.server_aggregator).run()

``enable()``, which both of them call, is what makes the simulators honour a trainer and an aggregator at all. Importing
this package does not import FedML; using these names does.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fs_fwdllm.host.fedml.installation import describe_fedml, import_fedml, without_known_warnings
from fs_fwdllm.host.hosts import Host

__all__ = [
    "HOST", "FwdLLMAggregator", "FwdLLMTrainer", "Program", "build", "enable", "init", "resume", "run", "run_file",
]  # fmt: skip

#: The marker is the FedML file of the run, as it was resolved.
HOST = Host(name="fedml", module=__name__, option="--cf", marker="fedml.yaml", framework=describe_fedml)

_NEEDS_FEDML = {
    "FwdLLMAggregator": "aggregator",
    "FwdLLMTrainer": "trainer",
    "Program": "program",
    "build": "program",
    "enable": "patches",
    "init": "program",
}
_MODULES = {**_NEEDS_FEDML, "resume": "cluster", "run": "cluster"}


def run_file(path: Path, overrides: list[str]) -> Path:
    """Run one of FedML's files with ``key value`` overrides, as every host offers it to the command."""
    folder: Path = importlib.import_module(f"{__name__}.cluster").run(path, overrides)
    return folder


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _NEEDS_FEDML:
        import_fedml()
    with without_known_warnings():
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
