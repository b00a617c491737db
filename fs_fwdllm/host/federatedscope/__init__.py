"""The host for FederatedScope (its ``llm`` branch, unmodified): its registries, workers and messages, our methods.

FederatedScope reads the YAML, loads and splits the data, owns the processes and the messages, evaluates, logs, stops
early and saves. What a round computes is the same as everywhere: the server's worker holds a
:class:`~fs_fwdllm.run.driver.RunDriver`, a client's worker calls :func:`~fs_fwdllm.run.driver.answer`, and the two
exchange our frames as one text field of the host's messages.

There are two ways in. ``fs-fwdllm hook install PATH`` adds one guarded file (:mod:`.hook_file`) to a checkout, after
which the host's own ``python federatedscope/main.py --cfg FILE`` knows us. ``python -m fs_fwdllm.host.federatedscope
--cfg FILE`` needs no file at all. Both import :mod:`.plugin`, which fills the host's registries and imports nothing
else of either package; everything heavy is imported by the callables that FederatedScope calls later.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["run_file"]


def run_file(cfg: Path, overrides: list[str]) -> None:
    """Run a configuration file in this process, as FederatedScope's ``main.py`` would."""
    from fs_fwdllm.host.federatedscope.host_main import launch

    launch(["--cfg", str(cfg), *overrides])
