"""FedML 0.9.6 as host: the methods of this package inside FedML's simulators and over its transports.

======================================  ================================================================
:mod:`~.settings`, :mod:`~.translation` FedML's file and our section ``fwdllm_args``
:mod:`~.trainer`, :mod:`~.aggregator`   a silo's and the server's half of a round, as FedML's classes
:mod:`~.payload`, :mod:`~.placement`    frames in what FedML sends; which client lives in which silo
:mod:`~.program`                        arguments in, what ``FedMLRunner`` is given out
:mod:`~.simulators`, :mod:`~.patches`   the simulators that use them, and what is changed inside FedML
:mod:`~.process`, :mod:`~.cluster`      one process; all of them, supervised
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

from fs_fwdllm.host.fedml.installation import import_fedml, without_known_warnings

__all__ = ["FwdLLMAggregator", "FwdLLMTrainer", "Program", "build", "enable", "init", "resume", "run", "run_file"]

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
