"""Malformed frames, configurations and files by the million: whether anything but a typed error comes out, or nothing.

Every input has a number (see :mod:`fuzzing`); what is found is printed with it. An input that takes more than a second
of the processor is counted as a hang. Nothing is trained, and nothing is read but what this writes into a temporary
folder.

    python benchmarks/fuzz.py [--frames 5000000] [--configurations N] [--files N] [--seed S]
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fuzzing.configurations import configuration, try_configuration
from fuzzing.files import try_checkpoint, try_h5
from fuzzing.frames import frame, try_frame

_HANG_S = 1.0
_SHOWN = 20


@dataclass
class Findings:
    """What became of the inputs of one kind.

    Attributes:
        outcomes: how many inputs ended how.
        untyped: by where an error that is not ours came from, the first seed and how many there were.
        slow: seeds of inputs that took longer than a second, and how long.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    untyped: dict[str, tuple[int, int]] = field(default_factory=dict)
    slow: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    def try_all(self, attempt: Callable[[int], str], seeds: range) -> Findings:
        """Try the inputs of ``seeds``."""
        started = time.perf_counter()
        for seed in seeds:
            begun = time.process_time()  # other processes may be at work
            try:
                self.outcomes[attempt(seed)] += 1
            except Exception as error:  # that is what is looked for
                self._note(seed, error)
            taken = time.process_time() - begun
            if taken > _HANG_S:
                self.slow.append((seed, taken))
        self.seconds = time.perf_counter() - started
        return self

    def _note(self, seed: int, error: Exception) -> None:
        self.outcomes["UNTYPED"] += 1
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:100]}"
        first, count = self.untyped.get(where, (seed, 0))
        self.untyped[where] = first, count + 1

    def print(self, name: str) -> None:
        """Counts by outcome, then what should not have been."""
        count = self.outcomes.total()
        rate = count / self.seconds if self.seconds else 0.0
        print(f"\n{name}: {count:,} in {self.seconds:.1f} s, {rate:,.0f} a second")
        for outcome, times in self.outcomes.most_common():
            print(f"  {outcome:<20} {times:>12,}")
        print(f"  untyped exceptions: {self.outcomes['UNTYPED']}; hangs (over {_HANG_S:g} s): {len(self.slow)}")
        for where, (first, times) in list(self.untyped.items())[:_SHOWN]:
            print(f"    {times} times, first with seed {first}: {where}")
        for seed, taken in self.slow[:_SHOWN]:
            print(f"    seed {seed} took {taken:.1f} s")
        sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a few of each, to see that it works")
    parser.add_argument("--frames", type=int, default=5_000_000)
    parser.add_argument("--configurations", type=int, default=5_000)
    parser.add_argument("--files", type=int, default=5_000, help="checkpoints, and as many h5 files")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input of each kind")
    options = parser.parse_args()
    if options.quick:
        options.frames, options.configurations, options.files = 500, 20, 20
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kinds: dict[str, tuple[Callable[[int], str], int]] = {
            "frames": (lambda seed: try_frame(frame(seed)), options.frames),
            "configurations": (lambda seed: try_configuration(root, configuration(seed)), options.configurations),
            "checkpoints": (lambda seed: try_checkpoint(root / "checkpoints", seed), options.files),
            "h5 files": (lambda seed: try_h5(root / "h5", seed), options.files),
        }
        failed = False
        for name, (attempt, count) in kinds.items():
            found = Findings().try_all(attempt, range(options.seed, options.seed + count))
            found.print(name)
            failed = failed or bool(found.untyped or found.slow)
    print(f"\npeak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
