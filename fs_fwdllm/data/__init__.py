"""Data: from a file and a configuration to tokenised examples on numbered clients, and from those to batches.

======================================  ================================================================
:mod:`~fs_fwdllm.data.federated`        the whole way, :func:`load_federated_data`
:mod:`~fs_fwdllm.data.readers`          what ``data.type`` means, and which fields a row has
:mod:`~fs_fwdllm.data.files`            JSON, JSON lines, CSV, TSV
:mod:`~fs_fwdllm.data.docstrings`       the data set every installation has
:mod:`~fs_fwdllm.data.templates`        prompts, label masks, tokens
:mod:`~fs_fwdllm.data.splitters`        who holds which rows
:mod:`~fs_fwdllm.data.batches`          padded batches as a pure function of (examples, client, round)
:mod:`~fs_fwdllm.data.seeding`          random numbers named by their purpose
======================================  ================================================================
"""

from fs_fwdllm.data.batches import client_batches, collate, evaluation_batches, steps_per_epoch
from fs_fwdllm.data.federated import load_federated_data
from fs_fwdllm.data.seeding import seeded_generator, seeded_permutation
from fs_fwdllm.data.types import IGNORED_LABEL, Batch, ClientData, Example, FederatedData, Task

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "ClientData",
    "Example",
    "FederatedData",
    "Task",
    "client_batches",
    "collate",
    "evaluation_batches",
    "load_federated_data",
    "seeded_generator",
    "seeded_permutation",
    "steps_per_epoch",
]
