"""Runs at the sizes between a phone's encoder and a 7B model: 67 M to 1.1 B parameters, random weights.

Every row is a run of three rounds by the ``local`` host in a process of its own: seconds until its first line, CPU time
of a pass (a backward pass counts as two) in rounds two and three, all that a round does included, beside that of a
plain forward pass of transformers on the same batch, the peak of the process beside what ``fs-fwdllm plan`` predicts,
and the bytes of a checkpoint.

    python benchmarks/sizes.py FOLDER [--rows PATTERN] [--threads 1] [--quick]

FOLDER is for the models (4 GB) and is kept. ``--quick`` takes two layers of each.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import print_machine, print_table

_TOKENS, _ROWS = 64, 8
_LORA = [{"adapter_method": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0}]
_CLASSIFIER = {"type": "{model}@transformers", "task": "SequenceClassification"}
_MEZO = {"federate.method": "fedmezo", "fwdllm.estimator": "central", "fwdllm.probes": 2}
_POOLED = {"federate.method": "fedfwd", "fwdllm.estimator": "one_sided", "fwdllm.probes": 4}
_BLOCKS = {"federate.method": "fedcybgd", "llm.adapter.use": False, "train.optimizer.type": "AdamW"}
_AVERAGE = {"federate.method": "fedavg", "train.optimizer.type": "AdamW", "train.optimizer.lr": 1e-4}
_ALL = {"llm.adapter.use": False, "train.optimizer.lr": 1e-6}
_HALF = {"fwdllm.base.compute_dtype": "bfloat16"}


@dataclass(frozen=True)
class Row:
    """A run: of which model, with which keys beside LoRA's."""

    name: str
    model: str
    own: dict[str, Any] = field(default_factory=dict)


ROWS = [
    Row("DistilBERT 67 M, forward gradient, LoRA", "distilbert", _POOLED),
    Row("BERT-large 335 M, forward gradient, LoRA", "bert-large", _POOLED),
    Row("BERT-large, FedAvg, LoRA", "bert-large", _AVERAGE),
    Row("BERT-large, blocks", "bert-large", _BLOCKS),
    Row("GPT-2 124 M, MeZO, LoRA", "gpt2", _MEZO),
    Row("GPT-2, MeZO, all parameters", "gpt2", _MEZO | _ALL),
    Row("Llama 1.1 B, MeZO, LoRA", "llama-1b", _MEZO),
    Row("Llama 1.1 B, MeZO, LoRA, bfloat16", "llama-1b", _MEZO | _HALF | {"fwdllm.radius": 5e-3}),
    Row("Llama 1.1 B, MeZO, all parameters", "llama-1b", _MEZO | _ALL),
    Row("Llama 1.1 B, blocks, bfloat16", "llama-1b", _BLOCKS | _HALF),
]
#: Of Hugging Face's configuration classes: the class, its sizes, and whether it is a classifier.
SHAPES: dict[str, tuple[str, str, dict[str, int]]] = {
    "distilbert": ("DistilBertConfig", "n_layers", {}),
    "bert-large": (
        "BertConfig",
        "num_hidden_layers",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "gpt2": ("GPT2Config", "n_layer", {}),
    "llama-1b": (
        "LlamaConfig",
        "num_hidden_layers",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
         "num_key_value_heads": 4, "vocab_size": 32000},
    ),
}  # fmt: skip


