"""Commands for what a run has trained: predict, evaluate, generate, chat, merge."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from fs_fwdllm.cli.rows import write_rows
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.report.terminal import compact_table

if TYPE_CHECKING:
    from fs_fwdllm.inference import Prediction

__all__ = ["COMMANDS"]

_RUN_HELP = "A run folder, or the adapter or model folder of one."
Run = Annotated[Path, typer.Argument(metavar="RUN", help=_RUN_HELP)]
Output = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write here: .csv, .jsonl or .json.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Where the model runs: cpu, cuda.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts in one forward pass.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 writes the likeliest answer; above, answers are drawn.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the probability that tokens are drawn from.")]
Seed = Annotated[int, typer.Option(help="Of the draw.")]
System = Annotated[str, typer.Option(metavar="TEXT", help="A system message before the conversation.")]


def predict(
    run: Run,
    text: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A text; several times for several.")] = None,
    pair: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Each text's second text, or each question's context.")
    ] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="Rows as the training had them.")] = None,
    out: Output = None,
    batch_size: BatchSize = 32,
    device: Device = "cpu",
) -> None:
    """Say the class of texts, with probabilities.

    Example: fs-fwdllm predict runs/demo --text "Where is my parcel?"
    """
    from fs_fwdllm.inference import load

    if (file is None) == (not text):
        raise ConfigError("predict: give either --text TEXT (as often as you like) or --file FILE")
    trained = load(run, device)
    if file is None:
        rows: list[dict[str, Any]] = [{"text": one} for one in text or ()]
        found = trained.predict(text or (), pair, batch_size=batch_size)
    else:
        rows, found = trained.predict_file(file, batch_size=batch_size)
    if out is not None:
        write_rows(out, _rows(rows, found, flat=out.suffix.lower() == ".csv"))
        _say(f"{len(found)} predictions in {out}")
    elif file is None:
        _print_predictions(rows, found)
    else:
        for row in _rows(rows, found, flat=False):
            typer.echo(json.dumps(row, ensure_ascii=False))
    if unread := sum(not one.label for one in found):
        _say_aside(f"{unread} of {len(found)} texts have no token the model knows, and no prediction")


def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help=_RUN_HELP)] = None,
    cfg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Evaluate the untrained model of a configuration instead.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="test, val or train of the run's data.")] = "",
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="Rows with labels, instead of a split.")] = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="METRIC", help="Instead of the run's metrics.")] = None,
    device: Device = "cpu",
) -> None:
    """Measure a trained model, without training.

    Example: fs-fwdllm evaluate runs/demo --split val
    """
    from fs_fwdllm.config import load_config
    from fs_fwdllm.running.evaluating import evaluate_config, evaluate_file, evaluate_run

    if (run is None) == (cfg is None):
        raise ConfigError("evaluate: give either RUN or --cfg FILE")
    if file is not None and (split or cfg is not None):
        raise ConfigError("evaluate: --file goes with RUN, and without --split")
    if cfg is not None:
        found = evaluate_config(load_config(cfg), split)
    elif file is not None:
        found = evaluate_file(_given(run), file, metric or (), device)
    else:
        found = evaluate_run(_given(run), split or "test", metric or (), device)
    _print_metrics(found)


def generate(
    run: Run,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="What to answer; several times.")] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows as the training had them; answers are not needed.")
    ] = None,
    system: System = "",
    out: Output = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
) -> None:
    """Answer prompts, in the words the model was taught with.

    Example: fs-fwdllm generate runs/mezo --prompt "Name three colours."
    """
    from fs_fwdllm.inference import Sampling, load

    if (file is None) == (not prompt):
        raise ConfigError("generate: give either --prompt TEXT (as often as you like) or --file FILE")
    trained = load(run, device)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    if file is None:
        rows: list[dict[str, Any]] = [{"prompt": one} for one in prompt or ()]
        answers = trained.generate(prompt or (), system=system, sampling=sampling, batch_size=batch_size)
    else:
        rows, answers = trained.generate_file(file, sampling=sampling, batch_size=batch_size)
    written = [{**row, "generated": answer} for row, answer in zip(rows, answers, strict=True)]
    if out is not None:
        write_rows(out, written)
        _say(f"{len(answers)} answers in {out}")
    elif file is None:
        for answer in answers:
            typer.echo(answer)
    else:
        for row in written:
            typer.echo(json.dumps(row, ensure_ascii=False))


def chat(
    run: Run,
    system: System = "",
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Talk with a trained language model; /reset forgets what was said, /quit or Ctrl-D ends.

    Example: fs-fwdllm chat runs/mezo --system "You are brief."
    """
    from fs_fwdllm.inference import Sampling, load

    trained = load(run, device)
    conversation = trained.chat(system=system, sampling=Sampling(max_new_tokens, temperature, top_p, seed))
    is_terminal = sys.stdin.isatty()
    _say_aside("/reset forgets what was said, /quit ends")
    while True:
        try:
            said = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        if said == "/quit":
            return
        if said == "/reset":
            conversation.forget()
        elif said:
            typer.echo(conversation.say(said))


def merge(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 or float16, which round.")] = "float32",
) -> None:
    """Write adapter and base as one Hugging Face model, which needs neither PEFT nor this package.

    Example: fs-fwdllm merge runs/mezo my_model
    """
    from fs_fwdllm.inference import merge as merge_trained

    _say(f"model {merge_trained(run, out, dtype)}")


#: In the order in which ``--help`` lists them.
COMMANDS: tuple[Callable[..., None], ...] = (predict, evaluate, generate, chat, merge)


def _given(run: Path | None) -> Path:
    assert run is not None
    return run


def _rows(rows: Sequence[dict[str, Any]], found: Sequence[Prediction], *, flat: bool) -> list[dict[str, Any]]:
    """Rows with their predictions; ``flat`` gives every probability a column of its own."""
    written = []
    for row, one in zip(rows, found, strict=True):
        new: dict[str, Any] = {**row, "prediction": one.label}
        if flat:
            new |= {f"probability of {name}": value for name, value in one.probabilities.items()}
        elif one.probabilities:
            new["probabilities"] = one.probabilities
        written.append(new)
    return written


def _print_predictions(rows: Sequence[dict[str, Any]], found: Sequence[Prediction]) -> None:
    table = compact_table("text", "prediction", "probability", "next")
    for row, one in zip(rows, found, strict=True):
        ranked = sorted(one.probabilities.items(), key=lambda item: -item[1])
        probability = f"{ranked[0][1]:.3f}" if ranked else ""
        others = ", ".join(f"{name} {value:.3f}" for name, value in ranked[1:3])
        table.add_row(Text(row["text"]), Text(one.label), probability, Text(others))
    Console(highlight=False).print(table)


def _print_metrics(found: dict[str, Any]) -> None:
    from fs_fwdllm.report.classes import class_table, scores_of

    table = compact_table("metric", "value")
    for name, value in found.items():
        if isinstance(value, int | float):
            table.add_row(name, f"{value:.4f}")
    Console(highlight=False).print(table)
    if found.get("per_class"):
        Console(highlight=False).print(class_table(scores_of(found["per_class"])))


def _say(text: str) -> None:
    Console(highlight=False).print(text, markup=False, soft_wrap=True)


def _say_aside(text: str) -> None:
    """Beside the output proper, which may be piped elsewhere."""
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
