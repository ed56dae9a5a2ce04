"""`lightwell chat`, and the flags of all clients of a server."""

import argparse
import os
from collections.abc import Callable
from typing import Any

from server.cli.http_client import RemoteError, base_url
from server.cli.parser import Commands, Parser, argument_type, fail
from server.running_servers import DEFAULT_URL
from server.settings.value_types import INT64, integer, number


def add_server(parser: Parser) -> None:
    parser.add_argument(
        "--url",
        type=_url,
        help=f"Address of the server. Unset: a server of this user on this machine, if possible at {DEFAULT_URL}, or "
        "else any server that answers there",
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help="API key of the server. Unset: the first key in LIGHTWELL_API_KEY"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="Name of the model. Unset: the first model that the server lists"
    )


def _url(text: str) -> str:
    try:
        return base_url(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an address such as {DEFAULT_URL}, got {text!r}") from None


def client_options(arguments: argparse.Namespace, *apart: str) -> dict[str, Any]:
    """Return the flags as keyword arguments, except those in `apart`. Find the server if no --url is given."""
    options = {name: value for name, value in vars(arguments).items() if name not in ("run", *apart)}
    options["api_key"] = options["api_key"] or api_key_of_environment()
    if options["url"] is None:
        from server.cli.discovery import find_server

        options["url"] = find_server()
    return options


def api_key_of_environment() -> str | None:
    return os.environ.get("LIGHTWELL_API_KEY", "").split(",")[0].strip() or None


def remote(run: Callable[[], int]) -> int:
    """Run a client and return its exit status. A RemoteError is printed."""
    try:
        return run()
    except RemoteError as error:
        return fail(str(error))


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "chat", help="chat with a served model", description="Chat with a model on an OpenAI-compatible server."
    )
    parser.set_defaults(run=_chat)
    add_server(parser)
    add_conversation(parser)
    parser.add_argument(
        "--seed", type=argument_type(INT64), metavar="N", help="Sampling seed; the same seed gives the same answers"
    )


def add_conversation(parser: Parser | argparse._ArgumentGroup) -> None:
    """Add the flags that set what requests of a chat contain."""
    parser.add_argument("--system", metavar="TEXT", help="System message")
    parser.add_argument(
        "--temperature",
        type=argument_type(number(0, 2)),
        metavar="X",
        help="Sampling temperature; 0 always takes the likeliest token",
    )
    parser.add_argument(
        "--top-p",
        type=argument_type(number(0, 1)),
        metavar="X",
        help="Sample from the likeliest tokens that make up this probability",
    )
    parser.add_argument(
        "--max-tokens",
        type=argument_type(integer(1)),
        default=1024,
        metavar="N",
        help="Maximum number of tokens per answer",
    )


def _chat(arguments: argparse.Namespace) -> int:
    from server.cli.chat import ChatOptions, chat

    return remote(lambda: chat(ChatOptions(**client_options(arguments))))
