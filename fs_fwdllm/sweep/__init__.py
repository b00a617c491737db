"""Which value is best? A small grid, judged on validation rows, with several seeds.

A learning rate that suits one model, method or number of trainable parameters does not suit another, and a comparison
of methods is worth little where only one of them had its rate chosen. A sweep does for all of them the same:

:mod:`~fs_fwdllm.sweep.grid`     the points: from words (``train.optimizer.lr 0.1 0.3 1``) to configurations
:mod:`~fs_fwdllm.sweep.run`      every point is a run in a folder of its own; what is finished is not run again
:mod:`~fs_fwdllm.sweep.choose`   mean and spread over seeds, the best, and how sure that is
:mod:`~fs_fwdllm.sweep.result`   the table, ``sweep.csv`` and ``best.yaml``

Test rows take no part. Where a configuration has no validation rows, some training rows are held out for the sweep
alone: the test rows are the same as in the run that follows, which trains on all training rows again.
"""

from fs_fwdllm.sweep.choose import Setting, best_of, row_noise, settings_of, warnings_of
from fs_fwdllm.sweep.grid import Grid, Point, parse_grid
from fs_fwdllm.sweep.run import Outcome, run_sweep

__all__ = [
    "Grid",
    "Outcome",
    "Point",
    "Setting",
    "best_of",
    "parse_grid",
    "row_noise",
    "run_sweep",
    "settings_of",
    "warnings_of",
]
