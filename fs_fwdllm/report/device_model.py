"""How long a run *would* take on a device nobody measured it on: a stated model, never mixed with what was measured.

A round is as long as its slowest client. A client works through its forward and backward passes at the device's seconds
a pass, then its bytes go over the network:

    round_s = forward_passes / clients * forward_pass_s + backward_passes / clients * backward_pass_s
              + max over clients (8e-6 upload_bytes / upload_mbit_per_s + 8e-6 download_bytes / download_mbit_per_s)

The constants are those of one model and batch, the file's section ``measured_on``. A pass of another model takes longer
in proportion to the arithmetic of one forward pass over one batch (floating-point operations, counted by the run on its
own first batch), a backward pass likewise. Layers below the lowest trained one, whose output the run keeps
(``fwdllm.prefix_cache_mib``), are charged once a step and not once a pass. Constants without ``measured_on`` are taken
as measured on the run's own model and are charged as they are. Where a run has not noted its arithmetic, no time is
modelled. By the constants that FwdLLM states for other models the rule is right within a factor of 1.7: for BERT-base
0.62 s on the phone NPU (stated 0.67), for RoBERTa-large 2.2 s (stated 1.34).

Passes and bytes are the run's own (``metrics.jsonl``, ``bytes.csv``); a round's passes are taken to be spread evenly
over the clients that took part. All clients are there and equally fast, the server takes no time, and nothing is lost
on the way: what FwdLLM's figures assume (ATC 2024), said aloud. A device without ``backward_pass_s`` cannot train by
backpropagation, so runs that do have no time on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fs_fwdllm.config.load import read_tree
from fs_fwdllm.config.schema import Section
from fs_fwdllm.errors import ConfigError, nearest
from fs_fwdllm.report.record import RunRecord
from fs_fwdllm.report.traffic import TrafficRow, read_traffic

__all__ = [
    "DEVICES_FILE", "Device", "DeviceModel", "MeasuredOn", "Network", "PassCost", "modelled_seconds", "pass_cost",
    "read_device_model",
]  # fmt: skip

#: The constants that come with the package.
DEVICES_FILE = Path(__file__).with_name("devices.yaml")

_BITS_PER_BYTE = 8


class Network(Section):
    upload_mbit_per_s: float = Field(gt=0)
    download_mbit_per_s: float = Field(gt=0)


class Device(Section):
    forward_pass_s: float = Field(gt=0)
    backward_pass_s: float | None = Field(None, gt=0)


class MeasuredOn(Section):
    """What the constants of the devices are for: a model, and the arithmetic of a forward pass over one batch."""

    name: str
    forward_gflop: float = Field(gt=0)


class DeviceModel(Section):
    """The constants of a model: one network, devices by name, and the model they were measured with."""

    network: Network
    measured_on: MeasuredOn | None = None
    devices: dict[str, Device] = Field(min_length=1)


def read_device_model(path: Path) -> DeviceModel:
    """Read the constants from a YAML file.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or out of range.
    """
    try:
        return DeviceModel.model_validate(read_tree(path, "--devices"))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, item) for item in error.errors())) from error


def _explain(path: Path, item: Any) -> str:
    *parents, name = (str(part) for part in item["loc"])
    sections: dict[str, type[Section]] = {"network": Network, "devices": Device, "measured_on": MeasuredOn}
    known = [*sections.get(parents[0] if parents else "", DeviceModel).model_fields]
    allowed = f"; allowed are {', '.join(known)}{nearest(name, known)}" if item["type"] == "extra_forbidden" else ""
    return f"--devices {path}: {'.'.join([*parents, name])}: {item['msg']}, but the value is {item['input']!r}{allowed}"


@dataclass(frozen=True)
class _Totals:
    forward_passes: float = 0.0
    backward_passes: float = 0.0


@dataclass(frozen=True)
class PassCost:
    """What a pass of a run costs, in passes that the constants are for.

    Attributes:
        forward, backward: of one pass; part of a forward pass may be shared by all passes of a step.
        rule: in words, how they were arrived at.
    """

    forward: float
    backward: float
    rule: str


def pass_cost(record: RunRecord, model: DeviceModel) -> PassCost | None:
    """How the constants are to be scaled for a run; ``None`` where the run did not note its arithmetic."""
    if model.measured_on is None:
        return PassCost(1.0, 1.0, "the devices' constants are taken as measured with this model and batch")
    facts = record.model_facts
    if not facts.get("forward_flops"):
        return None
    reference = model.measured_on.forward_gflop * 1e9
    whole, kept = facts["forward_flops"], facts["kept_flops"]
    forward = (whole - kept + kept / max(1, facts["passes_per_step"])) / reference
    text = f"a forward pass has {whole / 1e9:.3g} GFLOP, {whole / reference:.2g} times that of the constants"
    if kept:
        share = f"{kept / whole:.0%}" if kept < 0.995 * whole else "nearly all"
        text += f"; {share} of it is kept and charged once a step"
    return PassCost(forward, (whole - kept) / reference, text)


def modelled_seconds(
    record: RunRecord, device: Device, network: Network, cost: PassCost = PassCost(1.0, 1.0, "")
) -> list[float] | None:
    """Seconds since the start at the end of each round of the record; ``None`` where the device cannot do the work."""
    rows_of: dict[int, list[TrafficRow]] = {}
    for row in read_traffic(record.folder.traffic_path):
        rows_of.setdefault(row.round, []).append(row)
    seconds, before, ends = 0.0, _Totals(), []
    for line in record.rounds:
        after = _Totals(float(line.get("forward_passes") or 0), float(line.get("backward_passes") or 0))
        if after.backward_passes and device.backward_pass_s is None:
            return None
        rows = rows_of.get(int(line["round"]), [])
        clients = sum(row.upload_bytes > 0 for row in rows)
        if clients:
            forward = (after.forward_passes - before.forward_passes) * cost.forward * device.forward_pass_s
            backward = (after.backward_passes - before.backward_passes) * cost.backward * (device.backward_pass_s or 0)
            seconds += (forward + backward) / clients + _slowest_transfer_s(rows, network)
        ends.append(seconds)
        before = after
    return ends


def _slowest_transfer_s(rows: Sequence[TrafficRow], network: Network) -> float:
    return max(
        _BITS_PER_BYTE * 1e-6 * (row.upload_bytes / network.upload_mbit_per_s)
        + _BITS_PER_BYTE * 1e-6 * (row.download_bytes / network.download_mbit_per_s)
        for row in rows
    )
