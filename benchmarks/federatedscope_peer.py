"""MeZO inside FederatedScope: ours against the published branch FedMeZO, time, memory and bytes.

Both run the same configuration file on the same data and model: a random Llama of 26 M parameters in float32, three
clients, batches of one sequence of some 60 tokens, one thread. With LoRA ours has ``fwdllm.probes_per_batch: 2`` on
top: both points of a probe in one pass, which the peer cannot do. The peer is its own ``federatedscope/main.py``; ours
is ``python -m fs_fwdllm.host.federatedscope`` on an unmodified checkout of branch ``llm``. Every run is a process of
its own, and everything it spends counts.

* *CPU-ms per local step*: CPU time (user and system) of a run with many local steps minus that of a run with one,
  divided by the steps between them. Imports, loading, evaluation, saving and all else that is paid once per run or per
  round cancel; what grows with the steps remains: batches, perturbations, forward passes, updates, and for ours also
  the replay of every step's scalar on the server and on the simulated clients' replica. Runs of both are interleaved,
  and the minimum over the repetitions is taken of each kind of run, since noise only adds.
* *peak memory*: the high-water mark of resident memory of a whole run, imports included; the minimum over the
  repetitions. The host pickles every worker's model to learn its size: seen from a model whose file is mapped but not
  yet read, that takes 2.9 times the model's bytes, which is the target. One byte of these in three is the model itself
  being read, which no run can do without. So the peer also runs once with that pickling made to fail: what it saves
  is what the pickling adds to the peak of a run.
* *upload*: bytes per client and round. Ours are the frames' lengths, from ``bytes.csv``. The peer sends its trained
  parameters, 4 bytes each before the host's encoding.

Needs FEDMEZO_HOME (a checkout of alibaba/FederatedScope, branch FedMeZO) and our host's checkout (FEDERATEDSCOPE_HOME,
or its default place); without them it says so and stops.

    FEDMEZO_HOME=... python benchmarks/federatedscope_peer.py [--quick] [--repetitions 3]
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import yaml
from common import LORA_TARGETS, arguments, mib, print_machine, print_table, random_llama, verdict
from transformers import PreTrainedTokenizerFast

from fs_fwdllm.data.rendering import WrittenForm
from fs_fwdllm.data.templates import user_says
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.host.federatedscope.host_main import find_host

ROOT = Path(__file__).resolve().parents[1]
CLIENTS, ROUNDS, ROWS = 3, 2, 300
PICKLE_PER_MODEL_BYTE = 2.9
PEER, UNPICKLED, OURS = "FedMeZO", "FedMeZO unpickled", "ours"
#: Runs the script that is its first argument, with the workers' pickling of the model made to fail.
_WITHOUT_PICKLING = """
import runpy, sys
from types import SimpleNamespace
from federatedscope.core.workers import client, server
client.pickle = server.pickle = SimpleNamespace()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}


@dataclass(frozen=True)
class Case:
    """What is trained, for how many local steps in the long run, and the most time we may take of the peer's.

    Attributes:
        batched: ours evaluates both points of a probe in one batched pass.
    """

    name: str
    rank: int
    steps: int
    target: float
    batched: bool = True

    @property
    def adapter(self) -> dict[str, Any]:
        """``llm.adapter`` of the configuration; rank 0 trains every parameter."""
        lora = {"r": self.rank, "lora_alpha": 2 * self.rank, "lora_dropout": 0.05, "target_modules": LORA_TARGETS}
        method = {"adapter_package": "peft", "adapter_method": "lora", **lora}
        return {"use": True, "args": [method]} if self.rank else {"use": False}


CASES = (
    Case("LoRA r=8", 8, 21, 0.85),
    Case("LoRA r=128", 128, 17, 0.70),
    Case("all parameters", 0, 9, 0.25, batched=False),
)


@dataclass
class Spent:
    """What the runs of one side and kind took: CPU seconds and peak bytes, one of each per repetition."""

    cpu_s: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)


