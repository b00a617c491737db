from .batches import client_batches, collate, evaluation_batches, steps_per_epoch, visited_samples
from .federated import load_federated_data
from .types import IGNORED_LABEL, Batch, ClientData, Example, FederatedData, Reference, Task

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "ClientData",
    "Example",
    "FederatedData",
    "Reference",
    "Task",
    "client_batches",
    "collate",
    "evaluation_batches",
    "load_federated_data",
    "steps_per_epoch",
    "visited_samples",
]
