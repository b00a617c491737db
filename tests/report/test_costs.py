"""Costs: measured numbers are the run's own, modelled seconds follow the stated formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.report import DEVICES_FILE, RunFolder, RunRecord, analyse_costs, read_device_model
from fs_fwdllm.report.device_model import Device, DeviceModel, MeasuredOn, Network, modelled_seconds, pass_cost
from tests.report.conftest import make_line
from tests.report.test_pictures import backprop, png_size_px, rows

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
    report = analyse_costs(runs, MODEL, tmp_path / "costs.png", target=0.54)
    assert png_size_px(report.picture) == (1600, 1000)
    forward, back = rows(report.measured).values()
    assert (forward["up"], back["up"]) == ("50 B", "488.3 KiB")
    assert (forward["forward"], forward["backward"], back["forward"], back["backward"]) == ("96", "0", "48", "48")
    whole, to_target = (list(rows(table).values()) for table in report.modelled)
    assert [run["phone"] for run in whole] == ["1 min 39 s", "-"]
    assert [run["forward"] for run in to_target] == ["64", "32"]  # round 4 is the first with 0.54
    assert [run["phone"] for run in to_target] == ["1 min 06 s", "-"]
    assert to_target[1]["board"] != "-"


def test_a_target_that_is_never_reached_is_a_dash(write_run: Callable[..., RunFolder], tmp_path: Path) -> None:
    report = analyse_costs([write_run(4).path], MODEL, tmp_path / "costs.png", target=0.99)
    assert rows(report.modelled[1])["small"]["phone"] == "-"


def test_a_loss_is_reached_from_above(write_run: Callable[..., RunFolder], tmp_path: Path) -> None:
    def line(number: int) -> dict:
        return make_line(number, eval={"loss": 1.0 / number})

    report = analyse_costs([write_run(4, line=line).path], MODEL, tmp_path / "costs.png", target=0.5)
    assert rows(report.modelled[1])["small"]["forward"] == "32"


def with_arithmetic(**facts: float) -> Callable[[int], dict]:
    """Lines whose first one notes what a pass costs."""

    def line(number: int) -> dict:
        return make_line(number) | ({"model": facts} if number == 1 else {})

    return line


REFERENCE = DeviceModel(
    network=NETWORK, devices={"phone": PHONE}, measured_on=MeasuredOn(name="a model", forward_gflop=10.0)
)


def test_another_models_pass_takes_as_much_longer_as_it_computes_more(write_run: Callable[..., RunFolder]) -> None:
    facts = {"forward_flops": 25e9, "kept_flops": 0, "passes_per_step": 16}
    record = RunRecord.load(write_run(3, finished=False, line=with_arithmetic(**facts)).path)
    cost = pass_cost(record, REFERENCE)
    assert cost is not None and cost.forward == pytest.approx(2.5) and "2.5 times" in cost.rule
    alone = modelled_seconds(record, PHONE, NETWORK)
    scaled = modelled_seconds(record, PHONE, NETWORK, cost)
    assert alone is not None and scaled is not None
    network_s = alone[0] - 16
    assert scaled[0] - network_s == pytest.approx(2.5 * 16)


def test_what_is_kept_below_the_trained_layers_is_charged_once_a_step(write_run: Callable[..., RunFolder]) -> None:
    """Sixteen passes of which nine tenths are kept: one tenth each, and nine tenths once."""
    facts = {"forward_flops": 10e9, "kept_flops": 9e9, "passes_per_step": 16}
    cost = pass_cost(RunRecord.load(write_run(3, finished=False, line=with_arithmetic(**facts)).path), REFERENCE)
    assert cost is not None and 16 * cost.forward == pytest.approx(16 * 0.1 + 0.9)
    assert cost.backward == pytest.approx(0.1) and "90% of it is kept" in cost.rule


def test_constants_of_another_model_say_nothing_about_a_run_that_noted_nothing(
    write_run: Callable[..., RunFolder], tmp_path: Path
) -> None:
    report = analyse_costs([write_run(3, finished=False).path], REFERENCE, tmp_path / "costs.png")
    assert rows(report.modelled[0])["small"]["phone"] == "-"
    assert "are for a model" in report.remarks[0] and "no time is modelled" in report.remarks[1]


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
    with pytest.raises(ConfigError, match="none is given"):
        analyse_costs([], MODEL, tmp_path / "costs.png")


def test_there_are_as_many_runs_as_colours(write_run: Callable[..., RunFolder], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes 1 to 8 run folders, but 9"):
        analyse_costs([write_run(1, finished=False).path] * 9, MODEL, tmp_path / "costs.png")
