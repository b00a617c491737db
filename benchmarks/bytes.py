"""Bytes of one client's round, counted on real frames, against sending the parameters.

The model is the 26 M parameter Llama; LoRA has rank 8 on the query and value projections. ``K`` are local steps, ``P``
probes per step. Peer: the same client's update sent densely in float32, in our frames.

    python benchmarks/bytes.py [--quick]
"""

from __future__ import annotations

import numpy as np
from common import arguments, make_parts, print_machine, print_table, random_llama, verdict

from fs_fwdllm.core.wire import DenseState, DenseUpdate, RoundUpdate, ScalarUpdate, encode

_DIGEST = bytes(range(16))


def values(count: int) -> np.ndarray:
    return np.linspace(0.5, 1.5, count, dtype=np.float32)


def scalar_upload(steps: int, probes: int) -> int:
    """With counters as large as late in a long run."""
    update = ScalarUpdate(99_999, 9_999, _DIGEST, 80 * steps, 1.0, 2 * steps * probes, 0, values=values(steps * probes))
    return len(encode(update))


def dense_upload(count: int) -> int:
    return len(encode(DenseUpdate(99_999, 9_999, _DIGEST, 80, 1.0, 1, 1, values=values(count))))


def main() -> None:
    options = arguments(__doc__, repetitions=1)
    print_machine(options.threads)
    model = random_llama(quick=options.quick)
    full = sum(parameter.numel() for parameter in model.parameters())
    lora = make_parts(model, "fedmezo").trainables.count
    dense_lora, dense_full = dense_upload(lora), dense_upload(full)
    rows: list[tuple[object, ...]] = []
    for steps, probes in ((1, 1), (10, 1), (10, 10), (30, 1)):
        upload = scalar_upload(steps, probes)
        target = verdict(upload, 4 * steps * probes + 100)
        ratios = f"{dense_lora / upload:,.0f}", f"{dense_full / upload:,.0f}"
        rows.append((f"scalars, K={steps} P={probes}", f"{upload:,}", *ratios, target))
    rows.append((f"dense, LoRA ({lora:,} parameters)", f"{dense_lora:,}", "1", f"{dense_full / dense_lora:,.0f}", ""))
    rows.append((f"dense, all ({full:,} parameters)", f"{dense_full:,}", "", "1", ""))
    header = ("upload of one client and round", "bytes", "LoRA dense / this", "all dense / this", "4KP + 100")
    print_table("Up", header, rows)

    rows = []
    for clients in (3, 10, 100):
        participants = tuple((99_999, 1000 + client, 10, 1) for client in range(clients))
        step = RoundUpdate(99_999, _DIGEST, _DIGEST, 1.0, (), 0.0, 0.0, participants, values=values(10 * clients))
        state = len(encode(DenseState(99_999, _DIGEST, False, values=values(lora))))
        scalars = len(encode(step))
        rows.append((f"{clients} clients, K=10 P=1", f"{scalars:,}", f"{state:,}", f"{state / scalars:,.0f}"))
    print_table("Down: the step of one round", ("", "as scalars", "as LoRA parameters", "ratio"), rows)


if __name__ == "__main__":
    main()
