"""The command ``fs-fwdllm``: run, plan, profile, sweep, basis, quantise, plot, compare, cost, resume, data, hook...

Every command does three things: read its arguments, call one function of the package, print what it returns. Heavy
libraries are imported by the command that needs them, so that ``--help`` answers at once. An error of ours is one red
message and exit code 2, never a traceback; a traceback means a defect of the package.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from fs_fwdllm._version import __version__
from fs_fwdllm.cli.basis import basis
from fs_fwdllm.cli.certificates import certificates_app
from fs_fwdllm.cli.config import config_app
from fs_fwdllm.cli.data import data_app
from fs_fwdllm.cli.doctor import examine
from fs_fwdllm.cli.quantise import quantise
from fs_fwdllm.cli.slopes import tell_slopes
from fs_fwdllm.cli.sweep import SweepCommand, sweep
from fs_fwdllm.cli.trained import COMMANDS as COMMANDS_FOR_TRAINED
from fs_fwdllm.cli.words import ConfigFile, FileAndOverrides, file_and_words
from fs_fwdllm.errors import ConfigError, FwdLLMError
from fs_fwdllm.host.hosts import FILE_OPTIONS, HOSTS, owner_of
from fs_fwdllm.report.terminal import loading, print_facts, say

__all__ = ["app", "main"]

_EXIT_OF_ERROR = 2
_EXIT_OF_INTERRUPT = 130


class _Commands(TyperGroup):
    """The commands, with our errors and Ctrl-C turned into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FwdLLMError as error:
            _say_on_stderr(f"error: {error}", "bold red")
            raise typer.Exit(_EXIT_OF_ERROR) from error
        except KeyboardInterrupt as error:
            _say_on_stderr("interrupted; a run goes on from its last checkpoint with: fs-fwdllm resume RUN", "yellow")
            raise typer.Exit(_EXIT_OF_INTERRUPT) from error


app = typer.Typer(
    name="fs-fwdllm",
    cls=_Commands,
    help="Federated fine-tuning of language models on devices that cannot train by backpropagation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

app.add_typer(data_app)
app.add_typer(config_app)
app.add_typer(certificates_app)

#: Overrides may be negative numbers, which must not be taken for options.
_WITH_OVERRIDES = {"ignore_unknown_options": True, "allow_interspersed_args": True}

_CF_HELP = "FedML's file, or the name of a packaged one (fedml/fwd_agnews_sp), with --host fedml."
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fs-fwdllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command(context_settings=_WITH_OVERRIDES)
def run(
    words: FileAndOverrides = None,
    cfg: ConfigFile = None,
    host: Annotated[str, typer.Option(metavar="HOST", help=f"One of {', '.join(HOSTS)}.")] = "local",
    cf: Annotated[Path | None, typer.Option("--cf", metavar="FILE", help=_CF_HELP)] = None,
) -> None:
    """Train: run a configuration from the first round to the last.

    Example: fs-fwdllm run demo

    Example: fs-fwdllm run my.yaml train.optimizer.lr 0.3 eval.metrics '[accuracy, macro_f1]'
    """
    chosen = HOSTS[host]
    given = {option: file for option, file in zip(FILE_OPTIONS, (cfg, cf), strict=True) if file is not None}
    if {*given} - {chosen.option} or not (given or words):
        raise ConfigError(f"{chosen.option} FILE: is what --host {host} reads{_readers_of({*given} - {chosen.option})}")
    chosen.run_file(*file_and_words(words, given.get(chosen.option), "run"))


@app.command(context_settings=_WITH_OVERRIDES)
def plan(words: FileAndOverrides = None, cfg: ConfigFile = None) -> None:
    """Say what a run would cost, without training: parameters, memory, bytes and forward passes per round.

    Example: fs-fwdllm plan demo fwdllm.probes 100
    """
    config = _read_config(*file_and_words(words, cfg, "plan"))
    with loading(config):
        forecast = importlib.import_module("fs_fwdllm.forecast.plan").make_plan(config)
    print_facts(Console(highlight=False), forecast.rows())
    for remark in (*forecast.remarks, *forecast.advice):
        _say(remark)


@app.command(context_settings=_WITH_OVERRIDES)
def profile(
    words: FileAndOverrides = None,
    cfg: ConfigFile = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where table, picture and winner.yaml go.")] = Path(
        "profile"
    ),
    probes: Annotated[int, typer.Option(min=2, help="Directions of the gradient that is compared.")] = 64,
    passes: Annotated[int, typer.Option(min=1, help="Forward passes of each trial.")] = 400,
    rates: Annotated[
        bool, typer.Option("--rates", help="Only search the learning rate of what the file trains, as it trains it.")
    ] = False,
) -> None:
    """Find the adapter that learns most by forward gradients on this model and data, before a federation is started.

    Example: fs-fwdllm profile mezo_demo --passes 200
    """
    file, overrides = file_and_words(words, cfg, "profile")
    config = _read_config(file, overrides)
    profiler = importlib.import_module("fs_fwdllm.profiler")
    pairs = list(zip(overrides[::2], overrides[1::2], strict=False))
    left_out = [pair for pair in pairs if pair[0] in profiler.TRIAL_KEYS]
    kept = _read_config(file, [part for pair in pairs if pair not in left_out for part in pair])
    found = (
        profiler.run_rate_search(config, output, passes, kept)
        if rates
        else profiler.run_profile(config, output, probes, passes, kept)
    )
    if left_out and found.winner is not None:
        _say(f"winner.yaml leaves out {', '.join(' '.join(pair) for pair in left_out)}, which shortened the trials")
    if found.winner is not None:
        _say(f"use it with: fs-fwdllm run --cfg {found.winner}")
    if not found.finished:
        raise typer.Exit(_EXIT_OF_INTERRUPT)


