"""What a user should know of the data before the first round: classes and their rows, clients and theirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from fs_fwdllm.data.types import Example, FederatedData

__all__ = ["data_remarks", "spread"]

#: Classes that one line lists with their rows.
_LISTED = 12


def data_remarks(data: FederatedData) -> list[str]:
    """One line a fact; what is probably not meant begins with ``warning``."""
    held = [client.train for client in data.clients.values()]
    remarks = [*data.remarks]
    if data.label_names:
        counts = [_counts(data.label_names, examples) for examples in (_all(held), data.test)]
        remarks.append(_classes(data.label_names, *counts))
        remarks += _absent(data.label_names, *counts)
    if data.task == "regression":
        remarks += _numbers(_all(held), data.test)
    remarks += _known_already(_all(held), data.test)
    if len(held) > 1:
        remarks.append(f"training rows of a client: {spread([len(examples) for examples in held])}")
    return remarks


def spread(sizes: Sequence[int]) -> str:
    """``3 to 40 (median 12)``, or the one size there is."""
    if min(sizes) == max(sizes):
        return f"{sizes[0]:,} each"
    return f"{min(sizes):,} to {max(sizes):,} (median {median(sizes):,g})"


def _all(parts: Iterable[Sequence[Example]]) -> list[Example]:
    return [example for part in parts for example in part]


def _numbers(train: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """The range of the numbers, and what always answering their mean would score."""
    known, wanted = ([float(example.labels) for example in examples] for examples in (train, test))
    if not known:
        return []
    mean = sum(known) / len(known)
    remark = f"labels from {min(known):g} to {max(known):g}, mean {mean:.4g}"
    if wanted:
        error = sum((number - mean) ** 2 for number in wanted) / len(wanted)
        remark += f"; always answering the mean has an mse of {error:.4g} on the test rows"
    return [remark]


def _known_already(train: Iterable[Example], test: Sequence[Example]) -> list[str]:
    """Test rows that were trained on, token by token: they make a result look better than it is."""
    seen = {example.input_ids.tobytes() for example in train}
    count = sum(example.input_ids.tobytes() in seen for example in test)
    return (
        [f"warning: {count:,} of {len(test):,} test rows are, as the model reads them, training rows too"]
        if count
        else []
    )


def _counts(names: Sequence[str], examples: Iterable[Example]) -> dict[str, int]:
    found = Counter(int(example.labels) for example in examples)
    return {name: found[index] for index, name in enumerate(names)}


def _classes(names: Sequence[str], train: dict[str, int], test: dict[str, int]) -> str:
    if len(names) <= _LISTED:
        rows = ", ".join(f"{name} {train[name]:,}/{test[name]:,}" for name in names)
        return f"{len(names)} classes (training/test rows): {rows}"
    least, most = min(names, key=train.__getitem__), max(names, key=train.__getitem__)
    return (
        f"{len(names)} classes; training rows from {train[least]:,} ({least}) to {train[most]:,} ({most}), test rows "
        f"from {min(test.values()):,} to {max(test.values()):,}"
    )


def _absent(names: Sequence[str], train: dict[str, int], test: dict[str, int]) -> list[str]:
    """Classes that have no row in a split that has rows."""
    found = []
    for split, counts, other in (("test", test, train), ("training", train, test)):
        absent = [f"{name} ({other[name]} in the other split)" for name in names if not counts[name]]
        if absent and any(counts.values()):
            listed = ", ".join(absent[:_LISTED]) + (", ..." if len(absent) > _LISTED else "")
            found.append(
                f"warning: classes without a {split} row: {listed}; fwdllm.data.stratify: true gives every class its "
                "share of every split"
            )
    return found
