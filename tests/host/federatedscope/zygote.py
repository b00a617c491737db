"""A process that has imported everything, and forks a participant per request: importing costs more than a tiny run.

Run as a script: ``zygote.py launcher`` has the plugin registered by our launcher, ``zygote.py hooked`` (with a checkout
as the working folder and on ``PYTHONPATH``) by the hook that the checkout carries. It reads requests as JSON lines, and
answers each with one. A forked participant runs the host's ``main`` with its own arguments, folder, log and
environment, and ends as any Python process does; so what it leaves running shows.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

__all__: list[str] = []

_HEAVY = (
    "torch", "transformers", "transformers.models.llama.modeling_llama", "peft", "matplotlib.figure",
    "federatedscope.core.cmd_args", "federatedscope.core.auxiliaries.data_builder",
    "federatedscope.core.auxiliaries.worker_builder", "federatedscope.core.auxiliaries.runner_builder",
    "federatedscope.llm.dataloader", "federatedscope.llm.trainer.trainer", "pympler.asizeof",
    "fs_fwdllm.running.driver", "fs_fwdllm.report",
)  # fmt: skip


def _prepare(way: str) -> None:
    if way == "launcher":
        from fs_fwdllm.host.federatedscope import host_main as launch

        home = launch.find_host()
        if home is not None:
            sys.path.insert(0, str(home))
        importlib.import_module("fs_fwdllm.host.federatedscope.plugin")
    for name in _HEAVY:
        importlib.import_module(name)


def _serve() -> dict[str, Any]:
    """Answer requests for ever; in a forked participant, return the request that made it."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)
    raise SystemExit(0)


def _become(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    sys.path[:0] = request["path"]


def _run(way: str, arguments: list[str]) -> None:
    if way == "hooked":
        sys.argv = ["federatedscope/main.py", *arguments]
        runpy.run_path("federatedscope/main.py", run_name="__main__")
        return
    sys.argv = ["fs_fwdllm.host.federatedscope", *arguments]
    runpy.run_module("fs_fwdllm.host.federatedscope", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    Path(sys.argv[0]).resolve(strict=True)
    _prepare(sys.argv[1])
    print(json.dumps("ready"), flush=True)
    wanted = _serve()
    _become(wanted)
    if wanted["before"]:
        exec(wanted["before"], {"__name__": "before"})
    _run(sys.argv[1], wanted["arguments"])
