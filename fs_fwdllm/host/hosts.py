"""The hosts by the word that ``--host`` uses for them, and what the command has to know of each.

A host carries a run: it owns processes, messages and data sets. Its own package says the facts about it, as one
:class:`Host`, and has one row below; another package announces its host as an entry point of the group
``fs_fwdllm.hosts``. The commands ``run``, ``resume`` and ``doctor`` ask this table and know no host by name. Nothing
heavy is imported here, and no framework.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fs_fwdllm.core.registry import Registry
from fs_fwdllm.errors import ConfigError

__all__ = ["FILE_OPTIONS", "HOSTS", "Host", "owner_of"]

#: The options of ``fs-fwdllm run`` that name a file: one in our own format, and one in a framework's.
FILE_OPTIONS = ("--cfg", "--cf")


@dataclass(frozen=True)
class Host:
    """What carries a run.

    Attributes:
        name: what ``--host`` calls it.
        module: has ``run_file(cfg, overrides)`` and, unless ``resume_advice`` is set, ``resume(run)``, which may take
            ``rounds`` too. It is imported when one of them is called.
        option: which of :data:`FILE_OPTIONS` names its file.
        marker: a file that it writes into the folder of every run it makes. Folders without any host's marker are
            ``local``'s.
        resume_advice: why ``resume`` does not continue its runs, and what does; ``{run}`` stands for the run folder.
        framework: says where the framework it stands on was found; raises a
            :class:`~fs_fwdllm.errors.FwdLLMError` with the advice to install it if it was not. ``None`` needs none.

    Raises:
        ConfigError: ``option`` is not one of :data:`FILE_OPTIONS`.
    """

    name: str
    module: str
    option: str = "--cfg"
    marker: str = ""
    resume_advice: str = ""
    framework: Callable[[], str] | None = None

    def __post_init__(self) -> None:
        if self.option not in FILE_OPTIONS:
            raise ConfigError(f"host {self.name}: option {self.option!r}; allowed are {', '.join(FILE_OPTIONS)}")

    def run_file(self, cfg: Path, overrides: list[str]) -> None:
        """Train as the file ``cfg`` with ``key value`` overrides says. Raises what the host's own function does."""
        importlib.import_module(self.module).run_file(cfg, overrides)

    def resume(self, run: Path, rounds: int | None = None) -> None:
        """Continue the run in a folder, with another number of rounds in all if told. Raises what the host's own
        function does, and

        Raises:
            ConfigError: runs of this host are continued in another way, which the message says.
        """
        if self.resume_advice:
            more = "" if rounds is None else f" federate.total_round_num {rounds}"
            raise ConfigError(f"{run}: {self.resume_advice.format(run=run)}{more}")
        resume = importlib.import_module(self.module).resume
        if rounds is None:
            resume(run)
        elif "rounds" in inspect.signature(resume).parameters:
            resume(run, rounds=rounds)
        else:
            raise ConfigError(f"--rounds {rounds}: runs of host {self.name!r} cannot be given another number of rounds")

    def find_framework(self) -> str:
        """Where its framework was found; empty if it needs none. Raises as :attr:`framework` does."""
        return self.framework() if self.framework is not None else ""


_LOCAL = Host("local", "fs_fwdllm.running.local")

HOSTS: Registry[Host] = Registry(
    "--host",
    "fs_fwdllm.hosts",
    {
        "local": _LOCAL,
        "federatedscope": "fs_fwdllm.host.federatedscope:HOST",
        "fedml": "fs_fwdllm.host.fedml:HOST",
    },
    kind=Host,
)


def owner_of(run: Path) -> Host:
    """The host that made the run in a folder.

    Raises:
        ConfigError: another package announces a host that cannot be imported, so that nobody knows whether it is that.
    """
    marked = (host for host in map(HOSTS.__getitem__, HOSTS) if host.marker and (run / host.marker).is_file())
    return next(marked, _LOCAL)
