"""Over a base on the disk the clients of a round, and the batches of an evaluation, share what is read; nothing else
changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fs_fwdllm.core.wire import encode
from fs_fwdllm.method import assemble_server, assemble_worker
from fs_fwdllm.model.base.packed import reader_of
from fs_fwdllm.model.base.packing import Form
from fs_fwdllm.model.base.quantising import quantise_folder
from fs_fwdllm.running.driver import answers
from fs_fwdllm.running.local import run
from fs_fwdllm.running.session import Session
from tests.host.small import World, read_jsonl


def settings_of(world: World, tmp_path: Path, own: dict[str, Any]) -> dict[str, Any]:
    packed = tmp_path / "packed"
    if not packed.exists():
        quantise_folder(world.model("llama"), packed, Form("int4", 16))
    return {
        "model.type": f"{packed}@huggingface_llm", "federate.method": "fedfwd", "fwdllm.estimator": "one_sided",
        "fwdllm.probes": 3, "federate.total_round_num": 2, "fwdllm.attention": "eager",
        "fwdllm.radius": 0.01, **own,
    }  # fmt: skip


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"fwdllm.probes_per_batch": 3},
        {"fwdllm.estimator": "central", "fwdllm.probes": 2},
        {"fwdllm.prefix_cache_mib": 64, "llm.adapter.args": [
            {"adapter_method": "lora", "r": 2, "layers_to_transform": [1]}]},
        {"fwdllm.parts": [{"match": "*q_proj*", "slopes": "one_sided", "probes": 2},
                          {"match": "*", "slopes": "central", "probes": 1}]},
        {"fwdllm.estimator": "forward_mode", "fwdllm.probes_per_batch": 3},
        {"federate.method": "fedmezo", "train.local_update_steps": 2},
    ],
    ids=["one by one", "batched", "central", "played back", "parts", "forward mode", "mezo"],
)  # fmt: skip
@pytest.mark.parametrize("passes_per_read", [1, 5, 32])
def test_a_run_ends_with_the_same_bits(world: World, tmp_path: Path, own: dict[str, Any], passes_per_read: int) -> None:
    settings = settings_of(world, tmp_path, own)
    resident = read_jsonl(run(world.config(settings, language_model=True)) / "metrics.jsonl")
    disk = {"fwdllm.base": {"stream": True, "passes_per_read": passes_per_read}, "expname": "disk"}
    streamed = read_jsonl(run(world.config({**settings, **disk}, language_model=True)) / "metrics.jsonl")
    for mine, theirs in zip(streamed, resident, strict=True):
        kept = ("round", "digest", "train_loss", "loss", "forward_passes", "upload_bytes", "eval")
        assert {key: mine.get(key) for key in kept} == {key: theirs.get(key) for key in kept}


def test_a_round_and_an_evaluation_read_the_base_once(world: World, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path, {"fwdllm.base": {"stream": True, "passes_per_read": 64}})
    session = Session.open(world.config(settings, language_model=True))
    worker, server = assemble_worker(session.parts), assemble_server(session.parts, session.client_samples)
    reader = reader_of(session.loaded.model)
    assert reader is not None
    examples = {client: held.train for client, held in session.data.clients.items()}
    for client in session.client_samples:
        server.note_holds(client, server.digest)

    def read(work: Any) -> float:
        before = reader.bytes_read
        work()
        return (reader.bytes_read - before) / reader.stored_bytes

    frames = {client: encode(given) for client, given in server.assign(0, list(session.client_samples)).items()}
    ahead = reader.buffer_bytes / reader.stored_bytes  # a layer may be read for a pass that does not come
    list(answers(worker, frames, examples))  # the order of the layers is known from here on
    assert len(frames) == 4
    assert read(lambda: list(answers(worker, frames, examples))) <= 1 + ahead
    assert read(lambda: session.evaluate(server.trainables)) <= 1 + ahead
