"""What shared directions cost and save: accuracy at equal work, and bytes of a round, on a linear head over features.

A hundred clients are all asked in every round and send thirty slopes each, along directions of their own, of ten or of
four groups, or of one set that all have in common. Each row's rate is the best of its grid by the validation split of
seed 11, the same grid for all; the seeds reported look at the test rows. Slopes are exact (they cost no pass), so that
what differs is the directions alone. The plain mean: nobody lies here.

    python benchmarks/directions.py DATA_ROOT [--seeds 1 2 3] [--rounds 200] [--probes 30] [KEY VALUE ...]

Without keys the data folder must hold AG News (``train_10k.jsonl`` and ``test_desc.jsonl``); for others name
``data.type``, ``fwdllm.data.test_file`` and the fields.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from attacks import TUNED_ON, Method, accuracy, best_rate, configured, trained, with_rate
from common import print_machine, print_table

from fs_fwdllm.running.session import Session

_CLIENTS = 100
_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
_SHARED: dict[str, dict[str, Any]] = {
    "own": {},
    "10 groups": {"fwdllm.directions": "groups"},
    "4 groups": {"fwdllm.directions": "groups", "fwdllm.direction_groups": 4},
    "common": {"fwdllm.directions": "groups", "fwdllm.direction_groups": 1},
}


def method_of(name: str, options: argparse.Namespace) -> Method:
    head = [{"adapter_package": "fs_fwdllm", "adapter_method": "head"}]
    keys = {
        "federate.method": "fedfwd", "llm.adapter.use": True, "llm.adapter.args": head,
        "fwdllm.estimator": "closed_form", "fwdllm.probes": options.probes, "fwdllm.server_momentum": 0.9,
        "fwdllm.robust.clip": "none",
    }  # fmt: skip
    return Method(keys | _SHARED[name], _RATES, options.rounds)


def record_bytes(session: Session, rate: float) -> int:
    """What everybody is sent of one round."""
    config = with_rate(session.config, rate)
    start = session.parts.trainables.copy_values()
    short = config.model_copy(update={"federate": config.federate.model_copy(update={"total_round_num": 2})})
    server = trained(session, short, "", [])
    session.parts.trainables.load_values(start)
    return len(server.assign(2, [1])[1].catch_up[-1])


def row_of(name: str, sessions: dict[int, Session], options: argparse.Namespace) -> tuple[str, ...]:
    method = method_of(name, options)
    print(f"{name}:", flush=True)
    configs = {seed: configured(method, seed, options, _CLIENTS) for seed in sessions}
    for seed, session in sessions.items():
        session.config = configs[seed]
    rate = best_rate(method, sessions[TUNED_ON])
    reached = []
    for seed in options.seeds:
        started = time.perf_counter()
        reached.append(accuracy(sessions[seed], with_rate(configs[seed], rate), "", 0, "test"))
        print(f"  seed {seed}: {reached[-1]:.1f} ({time.perf_counter() - started:.0f} s)", flush=True)
    spread = f" +- {statistics.stdev(reached):.1f}" if len(reached) > 1 else ""
    return name, f"{statistics.fmean(reached):.1f}{spread}", f"{rate:g}", f"{record_bytes(sessions[TUNED_ON], rate):,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data_root", type=Path)
    parser.add_argument("words", nargs="*", metavar="KEY VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--probes", type=int, default=30)
    parser.add_argument("--lda", type=float, default=0.0, metavar="ALPHA", help="uneven clients; 0 is IID")
    parser.add_argument("--test-rows", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds, few rows")
    options = parser.parse_intermixed_args()
    if options.quick:
        options.seeds, options.rounds, options.test_rows = options.seeds[:1], 2, 32
        options.words = [*options.words, "data.subsample", "0.1"]
    torch.set_num_threads(options.threads)
    print_machine(options.threads)
    own = method_of("own", options)
    sessions = {seed: Session.open(configured(own, seed, options, _CLIENTS)) for seed in {TUNED_ON, *options.seeds}}
    rows = [row_of(name, sessions, options) for name in _SHARED]
    header = ("directions", "accuracy %", "rate", "bytes of a round")
    print_table(f"{_CLIENTS} clients, {options.probes} slopes each, {len(options.seeds)} seeds", header, rows)


if __name__ == "__main__":
    main()
