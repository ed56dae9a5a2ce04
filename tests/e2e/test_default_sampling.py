"""Default sampling with a real model: the bits are those of explicit fields, and the answers make sense."""

import concurrent.futures
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.package_aliases import PACKAGE_ALIASES
from tests.support.server_process import CHAT, COMPLETIONS, MODEL, ServerProcess, running_server

CARD = dict(PACKAGE_ALIASES[MODEL].card_sampling)
NUM_SEEDS = 50
MAX_TOKENS = 100
WORD = re.compile(r"\W*[A-Za-z][A-Za-z'’-]*\W*|[\d\W]+")


@pytest.fixture(scope="module")
def default_server(smollm2_path: Path) -> Iterator[ServerProcess]:
    """A server whose default sampling is that of the alias: its file is given as a path, which has no card."""
    flags = ("--max-model-len=2048", "--kv-cache-memory=128MiB", "--record-requests=10")
    with running_server(smollm2_path, *flags, f"--default-sampling={json.dumps(CARD)}") as server:
        yield server


def hello(server: ServerProcess, seed: int, **fields: Any) -> dict[str, Any]:
    return server.answer(CHAT, {"messages": [{"role": "user", "content": "hello"}], "seed": seed} | fields)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "Once upon a time", "max_tokens": 24, "logprobs": 3, "n": 2}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi!"}], "logprobs": True, "max_tokens": 24}),
    ],
)
def test_defaults_give_the_bits_of_the_same_fields(
    default_server: ServerProcess, server: ServerProcess, path: str, body: dict[str, Any]
) -> None:
    """Whether the request sends them to this server or to one without default sampling."""
    default = default_server.answer(path, body | {"seed": 5})
    explicit = default_server.answer(path, body | {"seed": 5} | CARD)
    elsewhere = server.answer(path, body | {"seed": 5} | CARD)
    assert default["choices"] == explicit["choices"] == elsewhere["choices"]
    assert default["choices"] != default_server.answer(path, body | {"seed": 5, "temperature": 1})["choices"]
    assert default["system_fingerprint"].startswith(elsewhere["system_fingerprint"] + "-")


def test_what_was_resolved_is_replayed(default_server: ServerProcess) -> None:
    answer = hello(default_server, 3, max_tokens=30)
    replay = default_server.http.post(f"/v1/requests/{answer['id']}/replay").json()
    assert replay["bit_equal"], replay


def test_hello_is_answered_with_every_seed(default_server: ServerProcess) -> None:
    """The answer ends by itself, soon, and is made of words. At temperature 1 that holds for 35 of 50 seeds."""
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda seed: hello(default_server, seed), range(NUM_SEEDS)))
    for seed, answer in enumerate(answers):
        (choice,) = answer["choices"]
        words = choice["message"]["content"].split()
        assert choice["finish_reason"] == "stop", (seed, choice)
        assert answer["usage"]["completion_tokens"] <= MAX_TOKENS, (seed, choice)
        assert words, seed
        assert [word for word in words if not WORD.fullmatch(word)] == [], (seed, choice)


def test_lightwell_chat_says_hello(default_server: ServerProcess) -> None:
    command = [sys.executable, "-m", "server.cli.main", "chat", "--url", default_server.url, "--seed", "1"]
    done = subprocess.run(command, input="hello\n", capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == hello(default_server, 1)["choices"][0]["message"]["content"].strip()
    assert done.stderr == ""
