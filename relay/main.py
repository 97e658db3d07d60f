"""The command `waystation`: a table of lazily imported names, the one place where names point up.

`waystation --help` imports click and nothing else of weight: a command's module is loaded when it is called.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any, NoReturn

import click

from relay.errors import RefusedError, StoreError, UnreachableError, UsageError, WaystationError
from relay.support.console import let_output_pass, require_utf8, say, say_error

_COMMANDS = {
    "init": ("orchestrator.commands.init", "init", "Commented files to start from."),
    "release": ("orchestrator.commands.release", "release", "Releases, and their deployments into environments."),
    "rotation": ("orchestrator.commands.rotation", "rotation", "Machines that are out of their load balancer."),
    "package": ("orchestrator.commands.package", "package", "Packages in the depot, and their way to the relays."),
    "relay": ("relay.cli", "relay", "The cache in one datacenter or office."),
    "agent": ("agent.cli", "agent", "A machine: keys, relays, trees."),
    "bench": ("benchmarks.cli", "bench", "What a line and the machines at its ends can do, measured."),
    "trust": ("orchestrator.commands.trust", "trust", "Keys that sign packages and orders."),
}


class _Lazy(click.Group):
    """A group whose members are imported when they are used; their one-line helps stand in the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, name, _ = _COMMANDS[cmd_name]
        found: click.Command = getattr(importlib.import_module(module), name)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, _, help) in _COMMANDS.items()])


@click.command(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Example: waystation package add Acme.Web.1.0.0.nupkg, then "
    "waystation package replicate Acme.Web 1.0.0 --relay https://relay.fra.example:7443",
)
@click.version_option(package_name="waystation", prog_name="waystation")
def waystation() -> None:
    """Replicate NuGet packages once per site, and put them on every machine from the closest relay."""


def main() -> NoReturn:
    """Run the command; errors are told in one sentence, exit codes are those of docs/commands.md."""
    require_utf8()
    let_output_pass()
    # What libraries log is for `relay serve` to show; elsewhere an error is told once, by us.
    logging.getLogger().addHandler(logging.NullHandler())
    # SIGPIPE stays ignored: by its default, a relay would end with the first reader that goes away in mid-answer.
    try:
        result: Any = waystation.main(standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except (click.exceptions.Abort, KeyboardInterrupt):
        say("cancelled", aside=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except WaystationError as error:
        _tell(error)
        sys.exit(error.exit_code)
    except FileNotFoundError:
        if _has_a_folder():
            raise
        _tell(UsageError("the folder that this command was started in is gone", hint="Start it in one that is there"))
        sys.exit(UsageError.exit_code)


def _has_a_folder() -> bool:
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def _tell(error: WaystationError) -> None:
    # The nearer kind first: a disk of this machine's is no road to another one.
    kinds = {" (refused)": RefusedError, " (this machine)": StoreError, " (unreachable)": UnreachableError}
    kind = next((name for name, kind in kinds.items() if isinstance(error, kind)), "")
    say_error("error", f"{kind}: {error.lines[0]}", *filter(None, (*error.lines[1:], error.hint)))


if __name__ == "__main__":
    main()
