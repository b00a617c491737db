"""How long a run *would* take on a device nobody measured it on: a stated model, never mixed with what was measured.

A round is as long as its slowest client. A client works through its forward and backward passes at the device's seconds
a pass, then its bytes go over the network:

    round_s = forward_passes / clients * forward_pass_s + backward_passes / clients * backward_pass_s
              + max over clients (8e-6 upload_bytes / upload_mbit_per_s + 8e-6 download_bytes / download_mbit_per_s)

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

__all__ = ["DEVICES_FILE", "Device", "DeviceModel", "Network", "modelled_seconds", "read_device_model"]

#: The constants that come with the package.
DEVICES_FILE = Path(__file__).with_name("devices.yaml")

_BITS_PER_BYTE = 8


class Network(Section):
    upload_mbit_per_s: float = Field(gt=0)
    download_mbit_per_s: float = Field(gt=0)


class Device(Section):
    forward_pass_s: float = Field(gt=0)
    backward_pass_s: float | None = Field(None, gt=0)


class DeviceModel(Section):
    """The constants of a model: one network, and devices by name."""

    network: Network
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
    sections: dict[str, type[Section]] = {"network": Network, "devices": Device}
    known = [*sections.get(parents[0] if parents else "", DeviceModel).model_fields]
    allowed = f"; allowed are {', '.join(known)}{nearest(name, known)}" if item["type"] == "extra_forbidden" else ""
    return f"--devices {path}: {'.'.join([*parents, name])}: {item['msg']}, but the value is {item['input']!r}{allowed}"


@dataclass(frozen=True)
class _Totals:
    forward_passes: float = 0.0
    backward_passes: float = 0.0


def modelled_seconds(record: RunRecord, device: Device, network: Network) -> list[float] | None:
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
            forward = (after.forward_passes - before.forward_passes) * device.forward_pass_s
            backward = (after.backward_passes - before.backward_passes) * (device.backward_pass_s or 0.0)
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
