"""One small federation, run by every host from the same file: its configuration, its processes and what it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fs_fwdllm.config import load_config
from fs_fwdllm.config.yaml_text import dump_yaml
from fs_fwdllm.host.supervise import free_ports
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running import local
from tests.host.federatedscope.participants import Participant, Starter
from tests.host.small import World, read_jsonl

__all__ = ["Federation", "Outcome", "outcome_of", "presplit", "write_config"]


@dataclass(frozen=True)
class Outcome:
    """What must agree between hosts: per round the digest and whom it heard, and every byte counted."""

    digests: list[str]
    rejected: list[dict[str, str]]
    traffic: str


def outcome_of(folder: Path) -> Outcome:
    """Read a run folder of ours."""
    run = RunFolder(folder)
    lines = read_jsonl(run.metrics_path)
    assert lines[-1].get("final"), f"the run in {folder} has not ended"
    rounds = [line for line in lines if "rejected" in line]
    return Outcome(
        [line["digest"] for line in lines], [line["rejected"] for line in rounds], run.traffic_path.read_text()
    )


def presplit(world: World, clients: int = 3, rows: int = 8) -> str:
    """Write one file per client, of instructions; the ``data.type`` that reads them."""
    folder = world.root / "data"
    for client in range(1, clients + 1):
        source = world.root / world.instructions(rows + client, f"rows{client}.jsonl")
        folder.mkdir(exist_ok=True)
        (folder / f"client_{client}.jsonl").write_text(source.read_text())
        source.unlink()
    return "presplit@llm"


def write_config(world: World, settings: Mapping[str, Any], *, language_model: bool = True) -> Path:
    """Write a configuration for every host. Evaluation at the end only, by the server where the host has a choice."""
    defaults = {
        "federate.client_num": 3, "federate.total_round_num": 4, "federate.make_global_eval": True, "eval.freq": 100,
        "eval.best_res_update_round_wise_key": "test_loss", "data.root": str(world.root / "data"),
        "data.splits": [0.5, 0.0, 0.5], "data.splitter": "iid",
        "train.local_update_steps": 2, "dataloader.batch_size": 2, "use_gpu": False,
        "early_stop.patience": 0, "eval.metrics": ["loss"],
    }  # fmt: skip
    tree = world.tree({**defaults, **settings}, language_model=language_model)
    path = world.root / "run.yaml"
    path.write_text(dump_yaml(tree))
    return path


@dataclass
class Federation:
    """Runs one file by ``local``, by the host in one process, and by the host in several.

    Args:
        cfg: the configuration file.
        root: where run folders and logs go.
    """

    cfg: Path
    root: Path
    starter: Starter
    clients: int = 3
    ports: list[int] = field(default_factory=list)

    def local(self) -> Outcome:
        """By the embedded host."""
        return outcome_of(local.run(load_config(self.cfg, ["outdir", str(self.root / "local")])))

    def standalone(self, *overrides: object, name: str = "standalone") -> Outcome:
        """By the host, all participants in one process."""
        self.start_standalone(*overrides, name=name).succeed()
        return outcome_of(self.folder(name))

    def start_standalone(self, *overrides: object, name: str = "standalone", **named: Any) -> Participant:
        """As :meth:`standalone`, without waiting for the end."""
        return self.starter.start(self._arguments(name, *overrides), self.root, name=name, **named)

    def folder(self, name: str) -> Path:
        """Our run folder of a participant."""
        return self.root / name / "run" / "fwdllm"

    def start_server(self, *overrides: object, name: str = "server", **named: Any) -> Participant:
        """The server of a gRPC run."""
        self.ports = self.ports or free_ports(self.clients + 1)
        return self._start_part("server", 0, name, overrides, **named)

    def start_client(self, client: int, *overrides: object, name: str = "", **named: Any) -> Participant:
        """A client of a gRPC run."""
        self.ports = self.ports or free_ports(self.clients + 1)
        mine = ("distribute.client_host", "127.0.0.1", "distribute.client_port", self.ports[client])
        return self._start_part("client", client, name or f"client{client}", (*mine, *overrides), **named)

    def distributed(self, *overrides: object) -> Outcome:
        """By the host, every participant in a process of its own."""
        server = self.start_server(*overrides)
        clients = [self.start_client(client, *overrides) for client in range(1, self.clients + 1)]
        for participant in (server, *clients):
            participant.succeed()
        return outcome_of(self.folder("server"))

    def _start_part(self, role: str, index: int, name: str, overrides: Sequence[object], **named: Any) -> Participant:
        cfg = self.root / f"{role}.yaml"
        if not cfg.exists():  # the host's command line takes the word "client" for something else
            cfg.write_text(self.cfg.read_text() + f"distribute:\n  use: true\n  role: {role}\n")
        address = ("distribute.server_host", "127.0.0.1", "distribute.server_port", self.ports[0])
        mode = ("federate.mode", "distributed", "distribute.data_idx", index)
        arguments = self._arguments(name, *address, *mode, *overrides, cfg=cfg)
        return self.starter.start(arguments, self.root, name=name, **named)

    def _arguments(self, name: str, *overrides: object, cfg: Path | None = None) -> list[object]:
        return ["--cfg", cfg or self.cfg, "outdir", self.root / name, "expname", "run", *overrides]
