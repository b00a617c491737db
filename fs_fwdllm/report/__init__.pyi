from .compare import compare_runs, summary_table
from .cost import analyse_costs
from .device_model import DEVICES_FILE, read_device_model
from .folder import RunFolder
from .plot import plot_run
from .record import RunRecord
from .reporter import RunReporter
from .traffic import TrafficRow

__all__ = [
    "DEVICES_FILE",
    "RunFolder",
    "RunRecord",
    "RunReporter",
    "TrafficRow",
    "analyse_costs",
    "compare_runs",
    "plot_run",
    "read_device_model",
    "summary_table",
]
