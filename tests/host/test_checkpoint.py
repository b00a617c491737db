"""Checkpoints: read back whole or refused, whatever happened to the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fs_fwdllm.errors import CheckpointError, ConfigError
from fs_fwdllm.report import RunFolder
from fs_fwdllm.report.sinks import JsonLinesSink
from fs_fwdllm.running.checkpoint import (
    Checkpoint,
    config_fingerprint,
    prove_checkpoint,
    read_checkpoint,
    withdraw_checkpoint,
    write_checkpoint,
)
from fs_fwdllm.running.local import resume, run
from tests.host.small import METHODS, World, read_jsonl

STATE, PREVIOUS = "state.safetensors", "previous.safetensors"


def a_checkpoint(next_round: int) -> Checkpoint:
    return Checkpoint(
        next_round=next_round,
        tensors={
            "trainable.0": torch.arange(6, dtype=torch.float32).view(2, 3) * next_round,
            "optimizer.step.0": torch.tensor(3.0),
            "catch_up.1": torch.tensor([1, 2, 255], dtype=torch.uint8),
        },
        numbers={"failed_rounds": 0, "known_round": [[1, 2], [3, 4]]},
        counters={"seconds": 0.1 + 0.2, "upload_bytes": 10},
        fingerprint="f" * 32,
    )


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]) and tensor.dtype == other.tensors[name].dtype
    assert (one.next_round, one.numbers, one.counters, one.fingerprint) == (
        other.next_round, other.numbers, other.counters, other.fingerprint
    )  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for next_round in (1, 2):
        write_checkpoint(tmp_path / "checkpoint", a_checkpoint(next_round))
        assert_same(read_checkpoint(tmp_path / "checkpoint"), a_checkpoint(next_round))
    assert sorted(file.name for file in (tmp_path / "checkpoint").iterdir()) == [PREVIOUS, STATE]


@pytest.mark.parametrize("links", [True, False])
def test_the_one_before_the_last_good_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """One that nobody has looked at yet counts from when it is proven; a bad one never does."""
    if not links:
        monkeypatch.setattr(os, "link", _not_permitted)
    for next_round in (1, 2):
        write_checkpoint(tmp_path, a_checkpoint(next_round))
    write_checkpoint(tmp_path, a_checkpoint(3), proven=False)
    withdraw_checkpoint(tmp_path)
    write_checkpoint(tmp_path, a_checkpoint(4), proven=False)
    assert_same(read_checkpoint(tmp_path), a_checkpoint(4))
    prove_checkpoint(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [PREVIOUS, STATE]
    assert_same(read_checkpoint(tmp_path), a_checkpoint(4))
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=rf"{STATE}: damaged.*{PREVIOUS} .* goes on with round 3: remove the damaged"
    ):
        read_checkpoint(tmp_path)
    (tmp_path / STATE).unlink()
    assert_same(read_checkpoint(tmp_path), a_checkpoint(2))


def _not_permitted(*_: Any) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    write_checkpoint(tmp_path, a_checkpoint(1))

    def fail(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match=r"cannot be written \(.+\); the previous .* is intact"):
            write_checkpoint(tmp_path, a_checkpoint(2))
    assert [file.name for file in tmp_path.iterdir()] == [STATE]
    assert_same(read_checkpoint(tmp_path), a_checkpoint(1))


def test_a_folder_that_cannot_be_made_is_the_same_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_checkpoint(tmp_path / "file" / "checkpoint", a_checkpoint(1))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_while_writing_leaves_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    write_checkpoint(tmp_path, a_checkpoint(1))

    def interrupt(descriptor: int) -> None:
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(interruption):
            write_checkpoint(tmp_path, a_checkpoint(2))
    assert [file.name for file in tmp_path.iterdir()] == [STATE]
    assert_same(read_checkpoint(tmp_path), a_checkpoint(1))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_checkpoint(1))
    whole = (tmp_path / STATE).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / STATE).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged or not a checkpoint of ours"):
            read_checkpoint(tmp_path)


def test_no_flipped_bit_passes_for_another_checkpoint(tmp_path: Path) -> None:
    """Header, metadata or tensors: it is refused, or changed nothing (white space, say)."""
    write_checkpoint(tmp_path, a_checkpoint(1))
    whole = (tmp_path / STATE).read_bytes()
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (tmp_path / STATE).write_bytes(damaged)
        try:
            found = read_checkpoint(tmp_path)
        except CheckpointError:
            refused += 1
        else:
            assert_same(found, a_checkpoint(1))
    assert refused > 0.9 * len(whole)


@pytest.mark.parametrize("metadata", [None, {"other": "1"}, {"fs_fwdllm": "{"}, {"fs_fwdllm": "[1]"}])
def test_somebody_elses_file_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / STATE, metadata=metadata)
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint of ours"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(100), bytes(64)])
def test_bytes_of_any_kind_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path)


def test_a_fingerprint_is_of_what_determines_the_result(world: World) -> None:
    config = world.config(METHODS["mezo"])
    assert config_fingerprint(world.config({**METHODS["mezo"], "outdir": "x", "expname": "y"})) == config_fingerprint(
        config
    )
    for change in ({"seed": 6}, {"train.optimizer.lr": 0.051}, {"federate.total_round_num": 6}, {"fwdllm.probes": 3}):
        assert config_fingerprint(world.config({**METHODS["mezo"], **change})) != config_fingerprint(config)


class TestResumeRefuses:
    """A resumed run starts from exactly what it left, or not at all."""

    @pytest.fixture
    def path(self, world: World) -> Path:
        return run(world.config({**METHODS["forward_gradient"], "federate.total_round_num": 2}))

    def refused(self, path: Path, message: str, error: type[Exception] = CheckpointError) -> None:
        metrics = RunFolder(path).metrics_path
        before = metrics.read_bytes() if metrics.exists() else b""
        with pytest.raises(error, match=message):
            resume(path)
        assert (metrics.read_bytes() if metrics.exists() else b"") == before

    def test_a_folder_that_is_not_there(self, world: World) -> None:
        self.refused(world.root / "nowhere", "there is no such run folder")

    def test_a_folder_that_is_not_a_run(self, world: World) -> None:
        self.refused(world.root, "is not a run folder")

    def test_a_run_without_a_checkpoint(self, path: Path) -> None:
        shutil.rmtree(RunFolder(path).checkpoint_path)
        self.refused(path, "no checkpoint there; a run writes one after its first round")

    def test_a_truncated_checkpoint(self, path: Path) -> None:
        state = RunFolder(path).checkpoint_path / STATE
        state.write_bytes(state.read_bytes()[:-10])
        self.refused(path, "damaged")

    def test_a_changed_configuration(self, path: Path) -> None:
        config = RunFolder(path).config_path
        config.write_text(config.read_text().replace("lr: 0.05", "lr: 0.06"))
        self.refused(path, r"config.yaml: was changed after the checkpoint was written")

    def test_a_damaged_configuration(self, path: Path) -> None:
        config = RunFolder(path).config_path
        config.write_text(config.read_text() + "\nnonsense: 1\n")
        self.refused(path, "nonsense: unknown key", ConfigError)

    def test_the_checkpoint_of_another_run(self, path: Path, world: World) -> None:
        settings = {**METHODS["forward_gradient"], "federate.total_round_num": 2, "seed": 77}
        other = run(world.config(settings))
        shutil.copy(RunFolder(other).checkpoint_path / STATE, RunFolder(path).checkpoint_path / STATE)
        self.refused(path, "was changed")


def test_a_disk_that_fills_up_costs_no_round_that_was_saved(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops with an error that names the file; with room again it goes on to the same end."""
    config = world.config(METHODS["forward_gradient"])
    whole = run(config)
    original, written = os.replace, []

    def fill_up(source: Any, target: Any) -> None:
        if Path(target).name == STATE:
            written.append(target)
            if len(written) > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fill_up)
        with pytest.raises(CheckpointError, match=rf"{STATE}: cannot be written \(No space left on device\)"):
            run(config)
    path = Path(config.outdir) / "small-2"
    assert read_checkpoint(RunFolder(path).checkpoint_path).next_round == 3, "whole, only not yet in its place"
    assert resume(path) == path
    assert read_jsonl(path / "metrics.jsonl")[-1]["digest"] == read_jsonl(whole / "metrics.jsonl")[-1]["digest"]


