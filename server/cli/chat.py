"""`lightwell chat`: a conversation in the terminal with any OpenAI-compatible server, over HTTP.

Works in a pipe as well: then each line of the input is a message, and only the answers are printed.
"""

import dataclasses
import re
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from server.cli.http_client import RemoteError, check_status, connect, decode_chunk, find_model, plain_errors

if TYPE_CHECKING:
    import httpx

HELP = "/clear forgets the conversation, /exit leaves (also Ctrl-D), Ctrl-C stops an answer."

# A model's words must not steer the terminal.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
    url: str
    api_key: str | None = None
    model: str | None = None  # None: the first one that the server offers
    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The request fields that were set."""
        fields = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_completion_tokens": self.max_tokens,
            "seed": self.seed,
        }
        return {name: value for name, value in fields.items() if value is not None}


class Conversation:
    """The messages so far, and how to get the next one."""

    def __init__(self, client: "httpx.Client", model: str, options: ChatOptions) -> None:
        self._client = client
        self._request = {"model": model, "stream": True, **options.sampling}
        self._system = [{"role": "system", "content": options.system}] if options.system else []
        self.clear()

    def clear(self) -> None:
        self.messages = list(self._system)

    def ask(self, text: str) -> Generator[str]:
        """The pieces of the answer as they come. Raises RemoteError.

        However it ends, what was said is remembered; a question without any answer is not.
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

    def _stream(self) -> Iterator[str]:
        request = self._request | {"messages": self.messages}
        stream = self._client.stream("POST", "/v1/chat/completions", json=request)
        with plain_errors(str(self._client.base_url)), stream as response:
            check_status(response)
            yield from _content(response.iter_lines())


def _content(lines: Iterator[str]) -> Iterator[str]:
    """Text out of server-sent events. Raises RemoteError for an error event and where the end is missing."""
    for line in lines:
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if data and (text := decode_chunk(data).text):
            yield text
    raise RemoteError("the answer was cut off")


def chat(options: ChatOptions) -> int:
    """Talk until the end of the input. Returns the exit status. Raises RemoteError."""
    is_terminal = sys.stdin.isatty()
    with connect(options.url, options.api_key) as client:
        model = options.model or find_model(client)
        conversation = Conversation(client, model, options)
        if not is_terminal:
            return _talk_in_pipe(conversation)
        print(f"{model} at {options.url}. {HELP}")
        return _talk_in_terminal(conversation)


def _talk_in_pipe(conversation: Conversation) -> int:
    for line in sys.stdin:
        if line.strip():
            _print_answer(conversation, line.strip())
    return 0


def _talk_in_terminal(conversation: Conversation) -> int:
    import readline  # noqa: F401  (input() edits lines and recalls them once it is imported)

    while (line := _read_line()) is not None:
        if line in ("/exit", "/quit"):
            break
        if line.startswith("/"):
            _obey(conversation, line)
        elif line:
            _answer_in_terminal(conversation, line)
    return 0


def _read_line() -> str | None:
    """The next line; None at the end of the input. Ctrl-C drops what was typed."""
    try:
        return input("> ").strip()
    except KeyboardInterrupt:
        print()
        return ""
    except EOFError:
        print()
        return None


def _obey(conversation: Conversation, command: str) -> None:
    if command == "/clear":
        conversation.clear()
        print("The conversation starts anew.")
    else:
        print(HELP if command == "/help" else f"There is no {command}. {HELP}")


def _answer_in_terminal(conversation: Conversation, line: str) -> None:
    try:
        _print_answer(conversation, line)
    except KeyboardInterrupt:
        print(" (stopped)")
    except RemoteError as error:
        print(f"lightwell: error: {error}", file=sys.stderr, flush=True)


def _print_answer(conversation: Conversation, line: str) -> None:
    """Print an answer as it comes. Leaving early closes the connection, which makes the server stop too."""
    with closing(conversation.ask(line)) as pieces:
        for piece in pieces:
            print(_CONTROL_CHARACTERS.sub("", piece), end="", flush=True)
    print(flush=True)
