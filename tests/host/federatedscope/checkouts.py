"""Where the FederatedScope checkouts are, and a last line that says in capitals what did not run for want of one.

A skipped case is easily overlooked among a thousand that passed, and these carry the promise that both hosts give the
same bits. So :class:`MissingCheckouts` counts them, and prints one line after everything else that pytest prints. It
never changes the outcome: a machine without a checkout may run the rest.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

__all__ = ["NOTICE_FILE", "MissingCheckouts", "find_checkout"]

_DEFAULT = Path("~/.cache/fs_fwdllm").expanduser()
#: Where a checkout is looked for: the variable that names it, else its place below ``_DEFAULT``; and its branch.
_CHECKOUTS = {"FEDERATEDSCOPE_HOME": ("FederatedScope", "llm"), "FEDMEZO_HOME": ("FedMeZO", "FedMeZO")}
_ABSENT = "no FederatedScope checkout"
#: The file that this variable names is given the line, too; scripts/test repeats it at its very end.
NOTICE_FILE = "FS_FWDLLM_NOTICE_FILE"


def find_checkout(variable: str) -> Path:
    """The checkout that ``variable`` names, or the default one. Skips the test where there is none."""
    name, branch = _CHECKOUTS[variable]
    home = Path(os.environ.get(variable, _DEFAULT / name))
    if not (home / "federatedscope" / "register.py").is_file():
        pytest.skip(
            f"{_ABSENT} (branch {branch}) at {home}; set {variable}, or: git clone --branch {branch} "
            f"https://github.com/alibaba/FederatedScope {_DEFAULT / name}"
        )
    return home


class MissingCheckouts:
    """A pytest plugin that counts the cases that :func:`find_checkout` skipped; with xdist, in the controller."""

    def __init__(self) -> None:
        self._skipped: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
        for variable in _CHECKOUTS:
            if _ABSENT in reason and f"set {variable}," in reason:
                self._skipped[variable] = self._skipped.get(variable, 0) + 1

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self, config: pytest.Config) -> None:
        if not self._skipped or hasattr(config, "workerinput"):
            return
        ways = " AND ".join(f"{variable} TO A CLONE OF BRANCH {_CHECKOUTS[variable][1]}" for variable in self._skipped)
        line = (
            f"{sum(self._skipped.values())} FEDERATEDSCOPE CASES DID NOT RUN, SINCE NO CHECKOUT WAS FOUND: SET {ways} "
            "OF github.com/alibaba/FederatedScope"
        )
        print(line, flush=True)
        if os.environ.get(NOTICE_FILE):
            Path(os.environ[NOTICE_FILE]).write_text(f"{line}\n", encoding="utf-8")
