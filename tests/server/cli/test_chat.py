"""`lightwell chat` in its own process against a stub server, through pipes and at a pseudo-terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import psutil
import pytest

from tests.support.serving import wait_until
from tests.support.stub_openai import Script, StubServer


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with StubServer() as server:
        yield server


def command(url: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "server.cli.main", "chat", "--url", url, *arguments]


def talk(url: str, text: bytes | str, *arguments: str) -> tuple[int, str, str]:
    """Run the chat with `text` as its standard input; return status, stdout and stderr."""
    data = text if isinstance(text, bytes) else text.encode()
    done = subprocess.run(command(url, *arguments), input=data, capture_output=True, timeout=60, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# Pipes.


def test_each_line_is_a_message_and_the_answers_are_remembered(stub: StubServer) -> None:
    assert talk(stub.url, "One\n\nTwo\n", "--system", "Be brief.") == (0, "Hello\nHello\n", "")
    first, second = (seen.body for seen in stub.requests)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One"}]
    assert first == {"model": "stub-model", "stream": True, "max_completion_tokens": 1024, "messages": messages}
    messages += [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Two"}]
    assert second["messages"] == messages


def test_sampling_settings_are_sent(stub: StubServer) -> None:
    flags = ["--temperature=0", "--top-p=0.9", "--max-tokens=7", "--seed=3", "--model=m", "--api-key=k"]
    assert talk(f"{stub.url}/v1/", "Hi", *flags) == (0, "Hello\n", "")
    assert len(stub.seen) == 1  # the list of models is not requested
    assert stub.seen[0].path == "/v1/chat/completions"
    assert stub.seen[0].headers["authorization"] == "Bearer k"
    sampling = {"temperature": 0.0, "top_p": 0.9, "max_completion_tokens": 7, "seed": 3, "model": "m"}
    assert sampling.items() <= stub.seen[0].body.items()


STEERS = Script([["a\x1b]0;title\x07"], ["\x1b[2J\rb\x9b1m\n"], ["\tç👩‍🚀"]])
CLOSED_EARLY = "peer closed connection without sending complete message body (incomplete chunked read)"
REFUSED = "the server returned status 401: Incorrect API key. (--api-key or LIGHTWELL_API_KEY is the key)"


def test_an_answer_and_failures(stub: StubServer) -> None:
    for script, text, output, error in (
        (STEERS, b"Hi\n", "a]0;title[2Jb1m\n\tç👩‍🚀\n", None),  # no answer steers the terminal
        (Script(finish_reason="stop"), b"Hi\n", "Hello\n", None),
        (Script(), b"One\n\xff\nTwo\n", "Hello\n", "standard input: line 2 is not utf-8 (byte 1)"),
        (Script(close_early=True), b"Hi\n", "Hello", f"the server at {stub.url}: {CLOSED_EARLY}"),
        (Script(status=401, error="Incorrect\nAPI key."), b"Hi\n", "", REFUSED),
        (Script(error="The server had an error."), b"Hi\n", "Hello", "the answer failed: The server had an error."),
        (Script(with_done=False), b"Hi\n", "Hello", "the answer was cut off"),
    ):
        stub.script = script
        status, printed, said = talk(stub.url, text)
        assert (status, said) == ((0, "") if error is None else (1, f"lightwell: error: {error}\n"))
        assert printed.rstrip("\n") == output.rstrip("\n")


def test_an_answer_that_is_cut_off_says_so(stub: StubServer) -> None:
    stub.script = Script(finish_reason="length")
    cut_off = "(cut off at --max-tokens or at the end of the context)\n"
    assert talk(stub.url, "Hi\n", "--max-tokens", "2") == (0, "Hello\n", cut_off)


def test_no_server() -> None:
    status, output, error = talk("http://127.0.0.1:9", "Hi\n")
    assert (status, output) == (1, "")
    assert error.startswith("lightwell: error: no server answers at http://127.0.0.1:9 (")


def test_ctrl_c_in_a_pipe_ends_without_a_traceback(stub: StubServer) -> None:
    stub.script = Script(never_ends=True)
    pipe = subprocess.PIPE
    process = subprocess.Popen(command(stub.url), stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdin
    assert process.stdout
    process.stdin.write("Hi\n")
    process.stdin.flush()
    assert process.stdout.read(5) == "Hello"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert stub.disconnected.wait(60)


def test_an_answer_that_cannot_be_written_ends_the_chat(stub: StubServer) -> None:
    with open("/dev/full", "wb") as full:
        pipe = subprocess.PIPE
        done = subprocess.run(command(stub.url), input=b"One\n", stdout=full, stderr=pipe, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == b"lightwell: error: No space left on device\n"


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
        arguments = [sys.executable, "-c", AT_TERMINAL, *command]
        env = {**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null", **environment}
        self.process = subprocess.Popen(
            arguments, stdin=other_end, stdout=other_end, stderr=other_end, start_new_session=True, env=env
        )
        os.close(other_end)
        self.output = ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def read_until(self, pattern: str, limit: float = 60.0) -> str:
        """Return the output up to the pattern and including it, and remove it from the buffer. `limit` is for hangs."""
        while not (match := re.search(pattern, self.output)):
            assert select.select([self.descriptor], [], [], limit)[0], self.output
            self.output += os.read(self.descriptor, 4096).decode(errors="replace")
        before, self.output = self.output[: match.end()], self.output[match.end() :]
        return before.replace("\r", "")

    def end(self) -> int:
        """Wait for the end of the process and return its exit status."""
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.descriptor)


@pytest.fixture
def terminal(stub: StubServer) -> Iterator[Terminal]:
    with closing(Terminal(command(stub.url))) as terminal:
        assert f"stub-model at {stub.url}. /clear starts" in terminal.read_until("> ")
        yield terminal


def test_a_conversation(stub: StubServer, terminal: Terminal) -> None:
    for line, pattern in (
        ("One", "Hello\r\n> "),
        ("/clear", "new conversation\\.\r\n> "),
        ("/help", "/exit or Ctrl-D quits.*\n> "),
        ("/nonsense", "Unknown command /nonsense.*\n> "),
        ("Two", "Hello\r\n> "),
    ):
        terminal.type(f"{line}\n")
        terminal.read_until(pattern)
    terminal.type("/exit\n")
    assert terminal.end() == 0
    assert [len(seen.body["messages"]) for seen in stub.requests] == [1, 1]


def test_ctrl_c_stops_the_answer_and_not_the_chat(stub: StubServer, terminal: Terminal) -> None:
    stub.script = Script(never_ends=True)
    terminal.type("One\n")
    terminal.read_until("Hello")
    terminal.type("\x03")
    terminal.read_until(r"\(stopped\)\r\n> ")
    assert stub.disconnected.wait(60)
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
    wait_until(lambda: psutil.Process(terminal.process.pid).status() == psutil.STATUS_SLEEPING)  # for the next key
    terminal.type("\x03")
    terminal.read_until("\r\n> ")
    terminal.type("Two\n")
    terminal.read_until("Hello\r\n> ")
    assert stub.requests[0].body["messages"] == [{"role": "user", "content": "Two"}]


def test_a_failure_does_not_end_the_conversation(stub: StubServer, terminal: Terminal) -> None:
    for line, script, error in (
        (b"caf\xe9\n", Script(), "the line is not utf-8"),
        (b"One\n", Script(status=429, error="Too many."), "the server returned status 429: Too many."),
    ):
        stub.script = script
        os.write(terminal.descriptor, line)
        terminal.read_until(f"lightwell: error: {error}\r\n> ")
    stub.script = Script()
    terminal.type("Two\n")
    terminal.read_until("Hello\r\n> ")
    assert stub.requests[-1].body["messages"] == [{"role": "user", "content": "Two"}]
