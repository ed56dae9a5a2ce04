"""`lightwell chat` and `lightwell bench`, the clients of a server."""

import argparse
import os
import secrets
from collections.abc import Callable
from typing import Any

from server.cli.http_client import RemoteError, base_url
from server.cli.parser import Commands, Parser, argument_type, fail
from server.running_servers import DEFAULT_URL
from server.settings.value_types import INT64, integer, number, seconds


def add(commands: Commands) -> None:
    _add_chat(commands)
    _add_bench(commands)


def _add_server(parser: Parser) -> None:
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


def _options(arguments: argparse.Namespace, *apart: str) -> dict[str, Any]:
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


def _add_chat(commands: Commands) -> None:
    parser = commands.add_parser(
        "chat", help="chat with a served model", description="Chat with a model on an OpenAI-compatible server."
    )
    parser.set_defaults(run=_chat)
    _add_server(parser)
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

    return remote(lambda: chat(ChatOptions(**_options(arguments))))


def _add_bench(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure a server under load",
        description="Send requests to an OpenAI-compatible server and measure latency and throughput.",
    )
    parser.set_defaults(run=_bench)
    _add_server(parser)
    _add_load(parser)
    _add_requests(parser)
    parser.add_argument("--json", action="store_true", help="Print the report as JSON")


def _add_load(parser: Parser) -> None:
    load = parser.add_argument_group("Load")
    load.add_argument(
        "--num-requests", type=argument_type(integer(1)), default=64, metavar="N", help="Number of measured requests"
    )
    pace = load.add_mutually_exclusive_group()
    pace.add_argument(
        "--concurrency",
        type=argument_type(integer(1, 65536)),
        default=8,
        metavar="N",
        help="Number of requests in flight",
    )
    pace.add_argument(
        "--rate",
        type=argument_type(number(0.001, 1e6)),
        metavar="R",
        help="Requests per second, arriving at random (Poisson)",
    )
    load.add_argument(
        "--warmup",
        type=argument_type(integer(0)),
        default=0,
        metavar="N",
        help="Number of requests before the measured ones",
    )
    load.add_argument(
        "--timeout", type=argument_type(seconds(0.1)), default=600, metavar="SECONDS", help="Time limit of one request"
    )


def _add_requests(parser: Parser) -> None:
    requests = parser.add_argument_group("Requests")
    requests.add_argument(
        "--endpoint", choices=["completions", "chat"], default="completions", help="API endpoint to call"
    )
    requests.add_argument(
        "--input-len", type=argument_type(integer(1)), default=128, metavar="N", help="Words per prompt"
    )
    requests.add_argument(
        "--output-len", type=argument_type(integer(1)), default=64, metavar="N", help="Tokens per answer"
    )
    requests.add_argument(
        "--shared-prefix-len",
        type=argument_type(integer(0)),
        default=0,
        metavar="N",
        help="Words that all prompts start with",
    )
    requests.add_argument(
        "--temperature", type=argument_type(number(0, 2)), default=0.0, metavar="X", help="Sampling temperature"
    )
    requests.add_argument(
        "--no-ignore-eos",
        dest="ignore_eos",
        action="store_false",
        help="Let answers end before they have --output-len tokens",
    )
    requests.add_argument(
        "--seed", type=argument_type(INT64), metavar="N", help="Seed of prompts and arrival times. Unset: a random seed"
    )


def _bench(arguments: argparse.Namespace) -> int:
    from server.cli.bench import bench
    from server.cli.load_generator import LoadOptions

    def run() -> int:
        options = _options(arguments, "json")
        if options["seed"] is None:
            options["seed"] = secrets.randbits(32)
        return bench(LoadOptions(**options), as_json=arguments.json)

    return remote(run)
