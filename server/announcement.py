"""Announces that the server is ready: in the log, and in a file by which `lightwell chat` finds it."""

import asyncio
import logging
import shlex

import msgspec

from server.context import ServerContext
from server.running_servers import DEFAULT_URL, RunningServer, registered

logger = logging.getLogger("lightwell.api")

KEY = "YOUR_KEY"  # stands for the key, which the log must not hold

WILDCARDS = {"//0.0.0.0": "//127.0.0.1", "//[::]": "//[::1]"}  # addresses to listen on, but not to call


async def announce(context: ServerContext, url: str) -> None:
    """Wait until the model is loaded, log how to use it, and keep the server registered until the task is cancelled."""
    model = context.models.default
    await model.client.became_ready.wait()
    name = model.name
    logger.info("%s is ready, listening on %s", name, url, extra={"details": first_steps(context, client_url(url))})
    with registered(RunningServer(url=client_url(url), model=name)):
        await asyncio.Event().wait()


def client_url(url: str) -> str:
    """Return a URL by which this machine reaches a server that listens on `url`."""
    for wildcard, address in WILDCARDS.items():
        url = url.replace(wildcard, address)
    return url


def first_steps(context: ServerContext, url: str) -> dict[str, object]:
    """Return the base URL for clients, a curl command, and the command to chat if the model can. They hold no key."""
    model = context.models.default
    body: dict[str, object] = {"model": model.name, "max_tokens": 64}
    if model.chat_template is None:
        path, body["prompt"] = "/v1/completions", "Once upon a time"
    else:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "hello"}]
    key = f" -H 'Authorization: Bearer {KEY}'" if context.settings.needs_key else ""
    data = shlex.quote(msgspec.json.encode(body).decode())
    options = f"{key} -H 'Content-Type: application/json' -d {data}"
    if url.startswith("unix:"):
        socket = shlex.quote(url.removeprefix("unix:"))
        return {"base_url": url, "curl": f"curl --unix-socket {socket} http://localhost{path}{options}"}
    steps: dict[str, object] = {"base_url": f"{url}/v1", "curl": f"curl {url}{path}{options}"}
    if model.chat_template is not None:
        flags = ("" if url == DEFAULT_URL else f" --url {url}") + (f" --api-key {KEY}" if key else "")
        steps["chat"] = f"lightwell chat{flags}"
    return steps