def write_world(folder: Path, *, quick: bool) -> int:
    """The model with its tokenizer and ``alpaca_data.json``; returns the model's bytes."""
    words = [f"w{index}" for index in range(100 if quick else 500)]
    rng = np.random.default_rng(3)

    def sentence(least: int, most: int) -> str:
        return " ".join(rng.choice(words, int(rng.integers(least, most))))

    rows = [{"instruction": sentence(8, 16), "input": "", "output": sentence(8, 16)} for _ in range(ROWS)]
    (folder / "alpaca_data.json").write_text(json.dumps(rows), encoding="utf-8")
    template = WrittenForm("alpaca", end="").prompt(user_says(""))
    headers = [token for token, _ in tokenizers.pre_tokenizers.Whitespace().pre_tokenize_str(template)]
    vocabulary = dict.fromkeys([*SPECIAL.values(), *headers, *words])
    ids = {token: index for index, token in enumerate(vocabulary)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL).save_pretrained(folder / "model")
    model = random_llama(quick=quick)
    model.resize_token_embeddings(len(ids), mean_resizing=False)
    model.save_pretrained(folder / "model")
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def write_config(folder: Path, case: Case) -> Path:
    """The configuration both sides run."""
    tree = {
        "seed": 1, "use_gpu": False, "device": -1, "outdir": str(folder / "out"),
        "early_stop": {"patience": 0},
        "federate": {"client_num": CLIENTS, "total_round_num": ROUNDS, "share_local_model": True},
        "data": {"root": str(folder), "type": "alpaca@llm", "splits": [0.98, 0.01, 0.01], "splitter": "iid"},
        "model": {"type": f"{folder / 'model'}@huggingface_llm"},
        "llm": {"tok_len": 128, "adapter": case.adapter},
        "dataloader": {"batch_size": 1},
        "train": {"batch_or_epoch": "batch", "optimizer": {"lr": 1e-5, "weight_decay": 0.0}},
        "trainer": {"type": "mezotrainer"},
        "eval": {"freq": 10, "metrics": ["loss"], "count_flops": False},
    }  # fmt: skip
    path = folder / f"rank{case.rank}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def run(command: list[str], environment: dict[str, str], folder: Path) -> tuple[float, int]:
    """CPU seconds and peak bytes of a process (no peak reads as less than this script's own, which is below any's)."""
    with (folder / "run.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, stdout=log, stderr=log, env={**os.environ, **environment}
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = (folder / "run.log").read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit


def sides(peer: Path, host: Path | None) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Command and environment of each."""
    common = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    ours = common | {"PYTHONPATH": str(ROOT)} | ({"FEDERATEDSCOPE_HOME": str(host)} if host else {})
    theirs = common | {"PYTHONPATH": str(peer), "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    return {
        PEER: ([str(peer / "federatedscope" / "main.py")], theirs),
        UNPICKLED: (["-c", _WITHOUT_PICKLING, str(peer / "federatedscope" / "main.py")], theirs),
        OURS: (["-m", "fs_fwdllm.host.federatedscope"], ours),
    }


def measure(
    case: Case, folder: Path, participants: dict[str, tuple[list[str], dict[str, str]]], repetitions: int
) -> dict[tuple[str, int], Spent]:
    """Interleaved runs of both sides with one local step and with many."""
    config = write_config(folder, case)
    spent: dict[tuple[str, int], Spent] = {}
    for repetition in range(repetitions):
        for steps in (1, case.steps):
            for side, (command, environment) in participants.items():
                if side == UNPICKLED and (repetition or steps == 1):
                    continue
                name = f"{side.replace(' ', '-')}-rank{case.rank}-steps{steps}-{repetition}"
                settings = ["train.local_update_steps", str(steps), "expname", name]
                if side == OURS and case.batched:
                    settings += ["fwdllm.probes_per_batch", "2"]
                cpu_s, peak = run([*command, "--cfg", str(config), *settings], environment, folder)
                kind = spent.setdefault((side, steps), Spent())
                kind.cpu_s.append(cpu_s)
                kind.peak_bytes.append(peak)
    return spent


def step_ms(spent: dict[tuple[str, int], Spent], side: str, case: Case) -> float:
    """CPU milliseconds per local step."""
    more_s = min(spent[side, case.steps].cpu_s) - min(spent[side, 1].cpu_s)
    return 1000 * more_s / (CLIENTS * ROUNDS * (case.steps - 1))


def peak_bytes(spent: dict[tuple[str, int], Spent], side: str, case: Case) -> int:
    """Peak memory of the long run."""
    return min(spent[side, case.steps].peak_bytes)


def uploads(folder: Path, case: Case) -> tuple[float, int]:
    """Bytes per client-round: ours, from the long run's account, and the peer's dense parameters."""
    run_folder = folder / "out" / f"ours-rank{case.rank}-steps{case.steps}-0" / "fwdllm"
    with (run_folder / "bytes.csv").open(encoding="utf-8", newline="") as file:
        sent = [int(row["upload_bytes"]) for row in csv.DictReader(file)]
    trained = re.search(r"([\d,]+) trainable of", (run_folder / "console.log").read_text(encoding="utf-8"))
    assert trained is not None, "the run does not say how many parameters it trains"
    return float(np.mean(sent)), 4 * int(trained[1].replace(",", ""))


def time_row(case: Case, spent: dict[tuple[str, int], Spent], folder: Path, quick: bool) -> tuple[object, ...]:
    """Milliseconds and bytes of both sides."""
    peer, ours = (step_ms(spent, side, case) for side in (PEER, OURS))
    sent, dense = uploads(folder, case)
    judged = verdict(ours / peer, case.target, quick)
    return case.name, f"{peer:.1f}", f"{ours:.1f}", f"{ours / peer:.2f}", judged, dense, f"{sent:.0f}"


def memory_row(case: Case, spent: dict[tuple[str, int], Spent], model_bytes: int, quick: bool) -> tuple[object, ...]:
    """Peaks of both sides, and of the peer without pickling."""
    peer, unpickled, ours = (peak_bytes(spent, side, case) for side in (PEER, UNPICKLED, OURS))
    allowed = peer - PICKLE_PER_MODEL_BYTE * model_bytes
    met = "" if quick else " met" if ours <= allowed else " MISSED"
    return (
        case.name,
        mib(peer),
        mib(unpickled),
        mib(ours),
        mib(peer - unpickled),
        mib(peer - ours),
        (f"<= {mib(allowed)}{met}"),
    )


def report(cases: list[Case], folder: Path, measured: list[Any], model_bytes: int, quick: bool) -> None:
    """The two tables."""
    pairs = list(zip(cases, measured, strict=True))
    header = ("", PEER, OURS, "ratio", "target", f"{PEER} bytes", "our bytes")
    rows = [time_row(case, spent, folder, quick) for case, spent in pairs]
    print_table("CPU-ms per local step, and upload bytes per client-round", header, rows)
    header = ("", PEER, UNPICKLED, OURS, "pickling adds", "ours less by", "target on ours")
    rows = [memory_row(case, spent, model_bytes, quick) for case, spent in pairs]
    print_table(f"Peak resident memory of the run, MiB (model {mib(model_bytes)})", header, rows)


def main() -> None:
    options = arguments(__doc__, repetitions=3, only="")
    home = os.environ.get("FEDMEZO_HOME", "")
    if not (Path(home) / "federatedscope" / "llm" / "trainer" / "mezo_trainer.py").is_file() or not home:
        print(f"skipped: FEDMEZO_HOME is {home!r}; set it to a checkout of alibaba/FederatedScope, branch FedMeZO")
        return
    try:
        participants = sides(Path(home).resolve(), find_host())
    except ConfigError as error:
        print(f"skipped: {error}")
        return
    print_machine(options.threads)
    cases = [case for case in CASES if options.only in case.name]
    if options.quick:
        cases = [Case(case.name, case.rank, 3, case.target) for case in cases[:1]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_bytes = write_world(folder, quick=options.quick)
        measured = [measure(case, folder, participants, options.repetitions) for case in cases]
        report(cases, folder, measured, model_bytes, options.quick)


if __name__ == "__main__":
    main()
