"""What a user should know about how the rounds go, said when it shows and not once a round."""

from __future__ import annotations

import math
from collections.abc import Callable

from fs_fwdllm.config import Config
from fs_fwdllm.method import RoundReport

__all__ = ["Watch"]

#: Above this share of zero slopes the run learns little, and says so.
_TOO_MANY_ZEROS = 0.5
#: A training loss of more than this times the first one, and a nat, is not the mini-batches' noise.
_EXPLODED = 2.0
#: An evaluation loss of more than this times the first one is no noise of a start any more.
_FAR_WORSE = 1.2
#: An update of so many times the usual length is no mini-batch's whim.
_ABSURD = 20.0


class Watch:
    """Looks at rounds and says each thing once.

    Args:
        config: of the run.
        say: prints a remark about it.
    """

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._told_zeros = self._told_divergence = False
        self._told_clients: set[int] = set()
        self._first_loss: tuple[int, float] | None = None

    def round(self, report: RoundReport) -> None:
        """Look at a round that was closed."""
        self._look_at_loss(report)
        self._look_at_slopes(report)
        self._look_at_clients(report)

    def evaluation(self, round_number: int, loss: float, start: float) -> None:
        """Look at an evaluation loss beside the first one."""
        if self._told_divergence or loss <= _FAR_WORSE * start:
            return
        self._told_divergence = True
        self._say(
            f"warning: round {round_number}: the evaluation loss is {loss:.4g}, and was {start:.4g} at the first "
            f"evaluation: training diverges; lower train.optimizer.lr (it is {self._config.train.optimizer.lr:g})"
        )

    def _look_at_loss(self, report: RoundReport) -> None:
        loss = report.typical_loss
        if not report.losses or self._told_divergence:
            return
        if self._first_loss is None:
            self._first_loss = report.round_index + 1, loss
        first_round, first_loss = self._first_loss
        if math.isfinite(loss) and loss <= _EXPLODED * first_loss + 1:
            return
        self._told_divergence, rate = True, self._config.train.optimizer.lr
        self._say(
            f"warning: round {report.round_index + 1}: the training loss is {loss:.4g} (median of the clients), and "
            f"was {first_loss:.4g} in round {first_round}: training diverges; lower train.optimizer.lr (it is {rate:g})"
        )

    def _look_at_slopes(self, report: RoundReport) -> None:
        if report.zero_share <= _TOO_MANY_ZEROS or not self._config.method.measures_slopes or self._told_zeros:
            return
        self._told_zeros = True
        self._say(
            f"warning: {report.zero_share:.0%} of the slopes are exactly zero: fwdllm.radius "
            f"{self._config.fwdllm.radius} is below what the losses resolve; raise it (about 0.01 over a bfloat16 "
            "base), or use fwdllm.estimator: forward_mode"
        )

    def _look_at_clients(self, report: RoundReport) -> None:
        for client, factor in report.clipped.items():
            if factor * _ABSURD < 1.0 and client not in self._told_clients:
                self._told_clients.add(client)
                self._say(
                    f"warning: round {report.round_index + 1}: client {client}'s update was {1 / factor:.3g} times as "
                    "long as is usual and was shortened to that (fwdllm.robust.clip); if this goes on, leave it out"
                )
        for client, samples in report.capped.items():
            if client not in self._told_clients:
                self._told_clients.add(client)
                self._say(
                    f"warning: round {report.round_index + 1}: client {client} reports {samples:,} samples, more than "
                    "is believed (fwdllm.robust.samples)"
                )
