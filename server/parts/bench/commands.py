"""`lightwell bench`: measures a server under load."""

import argparse
import secrets

from server.cli.chat import add_server, client_options, remote
from server.cli.parser import Commands, Parser, argument_type
from server.settings.setting import INT64, integer, number, seconds


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure a server under load",
        description="Send requests to an OpenAI-compatible server and measure latency and throughput.",
    )
    parser.set_defaults(run=_bench)
    add_server(parser)
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
    from server.parts.bench.bench import bench
    from server.parts.bench.load_generator import LoadOptions

    def run() -> int:
        options = client_options(arguments, "json")
        if options["seed"] is None:
            options["seed"] = secrets.randbits(32)
        return bench(LoadOptions(**options), as_json=arguments.json)

    return remote(run)
