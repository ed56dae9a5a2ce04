"""Addresses in what the server announces. tests/server/test_main.py runs what it shows."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.announcement import client_url, first_steps
from server.context import ServerContext
from tests.support.serving import make_test_context


@contextmanager
def context_of(model_folder: Path, **settings: Any) -> Iterator[ServerContext]:
    """Make a context, and end the process of its chat template."""
    context = make_test_context("ipc:///nowhere", model_folder, **settings)
    template = context.models.default.chat_template
    assert template is not None
    yield context
    template.close()


def test_clients_cannot_call_a_wildcard() -> None:
    for listening, url in (
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://0.0.0.0:8000", "http://127.0.0.1:8000"),
        ("http://[::]:1", "http://[::1]:1"),
        ("http://10.0.0.1:8000", "http://10.0.0.1:8000"),
    ):
        assert client_url(listening) == url, listening


def test_the_default_port_needs_no_url(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    with context_of(model_folder, chat_template=str(tmp_path / "chat.jinja")) as context:
        assert first_steps(context, "http://127.0.0.1:8000")["chat"] == "lightwell chat"
        assert first_steps(context, "http://127.0.0.1:1")["chat"] == "lightwell chat --url http://127.0.0.1:1"


def test_a_unix_socket_is_called_by_its_path(model_folder: Path) -> None:
    with context_of(model_folder) as context:
        steps = first_steps(context, client_url("unix:/a b/lw.sock"))
    assert steps.keys() == {"base_url", "curl"}
    assert steps["base_url"] == "unix:/a b/lw.sock"
    assert str(steps["curl"]).startswith("curl --unix-socket '/a b/lw.sock' http://localhost/v1/")


def test_a_key_is_named_but_not_shown(model_folder: Path, tmp_path: Path) -> None:
    """Not as a variable either: the key may come from a flag or a file, and the commands run in another shell."""
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    with context_of(model_folder, chat_template=str(tmp_path / "chat.jinja"), api_key=("one", "two")) as context:
        steps = first_steps(context, "http://127.0.0.1:8000")
    assert steps["chat"] == "lightwell chat --api-key YOUR_KEY"
    assert " -H 'Authorization: Bearer YOUR_KEY' " in str(steps["curl"])
    assert "one" not in str(steps)


def test_a_model_without_a_chat_template_completes(model_folder: Path) -> None:
    with context_of(model_folder) as context:
        context.models.slots[0].served = dataclasses.replace(context.models.default, chat_template=None)
        steps = first_steps(context, "http://127.0.0.1:8000")
    assert "chat" not in steps
    assert "/v1/completions -H" in str(steps["curl"])
