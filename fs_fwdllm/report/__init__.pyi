from .compare import Comparison, compare_runs
from .cost import CostReport, analyse_costs
from .device_model import DEVICES_FILE, read_device_model
from .folder import RunFolder
from .plot import plot_run
from .record import RunRecord
from .reporter import RunReporter
from .summary import summary_table
from .traffic import TrafficRow

__all__ = [
    "DEVICES_FILE",
    "Comparison",
    "CostReport",
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
