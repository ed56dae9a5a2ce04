"""Announces that the server is ready: in the log, and in a file by which `lightwell chat` finds it."""

import asyncio
import logging
import shlex
from collections.abc import Sequence

import msgspec

from server.context import ServerContext
from server.running_servers import DEFAULT_URL, RunningServer, registered

logger = logging.getLogger("lightwell.api")

KEY = "YOUR_KEY"  # stands for the key, which the log must not hold

WILDCARDS = {"//0.0.0.0": "//127.0.0.1", "//[::]": "//[::1]"}  # addresses to listen on, but not to call


async def announce(context: ServerContext, urls: Sequence[str]) -> None:
    """Wait until the models are loaded, log how to use them, and keep the server registered until cancelled."""
    state = await context.source.wait_started()
    url = client_url(urls[0])
    logger.info("%s, listening on %s", state, " and ".join(urls), extra={"details": first_steps(context, url)})
    with registered(RunningServer(url=url, model=context.models.name)):
        await asyncio.Event().wait()


def client_url(url: str) -> str:
    """Return a URL by which this machine reaches a server that listens on `url`."""
    for wildcard, address in WILDCARDS.items():
        url = url.replace(wildcard, address)
    return url


def first_steps(context: ServerContext, url: str) -> dict[str, object]:
    """Return the base URL for clients, a curl command, and the command to chat if the model can. They hold no key."""
    served = context.models.slots[0].served
    can_chat = served is None or served.chat_template is not None
    body: dict[str, object] = {"model": context.models.name, "max_tokens": 64}
    if not can_chat:
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
    if can_chat:
        flags = ("" if url == DEFAULT_URL else f" --url {url}") + (f" --api-key {KEY}" if key else "")
        steps["chat"] = f"lightwell chat{flags}"
    return steps
