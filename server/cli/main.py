"""The `lightwell` command. Each subcommand is a module of `server.cli.commands`, which adds its parser.

A command imports what it needs only when it runs, so that help and usage errors appear at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from server.cli.commands import build_kernels, clients, doctor, models, run, serve
from server.cli.parser import FAILURE, INTERRUPTED, USAGE_ERROR, Parser, fail
from server.settings.setting import SettingsError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    open_standard_streams()
    arguments = make_parser().parse_args(argv)
    command: Command = arguments.run
    try:
        return command(arguments)
    except SettingsError as error:
        return fail(str(error), USAGE_ERROR)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has exited, as in `lightwell bench | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE


def open_standard_streams() -> None:
    """Open the null device for standard streams that are closed.

    The next file or connection would get the number of a closed one, and logs would be written into it.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightwell",
        description="Serve language models through APIs compatible with OpenAI's, Anthropic's and Ollama's.",
    )
    parser.add_argument("--version", action="version", version=f"lightwell {version('lightwell')}")
    parser.set_defaults(run=_no_command)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for module in (run, serve, clients, models, doctor, build_kernels):
        module.add(commands)
    return parser


def _no_command(arguments: argparse.Namespace) -> int:
    make_parser().print_help(sys.stderr)
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
