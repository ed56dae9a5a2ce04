"""`lightwell chat` in its own process against a stub server, through pipes and at a pseudo-terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.support.stub_openai import Script, StubServer


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with StubServer() as server:
        yield server


def command(url: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "server.cli.main", "chat", "--url", url, *arguments]


def talk(url: str, text: str, *arguments: str) -> tuple[int, str, str]:
    """Run the chat with `text` as its standard input; return status, stdout and stderr."""
    done = subprocess.run(command(url, *arguments), input=text, capture_output=True, text=True, timeout=20, check=False)
    return done.returncode, done.stdout, done.stderr


# Pipes.


def test_each_line_is_a_message_and_the_answers_are_remembered(stub: StubServer) -> None:
    assert talk(stub.url, "One\n\nTwo\n", "--system", "Be brief.") == (0, "Hello\nHello\n", "")
    first, second = (seen.body for seen in stub.requests)
    system = {"role": "system", "content": "Be brief."}
    assert first == {
        "model": "stub-model",
        "stream": True,
        "max_completion_tokens": 1024,
        "messages": [system, {"role": "user", "content": "One"}],
    }
    assert second["messages"] == [
        system,
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Two"},
    ]


def test_sampling_settings_are_sent(stub: StubServer) -> None:
    flags = [
        "--temperature",
        "0",
        "--top-p",
        "0.9",
        "--max-tokens",
        "7",
        "--seed",
        "3",
        "--model",
        "m",
        "--api-key",
        "k",
    ]
    assert talk(f"{stub.url}/v1/", "Hi", *flags) == (0, "Hello\n", "")
    assert len(stub.seen) == 1  # the list of models is not requested
    assert stub.seen[0].path == "/v1/chat/completions"
    assert stub.seen[0].headers["authorization"] == "Bearer k"
    sampling = {"temperature": 0.0, "top_p": 0.9, "max_completion_tokens": 7, "seed": 3, "model": "m"}
    assert sampling.items() <= stub.seen[0].body.items()


def test_an_answer_cannot_steer_the_terminal(stub: StubServer) -> None:
    stub.script = Script([["a\x1b]0;title\x07"], ["\x1b[2J\rb\x9b1m\n"], ["\tç👩‍🚀"]])
    assert talk(stub.url, "Hi\n") == (0, "a]0;title[2Jb1m\n\tç👩‍🚀\n", "")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            Script(status=401, error="Incorrect API key\nprovided."),
            "the server returned status 401: Incorrect API key provided. (--api-key or LIGHTWELL_API_KEY is the key)",
        ),
        (Script(error="The server had an error."), "the answer failed: The server had an error."),
        (Script(with_done=False), "the answer was cut off"),
    ],
)
def test_failures_are_one_line(stub: StubServer, script: Script, message: str) -> None:
    stub.script = script
    status, _, errors = talk(stub.url, "Hi\n")
    assert (status, errors) == (1, f"lightwell: error: {message}\n")


def test_a_connection_that_breaks(stub: StubServer) -> None:
    stub.script = Script(close_early=True)
    status, output, errors = talk(stub.url, "Hi\n")
    assert (status, output) == (1, "Hello")
    assert errors == f"lightwell: error: the server at {stub.url} closed the connection early\n"


def test_no_server() -> None:
    status, output, errors = talk("http://127.0.0.1:9", "Hi\n")
    assert (status, output) == (1, "")
    assert errors == "lightwell: error: no server answers at http://127.0.0.1:9 (`lightwell serve` starts one)\n"


def test_ctrl_c_in_a_pipe_ends_without_a_traceback(stub: StubServer) -> None:
    stub.script = Script(never_ends=True)
    process = subprocess.Popen(
        command(stub.url), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write("Hi\n")
    process.stdin.flush()
    assert process.stdout.read(5) == "Hello"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (130, "")
    assert stub.disconnected.wait(2)


@pytest.mark.parametrize(
    ("finish_reason", "errors"),
    [("stop", ""), ("length", "(cut off at --max-tokens or at the end of the context)\n")],
)
def test_an_answer_that_is_cut_off_says_so(stub: StubServer, finish_reason: str, errors: str) -> None:
    stub.script = Script(finish_reason=finish_reason)
    assert talk(stub.url, "Hi\n", "--max-tokens", "2") == (0, "Hello\n", errors)


def test_a_line_that_is_no_text_ends_the_chat_after_those_before_it(stub: StubServer) -> None:
    done = subprocess.run(command(stub.url), input=b"One\n\xff\nTwo\n", capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (1, b"Hello\n")
    assert done.stderr == b"lightwell: error: standard input: line 2 is not utf-8 (byte 1)\n"


def test_an_answer_that_cannot_be_written_ends_the_chat(stub: StubServer) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command(stub.url), input=b"One\n", stdout=full, stderr=subprocess.PIPE, timeout=20, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"lightwell: error: standard output cannot be written: No space left on device\n"


# A terminal.

# Makes standard input the controlling terminal, which turns Ctrl-C into a signal, and executes the chat.
AT_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A chat process at a pseudo-terminal."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self.descriptor, other_end = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_TERMINAL, *command],
            stdin=other_end,
            stdout=other_end,
            stderr=other_end,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null"} | environment,
        )
        os.close(other_end)
        self.output = ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def read_until(self, pattern: str, seconds: float = 10) -> str:
        """Return the output up to the pattern and including it, and remove it from the buffer."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.output)):
            assert time.monotonic() < deadline, self.output
            if select.select([self.descriptor], [], [], 0.1)[0]:
                self.output += os.read(self.descriptor, 4096).decode(errors="replace")
        before, self.output = self.output[: match.end()], self.output[match.end() :]
        return before.replace("\r", "")

    def end(self) -> int:
        """Wait for the end of the process and return its exit status."""
        return self.process.wait(10)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.descriptor)


