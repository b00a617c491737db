"""FedML's own command tree with one command more: ``fedml run local --cf FILE``.

The stock ``fedml run`` lists, shows and stops runs on FedML's cloud; nothing in the stock tree trains on this machine,
and its executable has no place for plugins. So the tree is completed here and started as ``fs-fwdllm fedml ...``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from fs_fwdllm.host.fedml import run
from fs_fwdllm.host.fedml.installation import import_fedml

__all__ = ["main"]


@click.command("local", context_settings={"ignore_unknown_options": True})
@click.help_option("--help", "-h")
@click.option("--cf", required=True, type=click.Path(path_type=Path), help="FedML's configuration file.")
@click.argument("overrides", nargs=-1, metavar="[KEY VALUE]...")
def run_local(cf: Path, overrides: tuple[str, ...]) -> None:
    """Train on this machine as a FedML file says, with the methods of fs_fwdllm."""
    run(cf, overrides)


def main(arguments: Sequence[str]) -> None:
    """Run FedML's command tree on ``arguments``.

    Raises:
        HostError: FedML is not usable here.
        FwdLLMError: as :func:`fs_fwdllm.host.fedml.cluster.run`.
    """
    import_fedml()
    from fedml.cli.cli import cli
    from fedml.cli.modules.run import fedml_run

    fedml_run.add_command(run_local)
    cli.main(args=list(arguments), prog_name="fs-fwdllm fedml", standalone_mode=False)
