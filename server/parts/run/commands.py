"""`lightwell run`, with the flags of `lightwell serve` and of a chat."""

import argparse
import os
import socket

from server.cli.commands.clients import add_conversation, remote
from server.cli.commands.serve import add_settings
from server.cli.parser import Commands
from server.settings.load import load_settings
from server.settings.table import SETTINGS, Settings

CHAT_FLAGS = ("system", "temperature", "top_p", "max_tokens")


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "run",
        help="serve a model and chat with it",
        usage="%(prog)s [MODEL] [FLAGS]",
        description="Serve a model, chat with it, and stop the server at the end. If another program has the default "
        "port, a free one is used. All flags of `lightwell serve` can be given.",
    )
    parser.set_defaults(run=_run)
    add_conversation(parser.add_argument_group("Chat"))
    add_settings(parser)


def _run(arguments: argparse.Namespace) -> int:
    from msgspec.structs import replace

    from server.parts.run.run import run

    settings = load_settings(vars(arguments), os.environ, arguments.config)
    if settings.port == SETTINGS["port"].default and "port" not in vars(arguments) and not is_free(settings):
        settings = replace(settings, port=0)
    chat_flags = {name: vars(arguments)[name] for name in CHAT_FLAGS}
    return remote(lambda: run(settings, chat_flags))


def is_free(settings: Settings) -> bool:
    """Return whether the server can have its port."""
    try:
        socket.create_server((settings.host, settings.port), family=_family(settings.host)).close()
    except OSError:
        return False
    return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
