"""`lightwell chat`: chat in the terminal with any OpenAI-compatible server, over HTTP; flags of all clients of one.

When standard input is a pipe or a file, each of its lines is a message, and only the answers are printed.
"""

import argparse
import os
import re
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from server.cli.http_client import base_url, check_status, connect, decode_chunk, find_model, find_server, plain_errors
from server.cli.parser import CommandError, Commands, Parser, argument_type
from server.running_servers import DEFAULT_URL
from server.settings.setting import INT64, integer, number

if TYPE_CHECKING:
    import httpx

MAX_LINE_BYTES = 16 << 20  # of input; servers take no larger requests
HELP = "/clear starts a new conversation, /exit or Ctrl-D quits, Ctrl-C stops an answer."

# Removed from answers, since a model's output must not control the terminal.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Conversation:
    """The messages so far, and the client that requests the next answer."""

    def __init__(self, client: "httpx.Client", system: str | None, fields: dict[str, Any]) -> None:
        """`fields` are those of all requests."""
        self._client = client
        self._request = fields | {"stream": True}
        self._system = [{"role": "system", "content": system}] if system else []
        self.is_cut_off = False  # the last answer reached its limit of tokens
        self.clear()

    def clear(self) -> None:
        self.messages = list(self._system)

    def ask(self, text: str) -> Generator[str]:
        """Send a message and yield the answer piece by piece as it arrives. Raises CommandError.

        The answer stays in the conversation even if it is cut off; a message without any answer is removed.
        """
        self.messages.append({"role": "user", "content": text})
        answer: list[str] = []
        try:
            for piece in self._stream():
                answer.append(piece)
                yield piece
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
            else:
                self.messages.pop()

    def _stream(self) -> Generator[str]:
        request = self._request | {"messages": self.messages}
        stream = self._client.stream("POST", "/v1/chat/completions", json=request)
        with plain_errors(str(self._client.base_url)), stream as response:
            check_status(response)
            self.is_cut_off = yield from _content(response.iter_lines())


def _content(lines: Iterator[str]) -> Generator[str, None, bool]:
    """Yield the text of server-sent events, and return whether the answer reached its limit of tokens.

    Raises CommandError for an error event, and if `[DONE]` is missing.
    """
    is_cut_off = False
    for line in lines:
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return is_cut_off
        if data:
            chunk = decode_chunk(data)
            is_cut_off |= chunk.is_cut_off
            if chunk.text:
                yield chunk.text
    raise CommandError("the answer was cut off")


def chat(*, url: str, api_key: str | None, model: str | None = None, system: str | None, **sampling: Any) -> int:
    """Chat until the end of the input and return the exit status. Raises CommandError.

    Without a model, it is the first one that the server lists. `sampling` are fields of requests, or None.
    """
    with connect(url, api_key) as client:
        model = model or find_model(client)
        fields = {name: value for name, value in sampling.items() if value is not None}
        conversation = Conversation(client, system, {"model": model, **fields})
        if sys.stdin.isatty():
            print(f"{model} at {url}. {HELP}")
            _chat_in_terminal(conversation)
        else:
            for line in filter(None, map(str.strip, input_lines())):
                _print_answer(conversation, line)
    return 0


def input_lines() -> Iterator[str]:
    """Yield the lines of standard input. Raises CommandError if one cannot be read, is no text or is too long."""
    encoding, number = sys.stdin.encoding, 0
    while line := _read_bytes():
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise CommandError(f"standard input: line {number} is longer than {MAX_LINE_BYTES} bytes")
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError as error:
            raise CommandError(f"standard input: line {number} is not {encoding} (byte {error.start + 1})") from None
        yield text


def _read_bytes() -> bytes:
    try:
        return sys.stdin.buffer.readline(MAX_LINE_BYTES + 1)
    except OSError as error:
        raise CommandError(f"standard input cannot be read: {error.strerror or error}") from None


def _chat_in_terminal(conversation: Conversation) -> None:
    import readline  # noqa: F401  (gives input() line editing and history)

    while (line := _read_line()) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/clear":
            conversation.clear()
            print("Started a new conversation.")
        elif line.startswith("/"):
            print(HELP if line == "/help" else f"Unknown command {line}. {HELP}")
        elif line:
            try:
                _print_answer(conversation, line)
            except KeyboardInterrupt:
                print(" (stopped)")
            except CommandError as error:
                print(f"lightwell: error: {error}", file=sys.stderr, flush=True)


def _read_line() -> str | None:
    """Return the next line, or None at the end of the input. Ctrl-C discards the typed line and returns ""."""
    try:
        return input("> ").strip()
    except KeyboardInterrupt:
        print()
        return ""
    except UnicodeDecodeError:
        print(f"lightwell: error: the line is not {sys.stdin.encoding}", file=sys.stderr, flush=True)
        return ""
    except EOFError:
        print()
        return None


def _print_answer(conversation: Conversation, line: str) -> None:
    """Print an answer as it arrives. An exception closes the connection, so that the server stops as well."""
    with closing(conversation.ask(line)) as pieces:
        for piece in pieces:
            print(_CONTROL_CHARACTERS.sub("", piece), end="", flush=True)
    print(flush=True)
    if conversation.is_cut_off:
        print("(cut off at --max-tokens or at the end of the context)", file=sys.stderr, flush=True)


# The command line.


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
    options["api_key"] = options["api_key"] or os.environ.get("LIGHTWELL_API_KEY", "").split(",")[0].strip() or None
    options["url"] = options["url"] or find_server()
    return options


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "chat", help="chat with a served model", description="Chat with a model on an OpenAI-compatible server."
    )
    parser.set_defaults(run=lambda arguments: chat(**client_options(arguments)))
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
        dest="max_completion_tokens",  # the field of requests
        type=argument_type(integer(1)),
        default=1024,
        metavar="N",
        help="Maximum number of tokens per answer",
    )
