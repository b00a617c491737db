"""What evaluations cost beside training, in rows that go through the model.

An evaluation is a forward pass over every row of a split. Beside a step of a few rows that can be most of a run: on a
large model the test rows alone may take an hour before the first round begins. So the model before training is
evaluated where that is a small part of the run (or where it is asked for, ``fwdllm.first_evaluation``), and a run whose
evaluations take longer than its training says so. Counted are passes; what a prefix cache spares is not looked at.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from fs_fwdllm.config import Config
from fs_fwdllm.method.parts import passes_of_client, work_plans
from fs_fwdllm.running.sampling import clients_asked

__all__ = ["evaluates_first", "remark_on_evaluations", "rows_of_training"]

#: Of all that training takes, what the first evaluation may be without being asked for.
_SMALL_SHARE = 0.1


def rows_of_training(config: Config, client_samples: Mapping[int, int]) -> float:
    """Rows that all clients and rounds take through the model, about; one more for every point of a probe, two more for
    a backward pass.

    Args:
        client_samples: each client's training samples, counted; none leaves nothing to do.
    """
    if not client_samples:
        return 0.0
    passes = [
        passes_of_client(config, client, plan.steps)
        for client, plan in work_plans(config, dict(client_samples)).items()
    ]
    a_client = statistics.fmean(one.in_forwards for one in passes)
    asked = clients_asked(config, len(client_samples))
    return config.federate.total_round_num * asked * a_client * config.dataloader.batch_size


def evaluates_first(config: Config, client_samples: Mapping[int, int], rows: int) -> bool:
    """Whether to evaluate before the first round.

    Args:
        rows: of an evaluation.
    """
    wanted = config.fwdllm.first_evaluation
    if wanted != "auto":
        return wanted == "always"
    return rows <= _SMALL_SHARE * rows_of_training(config, client_samples)


def remark_on_evaluations(config: Config, client_samples: Mapping[int, int], rows: int) -> str | None:
    """A warning if all evaluations together take more than training does."""
    rounds, every = config.federate.total_round_num, config.eval.freq
    count = (-(-rounds // every) if every > 0 else 1) + evaluates_first(config, client_samples, rows)
    trained = rows_of_training(config, client_samples)
    if not trained or count * rows <= trained:
        return None
    return (
        f"warning: {count} evaluations of {rows:,} rows take {count * rows / trained:.2g} times what training takes; "
        "raise eval.freq, or set fwdllm.data.max_test_samples"
    )
