"""Registries that a configuration chooses from, beside the table of methods: estimators, and sections of extensions.

Members are named here and live where they belong; a name is known without importing what it stands for.
"""

from __future__ import annotations

from typing import Any

from fs_fwdllm.core.registry import Registry

__all__ = ["ESTIMATORS", "EXTENSIONS"]

#: Classes of :class:`fs_fwdllm.estimator.Estimator` by the word of ``fwdllm.estimator``. A class carries its own facts.
ESTIMATORS: Registry[Any] = Registry(
    "fwdllm.estimator",
    "fs_fwdllm.estimators",
    {
        "central": "fs_fwdllm.estimator.differences:CentralDifference",
        "one_sided": "fs_fwdllm.estimator.differences:OneSidedDifference",
        "forward_mode": "fs_fwdllm.estimator.forward_mode:ForwardMode",
        "closed_form": "fs_fwdllm.estimator.closed_form:ClosedForm",
        "projected": "fs_fwdllm.estimator.exact:Projected",
    },
    kind="fs_fwdllm.estimator.base:Estimator",
)

#: Sections ``fwdllm.ext.NAME`` of other packages: subclasses of :class:`fs_fwdllm.config.schema.Section`.
EXTENSIONS: Registry[Any] = Registry("fwdllm.ext", "fs_fwdllm.settings", {}, kind="fs_fwdllm.config.schema:Section")