app.command(cls=SweepCommand, context_settings=_WITH_OVERRIDES)(sweep)
app.command(context_settings=_WITH_OVERRIDES)(basis)
app.command()(quantise)


@app.command()
def plot(run: RunArgument) -> None:
    """Draw report.png of a run again.

    Example: fs-fwdllm plot runs/demo
    """
    from fs_fwdllm.report import plot_run

    _say(f"picture {plot_run(run)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where the picture goes, PNG.")] = Path("comparison.png"),
) -> None:
    """Compare several runs: one picture, one table.

    Example: fs-fwdllm compare runs/demo runs/demo-2 --output demos.png
    """
    from fs_fwdllm.report import compare_runs

    compared = compare_runs(runs, output)
    if compared.warning:
        _say(compared.warning)
    console = Console(highlight=False)
    print_facts(console, compared.legend)
    if compared.common:
        _say(compared.common)
    console.print(compared.result, compared.costs)
    _say(f"picture {compared.picture}")


@app.command()
def cost(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    devices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Constants of the time model, YAML, instead of our own.")
    ] = None,
    target: Annotated[float | None, typer.Option(help="Value of the metric whose first reaching is timed.")] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where the picture goes, PNG.")] = Path("costs.png"),
) -> None:
    """What runs cost: memory and bytes measured, passes counted, the time of other devices by a stated model.

    Example: fs-fwdllm cost runs/demo --target 0.7
    """
    from fs_fwdllm.report import DEVICES_FILE, analyse_costs, read_device_model

    costs = analyse_costs(runs, read_device_model(devices or DEVICES_FILE), output, target)
    Console(highlight=False).print(costs.measured, *costs.modelled)
    for remark in costs.remarks:
        _say(remark)
    _say(f"picture {costs.picture}")


@app.command()
def resume(
    run: RunArgument,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Rounds in all; a finished run goes on to round N.")
    ] = None,
) -> None:
    """Go on with a stopped run from its last checkpoint, or give a finished one more rounds.

    Example: fs-fwdllm resume runs/demo --rounds 400
    """
    owner_of(run).resume(run, rounds)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
def fedml(ctx: typer.Context) -> None:
    """FedML's own commands, and one of ours: fedml run local --cf FILE."""
    importlib.import_module("fs_fwdllm.host.fedml.command").main(ctx.args)


for command in COMMANDS_FOR_TRAINED:
    app.command()(command)

hook = typer.Typer(help="Make a FederatedScope checkout know this package: one file, placed or taken out.")
app.add_typer(hook, name="hook")

Checkout = Annotated[Path, typer.Argument(metavar="PATH", help="A FederatedScope checkout, branch llm.")]


@hook.command("install")
def hook_install(path: Checkout) -> None:
    """Place our one guarded file in federatedscope/contrib/configs/; doing it again changes nothing.

    Example: fs-fwdllm hook install FederatedScope
    """
    from fs_fwdllm.host.federatedscope.hook import install

    _say(f"placed {install(path)}; now python federatedscope/main.py --cfg FILE works in {path}")


@hook.command("remove")
def hook_remove(path: Checkout) -> None:
    """Take the file out again.

    Example: fs-fwdllm hook remove FederatedScope
    """
    from fs_fwdllm.host.federatedscope.hook import remove

    removed = remove(path)
    _say(f"removed {removed}" if removed else f"nothing of ours in {path}")


@app.command(context_settings=_WITH_OVERRIDES)
def doctor(
    words: FileAndOverrides = None,
    cfg: ConfigFile = None,
    slopes: Annotated[
        bool,
        typer.Option("--slopes", help="Measure a configuration's slopes beside exact ones, and say keep or change."),
    ] = False,
    probes: Annotated[int, typer.Option(min=2, metavar="N", help="With --slopes, look along so many directions.")] = 32,
) -> None:
    """Say which versions, devices, extras and hosts are found here; with --slopes, whether slopes can be trusted.

    Example: fs-fwdllm doctor

    Example: fs-fwdllm doctor --slopes --cfg my.yaml

    The exact slopes are those of backpropagation in float32 on the first client's first batch, where training starts.
    Exit code 1 says that some source of slopes should be changed.
    """
    if slopes:
        config = _read_config(*file_and_words(words, cfg, "doctor --slopes"))
        raise typer.Exit(0 if tell_slopes(config, probes) else 1)
    if words or cfg:
        raise ConfigError("doctor: reads a configuration with --slopes only; without, it looks at the installation")
    facts = [(finding.name, f"{finding.found}\n{finding.hint}".strip()) for finding in examine()]
    print_facts(Console(highlight=False), facts)


def main() -> None:
    """Entry point of the console command."""
    app(prog_name="fs-fwdllm")


def _read_config(file: Path, overrides: list[str]) -> Any:
    from fs_fwdllm.config import load_config

    return load_config(file, overrides)


def _readers_of(options: set[str]) -> str:
    """Says which hosts the options go with that were given to another."""
    readers = {option: [name for name in HOSTS if HOSTS[name].option == option] for option in sorted(options)}
    return "".join(f"; {option} goes with --host {' or '.join(names)}" for option, names in readers.items())


def _say(text: str) -> None:
    say(Console(highlight=False), text)


def _say_on_stderr(text: str, style: str) -> None:
    Console(stderr=True, highlight=False).print(Text(text, style=style), soft_wrap=True)
