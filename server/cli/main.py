"""The `lightwell` command and its subcommands: serve, pull, chat, bench, build-kernels.

The flags of `serve` come from the table in `server.settings`. Each command imports what it needs only when it runs, so
that help and usage errors appear at once.
"""

import argparse
import os
import secrets
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NoReturn, TypeAlias

from server.cli.http_client import DEFAULT_URL, RemoteError, base_url
from server.settings.load import load_settings
from server.settings.setting import ENV_PREFIX, Setting, SettingsError
from server.settings.table import REPEAT_LORA_MODULES, SETTINGS
from server.settings.value_types import INT64, ValueType, integer, number, seconds

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130

HINTS = {  # for flags of vLLM
    "--enable-lora": "--lora-modules and --allow-runtime-lora-updating enable adapters",
    "--max-cpu-loras": "--max-loras is the maximum number of loaded adapters, on any device",
}

Command = Callable[[argparse.Namespace], int]
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

SERVE_EPILOG = f"""\
Each flag can also be set by an environment variable (--max-num-seqs by {ENV_PREFIX}MAX_NUM_SEQS; commas separate the
values of a list) and by a key of the --config file (max-num-seqs: 64). Flags override the environment, and the
environment overrides the file.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = _parse(make_parser(), sys.argv[1:] if argv is None else argv)
    command: Command = arguments.run
    try:
        return command(arguments)
    except SettingsError as error:
        return _fail(str(error), USAGE_ERROR)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has exited, as in `lightwell bench | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE


def _fail(message: str, status: int = FAILURE) -> int:
    print(f"lightwell: error: {message}", file=sys.stderr, flush=True)
    return status


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown_arguments(unknown))
    return arguments


def _unknown_arguments(unknown: list[str]) -> str:
    """Return the usage error. It names flags without their values, which might be secrets."""
    flags = [argument.split("=")[0] for argument in unknown if argument.startswith("-")]
    if flags:
        return f"unknown flag {flags[0]}" + (f": {HINTS[flags[0]]}" if flags[0] in HINTS else "")
    is_adapter = "=" in unknown[0] or unknown[0].startswith("{")
    return f"unexpected argument {unknown[0]!r}" + (f": {REPEAT_LORA_MODULES}" if is_adapter else "")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line, as the rest of the command does."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see {self.prog} --help)")
        raise SystemExit(USAGE_ERROR)


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Return the flags of an action, without the `--no-` flag of a switch that is off by default."""
        is_off = isinstance(action, argparse.BooleanOptionalAction) and SETTINGS[action.dest].default is False
        return action.option_strings[0] if is_off else super()._format_action_invocation(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Wrap help text, but do not break flags at their hyphens."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_default = action.option_strings and action.default not in (None, argparse.SUPPRESS, False, True)
        return f"{text} [%(default)s]" if has_default else text


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lightwell", description="Serve language models over an OpenAI-compatible API.")
    parser.add_argument("--version", action="version", version=f"lightwell {version('lightwell')}")
    parser.set_defaults(run=_no_command)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    _add_serve(commands)
    _add_pull(commands)
    _add_chat(commands)
    _add_bench(commands)
    _add_build_kernels(commands)
    return parser


def _no_command(arguments: argparse.Namespace) -> int:
    make_parser().print_help(sys.stderr)
    return USAGE_ERROR


def _type(value_type: ValueType) -> Callable[[str], Any]:
    """Return an argparse type that parses as the settings do."""

    def parse(text: str) -> Any:
        try:
            return value_type.parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {value_type.expected}, got {text!r}") from None

    return parse


# serve


def _add_serve(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model",
        usage="%(prog)s [MODEL] [FLAGS]",
        description="Serve a model over an OpenAI-compatible API.",
        epilog=SERVE_EPILOG,
    )
    parser.set_defaults(run=_serve)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in SETTINGS.values():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        _add_setting(groups[setting.group], setting)


def _add_setting(group: argparse._ArgumentGroup, setting: Setting) -> None:
    """Add a flag that stores its text unparsed: `load_settings` parses the values of all sources alike."""
    text = (setting.description + (f" [{setting.default_text}]" if setting.default_text else "")).replace("%", "%%")
    names = [setting.name] if setting.positional else [setting.flag]
    if setting.is_switch:
        group.add_argument(*names, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    elif setting.positional:
        group.add_argument(*names, nargs="?", metavar=setting.value_type.metavar, default=argparse.SUPPRESS, help=text)
    else:
        action = "append" if setting.value_type.is_list else "store"
        group.add_argument(
            *names, action=action, metavar=setting.value_type.metavar, default=argparse.SUPPRESS, help=text
        )


def _serve(arguments: argparse.Namespace) -> int:
    from server.model_paths import ModelError
    from server.supervisor import SupervisorError, supervise

    settings = load_settings(vars(arguments), os.environ, arguments.config)
    try:
        return supervise(settings)
    except (ModelError, SupervisorError) as error:
        return _fail(str(error))


# pull


def _add_pull(commands: Commands) -> None:
    parser = commands.add_parser(
        "pull",
        help="download a model and print its path",
        description="Download a model, unless it is already there, and print its path.",
    )
    parser.set_defaults(run=_pull)
    parser.add_argument("model", metavar="MODEL", help=SETTINGS["model"].description)


def _pull(arguments: argparse.Namespace) -> int:
    from server.model_paths import ModelError, resolve_model

    try:
        print(resolve_model(arguments.model).path)
    except ModelError as error:
        return _fail(str(error))
    return 0


# chat and bench


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", type=_url, default=DEFAULT_URL, help="Address of the server")
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
    """Return the flags as keyword arguments, except those in `apart`."""
    options = {name: value for name, value in vars(arguments).items() if name not in ("run", *apart)}
    options["api_key"] = options["api_key"] or os.environ.get("LIGHTWELL_API_KEY", "").split(",")[0] or None
    return options


def _add_chat(commands: Commands) -> None:
    parser = commands.add_parser(
        "chat", help="chat with a served model", description="Chat with a model on an OpenAI-compatible server."
    )
    parser.set_defaults(run=_chat)
    _add_server(parser)
    parser.add_argument("--system", metavar="TEXT", help="System message")
    parser.add_argument(
        "--temperature",
        type=_type(number(0, 2)),
        metavar="X",
        help="Sampling temperature; 0 always takes the likeliest token",
    )
    parser.add_argument(
        "--top-p",
        type=_type(number(0, 1)),
        metavar="X",
        help="Sample from the likeliest tokens that make up this probability",
    )
    parser.add_argument(
        "--max-tokens", type=_type(integer(1)), default=1024, metavar="N", help="Maximum number of tokens per answer"
    )
    parser.add_argument(
        "--seed", type=_type(INT64), metavar="N", help="Sampling seed; the same seed gives the same answers"
    )


def _chat(arguments: argparse.Namespace) -> int:
    from server.cli.chat import ChatOptions, chat

    return _remote(lambda: chat(ChatOptions(**_options(arguments))))


def _remote(run: Callable[[], int]) -> int:
    try:
        return run()
    except RemoteError as error:
        return _fail(str(error))


def _add_bench(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure a server under load",
        description="Send requests to an OpenAI-compatible server and measure latency and throughput.",
    )
    parser.set_defaults(run=_bench)
    _add_server(parser)
    load = parser.add_argument_group("Load")
    load.add_argument(
        "--num-requests", type=_type(integer(1)), default=64, metavar="N", help="Number of measured requests"
    )
    pace = load.add_mutually_exclusive_group()
    pace.add_argument(
        "--concurrency", type=_type(integer(1, 65536)), default=8, metavar="N", help="Number of requests in flight"
    )
    pace.add_argument(
        "--rate", type=_type(number(0.001, 1e6)), metavar="R", help="Requests per second, arriving at random (Poisson)"
    )
    load.add_argument(
        "--warmup", type=_type(integer(0)), default=0, metavar="N", help="Number of requests before the measured ones"
    )
    load.add_argument(
        "--timeout", type=_type(seconds(0.1)), default=600, metavar="SECONDS", help="Time limit of one request"
    )
    requests = parser.add_argument_group("Requests")
    requests.add_argument(
        "--endpoint", choices=["completions", "chat"], default="completions", help="API endpoint to call"
    )
    requests.add_argument("--input-len", type=_type(integer(1)), default=128, metavar="N", help="Words per prompt")
    requests.add_argument("--output-len", type=_type(integer(1)), default=64, metavar="N", help="Tokens per answer")
    requests.add_argument(
        "--shared-prefix-len", type=_type(integer(0)), default=0, metavar="N", help="Words that all prompts start with"
    )
    requests.add_argument(
        "--temperature", type=_type(number(0, 2)), default=0.0, metavar="X", help="Sampling temperature"
    )
    requests.add_argument(
        "--no-ignore-eos",
        dest="ignore_eos",
        action="store_false",
        help="Let answers end before they have --output-len tokens",
    )
    requests.add_argument(
        "--seed", type=_type(INT64), metavar="N", help="Seed of prompts and arrival times. Unset: a random seed"
    )
    parser.add_argument("--json", action="store_true", help="Print the report as JSON")


def _bench(arguments: argparse.Namespace) -> int:
    from server.cli.bench import bench
    from server.cli.load_generator import LoadOptions

    options = _options(arguments, "json")
    if options["seed"] is None:
        options["seed"] = secrets.randbits(32)
    return _remote(lambda: bench(LoadOptions(**options), as_json=arguments.json))


# build-kernels

BUILD_KERNELS_DESCRIPTION = """\
Compile the CPU kernels, unless this has been done, and print the path of the library. The server does this at its
first start if it finds a C++ compiler: $CXX, g++, c++ or clang++.
"""


def _add_build_kernels(commands: Commands) -> None:
    parser = commands.add_parser(
        "build-kernels", help="compile the CPU kernels in advance", description=BUILD_KERNELS_DESCRIPTION
    )
    parser.set_defaults(run=_build_kernels)
    parser.add_argument(
        "--in-package",
        action="store_true",
        help="Store the library next to its sources instead of in the cache folder, for images without a compiler",
    )


def _build_kernels(arguments: argparse.Namespace) -> NoReturn:
    """Replace this process by the engine's build script, since this one must not import torch."""
    flags = ["--in-package"] if arguments.in_package else []
    os.execv(sys.executable, [sys.executable, "-P", "-m", "engine.kernels.cpu.build", *flags])


if __name__ == "__main__":
    sys.exit(main())
