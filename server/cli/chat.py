"""`lightwell chat`: chat in the terminal with any OpenAI-compatible server, over HTTP.

When standard input is a pipe or a file, each of its lines is a message, and only the answers are printed.
"""

import dataclasses
import re
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from server.cli.http_client import RemoteError, check_status, connect, decode_chunk, find_model, plain_errors
from server.cli.streams import input_lines

if TYPE_CHECKING:
    import httpx

HELP = "/clear starts a new conversation, /exit or Ctrl-D quits, Ctrl-C stops an answer."

# Removed from answers, since a model's output must not control the terminal.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
    url: str
    api_key: str | None = None
    model: str | None = None  # None: the first model that the server lists
    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int  # per answer; a small model may never end one by itself
    seed: int | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The request fields of the options that are set."""
        fields = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_completion_tokens": self.max_tokens,
            "seed": self.seed,
        }
        return {name: value for name, value in fields.items() if value is not None}


class Conversation:
    """The messages so far, and the client that requests the next answer."""

    def __init__(self, client: "httpx.Client", model: str, options: ChatOptions) -> None:
        self._client = client
        self._request = {"model": model, "stream": True, **options.sampling}
        self._system = [{"role": "system", "content": options.system}] if options.system else []
        self.is_cut_off = False  # the last answer reached its limit of tokens
        self.clear()

    def clear(self) -> None:
        self.messages = list(self._system)

    def ask(self, text: str) -> Generator[str]:
        """Send a message and yield the answer piece by piece as it arrives. Raises RemoteError.

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

    Raises RemoteError for an error event, and if `[DONE]` is missing.
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
    raise RemoteError("the answer was cut off")


def chat(options: ChatOptions) -> int:
    """Chat until the end of the input and return the exit status. Raises RemoteError."""
    is_terminal = sys.stdin.isatty()
    with connect(options.url, options.api_key) as client:
        model = options.model or find_model(client)
        conversation = Conversation(client, model, options)
        if not is_terminal:
            return _chat_in_pipe(conversation)
        print(f"{model} at {options.url}. {HELP}")
        return _chat_in_terminal(conversation)


def _chat_in_pipe(conversation: Conversation) -> int:
    for line in input_lines():
        if line.strip():
            _print_answer(conversation, line.strip())
    return 0


def _chat_in_terminal(conversation: Conversation) -> int:
    import readline  # noqa: F401  (gives input() line editing and history)

    while (line := _read_line()) is not None:
        if line in ("/exit", "/quit"):
            break
        if line.startswith("/"):
            _run_command(conversation, line)
        elif line:
            _answer_in_terminal(conversation, line)
    return 0


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


def _run_command(conversation: Conversation, command: str) -> None:
    if command == "/clear":
        conversation.clear()
        print("Started a new conversation.")
    else:
        print(HELP if command == "/help" else f"Unknown command {command}. {HELP}")


def _answer_in_terminal(conversation: Conversation, line: str) -> None:
    try:
        _print_answer(conversation, line)
    except KeyboardInterrupt:
        print(" (stopped)")
    except RemoteError as error:
        print(f"lightwell: error: {error}", file=sys.stderr, flush=True)


def _print_answer(conversation: Conversation, line: str) -> None:
    """Print an answer as it arrives. An exception closes the connection, so that the server stops as well."""
    with closing(conversation.ask(line)) as pieces:
        for piece in pieces:
            print(_CONTROL_CHARACTERS.sub("", piece), end="", flush=True)
    print(flush=True)
    if conversation.is_cut_off:
        print("(cut off at --max-tokens or at the end of the context)", file=sys.stderr, flush=True)