def model_of(name: str, options: argparse.Namespace) -> Path:
    """The folder of a random model, in the dtype such checkpoints have, with a tokenizer of words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder: Path = options.folder / (name + ("-quick" if options.quick else ""))
    if (folder / "tokenizer.json").is_file():
        return folder
    kind, layers, sizes = SHAPES[name]
    config = getattr(transformers, kind)(**sizes)
    if options.quick:
        setattr(config, layers, 2)
    decoder = name in ("gpt2", "llama-1b")
    auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForSequenceClassification
    torch.manual_seed(1)
    dtype = torch.bfloat16 if name == "llama-1b" else torch.float32
    auto.from_config(config, dtype=dtype).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, **{f"w{n}": n for n in range(2, 1000)}}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<pad>"
    ).save_pretrained(folder)
    return folder


def configuration(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """The tree of a run; rows are texts of as many words as a sample may have, whatever the model is for."""
    from fs_fwdllm.config.load import tree_of

    folder = model_of(row.model, options)
    data = options.folder / "rows.jsonl"
    if not data.exists():
        text = [" ".join(f"w{2 + (7 * row + 3 * word) % 990}" for word in range(_TOKENS - 8)) for row in range(40)]
        data.write_text(
            "".join(json.dumps({"text": one, "label": f"w{2 + n % 2}"}) + "\n" for n, one in enumerate(text))
        )
    decoder = row.model in ("gpt2", "llama-1b")
    keys = {
        "seed": 1, "outdir": str(options.folder / "runs"), "expname": "size", "threads": options.threads,
        "federate.client_num": 2, "federate.total_round_num": 3, "data.root": str(options.folder),
        "data.type": "rows.jsonl@text", "data.splits": [0.8, 0.0, 0.2], "data.splitter": "iid",
        "model.type": f"{folder}@{'huggingface_llm' if decoder else 'transformers'}",
        "model.task": "" if decoder else "SequenceClassification", "llm.tok_len": _TOKENS,
        "llm.adapter.use": True, "llm.adapter.args": _LORA, "dataloader.batch_size": _ROWS, "eval.freq": -1,
        "train.optimizer.lr": 1e-4, **row.own,
    }  # fmt: skip
    if not keys["llm.adapter.use"]:
        keys["llm.adapter.args"] = [{}]
    return tree_of(keys)


def run(tree: dict[str, Any]) -> dict[str, float]:
    """Three rounds; called in a process of its own."""
    from fs_fwdllm.config import parse_config
    from fs_fwdllm.report import RunFolder
    from fs_fwdllm.running import local
    from fs_fwdllm.running.driver import RunDriver

    cpu: list[float] = []
    passes: list[int] = []
    record = RunDriver.record

    def recorded(self: RunDriver, evaluation: Any = None) -> None:
        record(self, evaluation)
        counted = self.accounting.columns()
        passes.append(int(counted["forward_passes"]) + 2 * int(counted["backward_passes"]))
        cpu.append(time.process_time())

    RunDriver.record = recorded  # type: ignore[method-assign]
    folder = local.run(parse_config(tree))
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    kept = RunFolder(folder).checkpoint_path
    checkpoint = sum(file.stat().st_size for file in [kept, *kept.rglob("*")] if file.is_file())
    return {
        "pass_s": (cpu[-1] - cpu[0]) / (passes[-1] - passes[0]),
        "peak": int(peak) * 1024,
        "checkpoint": checkpoint,
    }


def plain(tree: dict[str, Any]) -> dict[str, float]:
    """CPU seconds of a forward pass of transformers' own, in the dtype of the run."""
    import torch
    import transformers

    torch.set_num_threads(tree["threads"])
    folder, kind = tree["model"]["type"].split("@")
    wanted = tree.get("fwdllm", {}).get("base", {}).get("compute_dtype", "float32")
    auto = (
        transformers.AutoModelForCausalLM
        if kind == "huggingface_llm"
        else transformers.AutoModelForSequenceClassification
    )
    model = auto.from_pretrained(folder, dtype=getattr(torch, wanted)).eval()
    ids = torch.arange(_ROWS * _TOKENS).reshape(_ROWS, _TOKENS) % 900 + 2
    taken = []
    with torch.no_grad():
        for _ in range(4):
            started = time.process_time()
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            taken.append(time.process_time() - started)
    return {"pass_s": min(taken[1:])}


def planned(tree: dict[str, Any]) -> dict[str, float]:
    """What a plan says of the peak."""
    from fs_fwdllm.config import parse_config
    from fs_fwdllm.forecast.plan import make_plan

    return {"peak": make_plan(parse_config(tree)).memory.peak_bytes}


_WORK = {"run": run, "plain": plain, "plan": planned}


def measured(work: str, tree: dict[str, Any]) -> tuple[dict[str, float], float]:
    """The result of a piece of work in a fresh process, and the seconds until it said its first line."""
    command = [sys.executable, "-u", __file__, "--work", work, json.dumps(tree)]
    started, first = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        first = first or time.perf_counter() - started
        lines.append(line)
    if process.wait():
        raise SystemExit("".join(lines[-30:]))
    found: dict[str, float] = json.loads(lines[-1])
    return found, first


def cells(row: Row, options: argparse.Namespace) -> Sequence[str]:
    tree = configuration(row, options)
    found, first_s = measured("run", tree)
    forward, plan = measured("plain", tree)[0]["pass_s"], measured("plan", tree)[0]["peak"]
    print(f"{row.name}: {found}, plain {forward:.3f} s, planned {plan / 2**20:.0f} MiB", flush=True)
    return (
        row.name,
        f"{first_s:.1f}",
        f"{found['pass_s']:.2f}",
        f"{found['pass_s'] / forward:.2f}",
        f"{found['peak'] / 2**20:,.0f}",
        f"{plan / 2**20:,.0f}",
        f"{plan / found['peak']:.2f}",
        f"{found['checkpoint'] / 1e6:.1f}",
    )


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(_WORK[sys.argv[2]](json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default="", metavar="PATTERN", help="rows whose name has this regular expression")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    options.folder.mkdir(parents=True, exist_ok=True)
    print_machine(options.threads)
    header = ("", "first line s", "CPU s a pass", "over plain", "peak MiB", "planned", "ratio", "checkpoint MB")
    print_table("rounds 2 and 3", header, [cells(row, options) for row in ROWS if re.search(options.rows, row.name)])


if __name__ == "__main__":
    main()
