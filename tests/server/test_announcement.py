"""What the server announces. tests/server/test_main.py runs what it shows, with a key and at a UNIX socket."""

import dataclasses
from pathlib import Path

from server.announcement import client_url, first_steps
from tests.support.serving import make_test_context


def test_clients_cannot_call_a_wildcard() -> None:
    for listening, url in (
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://0.0.0.0:8000", "http://127.0.0.1:8000"),
        ("http://[::]:1", "http://[::1]:1"),
        ("http://10.0.0.1:8000", "http://10.0.0.1:8000"),
    ):
        assert client_url(listening) == url, listening


def test_what_is_shown_depends_on_the_port_and_the_chat_template(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    context = make_test_context("ipc:///nowhere", model_folder, chat_template=str(tmp_path / "chat.jinja"))
    model = context.models.default
    assert model.chat_template is not None
    model.chat_template.close()
    assert first_steps(context, "http://127.0.0.1:8000")["chat"] == "lightwell chat"  # the default port
    assert first_steps(context, "http://127.0.0.1:1")["chat"] == "lightwell chat --url http://127.0.0.1:1"
    context.models.slots[0].served = dataclasses.replace(model, chat_template=None)
    steps = first_steps(context, "http://127.0.0.1:8000")
    assert "chat" not in steps
    assert "/v1/completions -H" in str(steps["curl"])