def test_a_full_disk_for_the_metrics_is_named_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config(METHODS["forward_gradient"])
    original, lines = JsonLinesSink.write, []

    def fill_up(self: JsonLinesSink, line: Any) -> None:
        lines.append(line)
        if len(lines) == 4:
            self.file.close()
            self.file = open("/dev/full", "w")  # noqa: SIM115 - the sink closes it
        original(self, line)

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with monkeypatch.context() as patch:
        patch.setattr(JsonLinesSink, "write", fill_up)
        with pytest.raises(CheckpointError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
            run(config)
    path = Path(config.outdir) / "small"
    whole = run(config)
    resume(path)
    assert read_jsonl(path / "metrics.jsonl")[-1]["digest"] == read_jsonl(whole / "metrics.jsonl")[-1]["digest"]
    assert json.loads((path / "metrics.jsonl").read_text().splitlines()[0])["round"] == 0


def _a_row_more(world: World) -> None:
    with (world.root / "texts.jsonl").open("a") as file:
        file.write('{"text": "w3 w4 w5", "label": "animal"}\n')


def _another_class(world: World) -> None:
    path = world.root / "texts.jsonl"
    path.write_text(path.read_text().replace('"stone"', '"rock"'))


def _other_weights(world: World) -> None:
    for path in (world.root / "model").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x07")


def _a_bit_in_the_middle(world: World) -> None:
    for path in (world.root / "model").glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))


CHANGES = {
    "the training rows": _a_row_more,
    "the classes": _another_class,
    "the model's files": _other_weights,
    "the model's weights": _a_bit_in_the_middle,
}


@pytest.mark.parametrize("named", CHANGES)
def test_a_run_does_not_go_on_with_other_data_or_another_model_unless_told(named: str, world: World) -> None:
    shutil.copytree(world.model("bert"), world.root / "model")
    settings = {**METHODS["forward_gradient"], "federate.total_round_num": 2}
    path = run(world.config({**settings, "model.type": f"{world.root / 'model'}@transformers"}))
    lines = (path / "metrics.jsonl").read_text().splitlines()
    CHANGES[named](world)
    with pytest.raises(CheckpointError, match=rf"{named}.* changed after.*fwdllm.accept_changed_inputs"):
        resume(path)
    assert (path / "metrics.jsonl").read_text().splitlines() == lines
    accepted = (path / "config.yaml").read_text().replace("accept_changed_inputs: false", "accept_changed_inputs: true")
    (path / "config.yaml").write_text(accepted)
    assert resume(path) == path
