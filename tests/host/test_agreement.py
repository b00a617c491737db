"""Every key either must agree between server and client, or may differ; whoever adds one decides which."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fs_fwdllm.config import parse_config
from fs_fwdllm.config.keys import schema_keys
from fs_fwdllm.running.agreement import refusal_of, settings_of_work, settings_text
from fs_fwdllm.running.session import Session
from tests.host.fixtures import models, world
from tests.host.small import METHODS, World

__all__ = ["models", "world"]

#: What the server alone uses or sends with each piece of work, what may honestly differ between machines, and which
#: rows a client holds; a section stands for all that is in it.
MAY_DIFFER = (
    "outdir", "expname", "use_gpu", "device", "threads", "federate", "data", "llm.adapter.use", "model.type",
    "model.num_labels", "train.optimizer.lr", "train.train_strategy", "train.is_enable_half", "trainer", "eval",
    "early_stop", "wandb", "fwdllm.probes_per_batch", "fwdllm.weigh_by", "fwdllm.server_optimizer",
    "fwdllm.server_momentum", "fwdllm.server_betas", "fwdllm.server_epsilon", "fwdllm.first_rate",
    "fwdllm.rate_for_trainables", "fwdllm.gradient_checkpointing", "fwdllm.attention", "fwdllm.base_dtype",
    "fwdllm.prefix_cache_mib", "fwdllm.strategy_span", "fwdllm.max_failed_rounds", "fwdllm.deadline_s",
    "fwdllm.min_answers", "fwdllm.checkpoint_every", "fwdllm.first_evaluation", "fwdllm.saved_round",
    "fwdllm.init_adapter", "fwdllm.accept_changed_inputs", "fwdllm.check_saved", "fwdllm.tensorboard",
    "fwdllm.log_clients", "fwdllm.base", "fwdllm.robust", "fwdllm.gate", "fwdllm.step", "fwdllm.report",
    *(f"fwdllm.data.{name}" for name in (
        "text", "text_pair", "label", "encoding", "columns", "drop_empty_labels", "merge_labels", "stratify", "natural",
        "category", "test_file", "max_test_samples", "partition", "partition_method", "allow_overlap",
        "held_out_clients", "centralised",
    )),
)  # fmt: skip


def session_of(world: World, method: str = "mezo", **settings: Any) -> Session:
    world.texts()
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    return Session.open(parse_config(world.tree({**METHODS[method], **changed})))


def test_every_key_of_the_schema_is_decided_upon(world: World) -> None:
    compared = {name for method in ("mezo", "cybgd") for name in settings_of_work(session_of(world, method))}
    for key in schema_keys():
        if key.hosts != "every host" or key.name == "federate.method":
            continue
        free = any(key.name == name or key.name.startswith(f"{name}.") for name in MAY_DIFFER)
        assert (key.name in compared) != free, f"{key.name}: say in agreement.py or here whether it must agree"


DIFFERENT: dict[str, Any] = {
    "seed": 6, "llm.tok_len": 17, "dataloader.batch_size": 3, "train.local_update_steps": 3,
    "train.optimizer.weight_decay": 0.25, "fwdllm.estimator": "forward_mode", "fwdllm.probes": 3,
    "fwdllm.radius": 0.02, "fwdllm.radius_scale": "relative", "fwdllm.direction": "gaussian",
    "fwdllm.parts": [{"match": "*", "rate": 0.5}],
    "llm.adapter.args": [{"adapter_package": "peft", "adapter_method": "lora", "r": 3}],
    "federate.method": "fedfwd",
}  # fmt: skip


@pytest.mark.parametrize("key", DIFFERENT)
def test_another_value_is_refused_by_the_name_of_its_key(key: str, world: World) -> None:
    server = session_of(world, fwdllm__radius=0.01)
    client = session_of(world, **{"fwdllm.radius": 0.01, key: DIFFERENT[key]})
    refused = refusal_of(server, client.base_digest, settings_text(settings_of_work(client)))
    assert "it is configured for other work than the server's in " in refused and f"{key} (the server has " in refused
    assert refused.count("the server has") == 1, "nothing else differs"
    assert ("the server has another" in refused) == (key == "seed"), "which directions follow from"
    assert len(refused) < 400


def test_what_may_differ_is_not_compared(world: World) -> None:
    server = session_of(world, fwdllm__server_momentum=0.0, threads=1)
    client = session_of(
        world, threads=2, fwdllm__deadline_s=3.0, fwdllm__prefix_cache_mib=0, train__optimizer__lr=9.0,
        federate__total_round_num=77, eval__freq=3,
    )  # fmt: skip
    said = settings_text(settings_of_work(client))
    assert refusal_of(server, client.base_digest, said) == ""
    assert len(said) < 1500, "it travels with every join"


def test_a_basis_file_is_compared_by_what_is_in_it(world: World, tmp_path: Path) -> None:
    """It lies elsewhere on another machine."""
    session = session_of(world)
    places = [tmp_path / name for name in ("one.safetensors", "two.safetensors")]
    places[0].write_bytes(b"one basis")
    shutil.copy(places[0], places[1])
    texts = set()
    for place in places:
        session.loaded.arguments["basis"] = str(place)
        texts.add(settings_text(settings_of_work(session)))
    assert len(texts) == 1
    places[1].write_bytes(b"another basis")
    assert settings_text(settings_of_work(session)) not in texts


def test_who_says_nothing_or_nonsense_is_not_taken(world: World) -> None:
    server = session_of(world)
    own = settings_text(settings_of_work(server))
    for said in ("", "nonsense"):
        assert "it does not say how it is configured" in refusal_of(server, server.base_digest, said)
    for said in (own.replace(" ", "\n\x1b[31m:"), own + " no.such.key:abcdef"):
        refused = refusal_of(server, server.base_digest, said)
        assert "it is configured for other work" in refused and "\x1b" not in refused
    assert "no.such.key (unknown to the server, so that its package is of another version)" in refused
