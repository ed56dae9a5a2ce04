"""`lightwell bench`: measures a server under load."""

import argparse
import dataclasses
import secrets
from typing import Any

from server.cli.chat import add_server, client_options
from server.cli.parser import Commands, argument_type
from server.part_table import load_module
from server.settings.setting import INT64, ValueType, integer, number, seconds


def _flag(default: Any, type: ValueType, metavar: str, description: str) -> Any:
    flag = {"type": argument_type(type), "metavar": metavar, "help": description}
    return dataclasses.field(default=default, metadata=flag)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The server to send requests to, their number and pace, and their contents. Most have a flag of their name."""

    url: str
    api_key: str | None = None
    model: str | None = None  # None: the first model that the server lists
    endpoint: str = "completions"  # completions, chat
    num_requests: int = _flag(64, integer(1), "N", "Number of measured requests")
    concurrency: int = _flag(8, integer(1, 65536), "N", "Number of requests in flight")
    rate: float | None = _flag(None, number(0.001, 1e6), "R", "Requests per second, arriving at random (Poisson)")
    warmup: int = _flag(0, integer(0), "N", "Number of requests before the measured ones")
    timeout: float = _flag(600, seconds(0.1), "SECONDS", "Time limit of one request")
    input_len: int = _flag(128, integer(1), "N", "Words per prompt")  # about one token each
    output_len: int = _flag(64, integer(1), "N", "Tokens per answer")
    shared_prefix_len: int = _flag(0, integer(0), "N", "Words that all prompts start with")
    temperature: float = _flag(0.0, number(0, 2), "X", "Sampling temperature")
    ignore_eos: bool = True  # request exactly output_len tokens
    seed: int = 0


PACE = ("concurrency", "rate")  # of which one is given


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure a server under load",
        description="Send requests to an OpenAI-compatible server and measure latency and throughput.",
    )
    parser.set_defaults(run=_bench)
    add_server(parser)
    load = parser.add_argument_group("Load")
    load.add_argument("--endpoint", choices=["completions", "chat"], default="completions", help="API endpoint to call")
    pace = load.add_mutually_exclusive_group()
    for option in dataclasses.fields(LoadOptions):
        if option.metadata:
            group = pace if option.name in PACE else load
            group.add_argument(f"--{option.name.replace('_', '-')}", default=option.default, **option.metadata)
    load.add_argument(
        "--no-ignore-eos",
        dest="ignore_eos",
        action="store_false",
        help="Let answers end before they have --output-len tokens",
    )
    load.add_argument(
        "--seed", type=argument_type(INT64), metavar="N", help="Seed of prompts and arrival times. Unset: a random seed"
    )
    parser.add_argument("--json", action="store_true", help="Print the report as JSON")


def _bench(arguments: argparse.Namespace) -> int:
    options = client_options(arguments, "json")
    if options["seed"] is None:
        options["seed"] = secrets.randbits(32)
    status: int = load_module("bench", "bench").bench(LoadOptions(**options), as_json=arguments.json)
    return status
