"""What a run costs, measured: bytes on frames, passes, seconds, peak memory."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from fs_fwdllm.core.wire import ByteLedger
from fs_fwdllm.method.server import RoundReport
from fs_fwdllm.report import TrafficRow

__all__ = ["Accounting"]


@dataclass
class Accounting:
    """Cumulative counters of one run; :meth:`counters` and :meth:`restore` carry them through a checkpoint."""

    device: torch.device
    ledger: ByteLedger = field(default_factory=ByteLedger)
    forward_passes: int = 0
    backward_passes: int = 0
    _seconds_before: float = 0.0
    _most_rss_mib: float = 0.0
    _most_device_mib: float = 0.0
    _started: float = field(default_factory=time.perf_counter)

    def close_round(self, report: RoundReport) -> list[TrafficRow]:
        """Count a round's passes and return its traffic, one row a client."""
        self.forward_passes += report.forward_passes
        self.backward_passes += report.backward_passes
        number = report.round_index + 1
        return [
            TrafficRow(round=number, client=client, download_bytes=down, upload_bytes=up)
            for client, (down, up) in self.ledger.close_round().items()
        ]

    def seconds(self) -> float:
        """Seconds of work since the start of the run, interruptions left out."""
        return self._seconds_before + time.perf_counter() - self._started

    def columns(self) -> dict[str, object]:
        """The accounting part of a metrics line."""
        device_mib = self._peak_device_mib()
        return {
            "seconds": round(self.seconds(), 3),
            "upload_bytes": self.ledger.upload_bytes,
            "download_bytes": self.ledger.download_bytes,
            "forward_passes": self.forward_passes,
            "backward_passes": self.backward_passes,
            "peak_rss_mib": round(self._peak_rss_mib(), 1),
            "peak_device_mib": round(device_mib, 1) if device_mib else None,
        }

    def _peak_rss_mib(self) -> float:
        """The most that any of the run's processes has used so far: a resumed run has had more than one.

        What was seen is kept, since the kernel's own highest mark is approximate and can be read a little lower later.
        """
        self._most_rss_mib = max(self._most_rss_mib, peak_rss_mib())
        return self._most_rss_mib

    def _peak_device_mib(self) -> float:
        cuda = self.device.type == "cuda"
        now_mib = torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else 0.0
        self._most_device_mib = max(self._most_device_mib, now_mib)
        return self._most_device_mib

    def counters(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {
            "seconds": self.seconds(),
            "upload_bytes": self.ledger.upload_bytes,
            "download_bytes": self.ledger.download_bytes,
            "forward_passes": self.forward_passes,
            "backward_passes": self.backward_passes,
            "peak_rss_mib": self._peak_rss_mib(),
            "peak_device_mib": self._peak_device_mib(),
        }

    def restore(self, counters: dict[str, float]) -> None:
        """Continue from :meth:`counters`."""
        self._seconds_before = counters["seconds"]
        self._most_rss_mib = counters["peak_rss_mib"]
        self._most_device_mib = counters["peak_device_mib"]
        self._started = time.perf_counter()
        self.ledger.upload_bytes = int(counters["upload_bytes"])
        self.ledger.download_bytes = int(counters["download_bytes"])
        self.forward_passes = int(counters["forward_passes"])
        self.backward_passes = int(counters["backward_passes"])


def peak_rss_mib() -> float:
    """Highest resident memory of this process so far, in MiB.

    On Linux from the process's own status: ``getrusage`` counts, for a child, what its parent held when it was started.
    """
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
