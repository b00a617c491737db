"""The host for FederatedScope (its ``llm`` branch, unmodified): its registries, workers and messages, our methods.

FederatedScope reads the YAML, loads and splits the data, owns the processes and the messages, evaluates, logs, stops
early and saves. What a round computes is the same as everywhere: the server's worker holds a
:class:`~fs_fwdllm.running.driver.RunDriver`, a client's worker calls :func:`~fs_fwdllm.running.driver.answer`, and the
two exchange our frames as one text field of the host's messages.

There are two ways in. ``fs-fwdllm hook install PATH`` adds one guarded file (:mod:`.hook_file`) to a checkout, after
which the host's own ``python federatedscope/main.py --cfg FILE`` knows us. ``python -m fs_fwdllm.host.federatedscope
--cfg FILE`` needs no file at all. Both import :mod:`.plugin`, which fills the host's registries and imports nothing
else of either package; everything heavy is imported by the callables that FederatedScope calls later.
"""

from __future__ import annotations

from pathlib import Path

from fs_fwdllm.host.federatedscope.host_main import describe_home, launch
from fs_fwdllm.host.hosts import Host

__all__ = ["HOST", "RUN_FOLDER", "run_file"]

#: Our run folder, inside the output folder that FederatedScope makes for a run.
RUN_FOLDER = "fwdllm"

HOST = Host(
    name="federatedscope",
    module=__name__,
    marker="federatedscope.txt",
    resume_advice="was made inside FederatedScope; run its file again with federate.restore_from {run}",
    framework=describe_home,
)


def run_file(cfg: Path, overrides: list[str]) -> None:
    """Run a configuration file in this process, as FederatedScope's ``main.py`` would."""
    launch(["--cfg", str(cfg), *overrides])
