"""A server of each kind of model and settings, started once and reset after each test that uses it."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from tests.support.clients import shared_server
from tests.support.fake_engine import make_adapter
from tests.support.harmony import write_harmony_model
from tests.support.serving import RunningServer
from tests.support.tiny_tokenizer_model import write_tiny_model
from tests.support.tool_model import write_tool_model

BOS_ID, PREFIX_ID, SUFFIX_ID, MIDDLE_ID = 259, 260, 261, 262
SQL, CHESS = make_adapter("org/sql"), make_adapter("chess")


def write_fim_model(folder: Path) -> None:
    """Write a model that has fill-in-the-middle tokens, and a BOS token before each text."""
    write_tiny_model(folder)
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<s>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    tokenizer.save(str(path))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": "<s>"}))


# Kind -> what writes its model, settings of the server, and fields of the fake engine's configuration.
KINDS: dict[str, tuple[Callable[[Path], object], dict[str, Any], dict[str, Any]]] = {
    # Tools and reasoning, with tags as plain text and as control tokens.
    "plain": (partial(write_tool_model, special_tags=False), {}, {}),
    "tools": (partial(write_tool_model, special_tags=True), {}, {"vocab_size": 263}),
    # The harmony format, with markers as plain text and as control tokens.
    "harmony_plain": (partial(write_harmony_model, special_markers=False), {}, {"vocab_size": 266}),
    "harmony_tools": (partial(write_harmony_model, special_markers=True), {}, {"vocab_size": 266}),
    # Fill-in-the-middle tokens, and a BOS token before each text.
    "fim": (write_fim_model, {}, {"vocab_size": 263}),
    "strict": (write_tiny_model, {"strict": True}, {}),
    # Only for the keys of two clients and of an admin.
    "keyed": (write_tiny_model, {"api_key": ("key-a", "key-b"), "admin_key": "root", "record_requests": 9}, {}),
    # Two keys, and a context for long texts.
    "roomy": (write_tiny_model, {"api_key": ("key-a", "key-b")}, {"max_num_seqs": 64, "max_model_len": 1 << 20}),
    # Two adapters and room for a third.
    "adapted": (write_tiny_model, {"allow_runtime_lora_updating": True}, {"adapters": [SQL, CHESS], "max_loras": 3}),
}
Servers = Callable[[str], RunningServer]


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A function that returns the server of a kind."""
    started: dict[str, RunningServer] = {}
    with ExitStack() as stack:

        def server_of(kind: str) -> RunningServer:
            if kind not in started:
                write, settings, engine = KINDS[kind]
                write(folder := tmp_path_factory.mktemp(kind))
                started[kind] = stack.enter_context(shared_server(folder, settings=settings, **engine))
            return started[kind]

        yield server_of


@pytest.fixture
def of_kind(servers: Servers) -> Iterator[Servers]:
    """As `servers`, and those that the test has used are reset after it."""
    used: dict[str, RunningServer] = {}
    yield lambda kind: used.setdefault(kind, servers(kind))
    for server in used.values():
        server.reset()


def fixture_of(kind: str) -> Any:
    """Make a fixture with the name of a kind: its server."""
    return pytest.fixture(name=kind)(lambda of_kind: of_kind(kind))


plain, tools, harmony_tools, fim, strict, keyed, roomy, adapted = map(
    fixture_of, ("plain", "tools", "harmony_tools", "fim", "strict", "keyed", "roomy", "adapted")
)


@pytest.fixture(params=["plain", "tools"])
def model(of_kind: Servers, request: pytest.FixtureRequest) -> RunningServer:
    """Both, for tests of what depends on the tags."""
    return of_kind(request.param)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads
