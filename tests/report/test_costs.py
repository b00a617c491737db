"""Costs: measured numbers are the run's own, modelled seconds follow the stated formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.report import DEVICES_FILE, RunFolder, RunRecord, analyse_costs, read_device_model
from fs_fwdllm.report.device_model import Device, DeviceModel, Network, modelled_seconds
from tests.report.conftest import make_line
from tests.report.test_pictures import backprop, cells, png_size_px

NETWORK = Network(upload_mbit_per_s=0.001, download_mbit_per_s=0.01)
PHONE = Device(forward_pass_s=2.0)
BOARD = Device(forward_pass_s=3.0, backward_pass_s=5.0)
MODEL = DeviceModel(network=NETWORK, devices={"phone": PHONE, "board": BOARD})


def test_seconds_follow_the_formula(write_run: Callable[..., RunFolder]) -> None:
    """Two clients, 16 passes a round, 50 bytes up at 1 kbit/s and 150 down at 10 kbit/s: 16 + 0.4 + 0.12 seconds."""
    record = RunRecord.load(write_run(3).path)
    assert modelled_seconds(record, PHONE, NETWORK) == pytest.approx([16.52, 33.04, 49.56])


def test_a_round_that_nobody_answered_takes_no_modelled_time(write_run: Callable[..., RunFolder]) -> None:
    folder = write_run(3)
    rows = folder.traffic_path.read_text(encoding="utf-8")
    folder.traffic_path.write_text(rows.replace("2,1,150,50", "2,1,150,0").replace("2,2,150,50", "2,2,150,0"))
    seconds = modelled_seconds(RunRecord.load(folder.path), PHONE, NETWORK)
    assert seconds is not None and seconds[1] == seconds[0] and seconds[2] > seconds[1]


def test_a_device_that_cannot_backpropagate_has_no_time_for_it(write_run: Callable[..., RunFolder]) -> None:
    record = RunRecord.load(write_run(2, line=backprop).path)
    assert modelled_seconds(record, PHONE, NETWORK) is None
    assert modelled_seconds(record, BOARD, NETWORK) == pytest.approx([32.52, 65.04])  # 4 x (3 + 5) + the network


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_slower_device_on_a_slower_network_takes_that_much_longer(
    write_run: Callable[..., RunFolder], factor: float
) -> None:
    record = RunRecord.load(write_run(4, line=backprop).path)
    slow = Device(forward_pass_s=3.0 * factor, backward_pass_s=5.0 * factor)
    network = Network(upload_mbit_per_s=0.001 / factor, download_mbit_per_s=0.01 / factor)
    before, after = modelled_seconds(record, BOARD, NETWORK), modelled_seconds(record, slow, network)
    assert before is not None and after == pytest.approx([factor * seconds for seconds in before])


def test_table_and_picture(write_run: Callable[..., RunFolder], tmp_path: Path) -> None:
    runs = [write_run(6).path, write_run(6, line=backprop).path]
    picture, table = analyse_costs(runs, MODEL, tmp_path / "costs.png", target=0.54)
    assert png_size_px(picture) == (1860, 920)
    shown = cells(table)
    assert shown["upload a client and round"] == ["50 B", "488.3 KiB"]
    assert shown["forward passes"] == ["96", "48"] and shown["backward passes"] == ["0", "48"]
    assert shown["time on phone (model)"] == ["1 min 39 s", "-"]
    assert shown["forward passes to 0.5400"] == ["64", "32"]  # round 4 is the first with 0.54
    assert shown["time to 0.5400 on phone (model)"] == ["1 min 06 s", "-"]
    assert shown["time to 0.5400 on board (model)"][1] != "-"


def test_a_target_that_is_never_reached_is_a_dash(write_run: Callable[..., RunFolder], tmp_path: Path) -> None:
    _, table = analyse_costs([write_run(4).path], MODEL, tmp_path / "costs.png", target=0.99)
    assert cells(table)["time to 0.9900 on phone (model)"] == ["-"]


def test_a_loss_is_reached_from_above(write_run: Callable[..., RunFolder], tmp_path: Path) -> None:
    def line(number: int) -> dict:
        return make_line(number, eval={"loss": 1.0 / number})

    _, table = analyse_costs([write_run(4, line=line).path], MODEL, tmp_path / "costs.png", target=0.5)
    assert cells(table)["forward passes to 0.5000"] == ["32"]


def test_the_constants_that_come_along_are_readable() -> None:
    model = read_device_model(DEVICES_FILE)
    assert model.devices["phone NPU"].backward_pass_s is None and len(model.devices) == 4


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("network: {upload_mbit_per_s: 1, download_mbit_per_s: 1}\n", ("devices", "required")),
        (
            "network: {upload_mbit_per_s: 0, download_mbit_per_s: 1}\ndevices: {a: {forward_pass_s: 1}}\n",
            ("network.upload_mbit_per_s", "greater than 0", "0"),
        ),
        (
            "network: {upload_mbit_per_s: 1, download_mbit_per_s: 1}\ndevices: {a: {forward_pas_s: 1}}\n",
            ("devices.a.forward_pas_s", "allowed are forward_pass_s", "did you mean 'forward_pass_s'"),
        ),
        ("[]", ("must be a mapping",)),
    ],
)
def test_mistakes_in_the_constants_are_named(tmp_path: Path, text: str, fragments: tuple[str, ...]) -> None:
    path = tmp_path / "devices.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        read_device_model(path)
    assert all(fragment in str(refused.value) for fragment in (str(path), *fragments))


def test_there_must_be_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes 1 to 8 run folders, but 0"):
        analyse_costs([], MODEL, tmp_path / "costs.png")