@pytest.fixture
def terminal(stub: StubServer) -> Iterator[Terminal]:
    terminal = Terminal(command(stub.url))
    terminal.read_until("> ")
    yield terminal
    terminal.close()


def test_greeting(stub: StubServer) -> None:
    terminal = Terminal(command(stub.url))
    assert f"stub-model at {stub.url}. /clear starts" in terminal.read_until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    os.close(terminal.descriptor)


def test_a_conversation(stub: StubServer, terminal: Terminal) -> None:
    terminal.type("One\n")
    assert terminal.read_until("> ").endswith("Hello\n> ")
    terminal.type("/clear\n")
    terminal.read_until("new conversation\\.\r\n> ")
    terminal.type("/help\n")
    terminal.read_until("/exit or Ctrl-D quits.*\n> ")
    terminal.type("/nonsense\n")
    terminal.read_until("Unknown command /nonsense.*\n> ")
    terminal.type("Two\n")
    terminal.read_until("Hello\r\n> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0
    assert [len(seen.body["messages"]) for seen in stub.requests] == [1, 1]


def test_ctrl_c_stops_the_answer_and_not_the_chat(stub: StubServer, terminal: Terminal) -> None:
    stub.script = Script(never_ends=True)
    terminal.type("One\n")
    terminal.read_until("Hello")
    terminal.type("\x03")
    terminal.read_until(r"\(stopped\)\r\n> ")
    assert stub.disconnected.wait(2)
    stub.script = Script()
    terminal.type("Two\n")
    terminal.read_until("Hello\r\n> ")
    contents = [message["content"] for message in stub.requests[1].body["messages"]]
    assert contents == ["One", "Hello", "Two"]  # the stopped answer stays in the conversation
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_at_the_prompt_drops_the_line(stub: StubServer, terminal: Terminal) -> None:
    terminal.type("half a li")
    terminal.read_until("half a li")
    time.sleep(0.2)  # readline sees the signal only once it waits for the next key
    terminal.type("\x03")
    terminal.read_until("\r\n> ")
    terminal.type("Two\n")
    terminal.read_until("Hello\r\n> ")
    assert stub.requests[0].body["messages"] == [{"role": "user", "content": "Two"}]


def test_a_typed_line_that_is_no_text_does_not_end_the_conversation(stub: StubServer, terminal: Terminal) -> None:
    os.write(terminal.descriptor, b"caf\xe9\n")
    terminal.read_until("lightwell: error: the line is not utf-8\r\n> ")
    terminal.type("Two\n")
    terminal.read_until("Hello\r\n> ")
    assert stub.requests[0].body["messages"] == [{"role": "user", "content": "Two"}]


def test_a_failure_does_not_end_the_conversation(stub: StubServer, terminal: Terminal) -> None:
    stub.script = Script(status=429, error="Too many requests.")
    terminal.type("One\n")
    terminal.read_until("lightwell: error: the server returned status 429: Too many requests.\r\n> ")
    stub.script = Script()
    terminal.type("Two\n")
    terminal.read_until("Hello\r\n> ")
    assert stub.requests[1].body["messages"] == [{"role": "user", "content": "Two"}]
