"""A server whose model follows a script: it calls a tool of the client, and then repeats what the tool returned.

So programs that a small model cannot drive hold a whole conversation. All but the engine is real.
"""

import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp

from server.app import create_app
from server.main import make_context
from server.settings.process_configs import EngineProcess
from server.settings.table import Settings
from tests.support.fake_engine import FakeEngine, FakeEngineConfig
from tests.support.serving import api_config, running_server
from tests.support.tiny_tokenizer_model import IM_START_ID
from tests.support.tool_model import write_tool_model

MODEL = "tiny"
NAMES = (MODEL, "gpt-5.5", "gpt-6-sol")  # Codex sends other tools to models that it knows
GREETING = "Hello there."
CONTEXT = 1 << 20  # tokens; each is a byte


@dataclass(frozen=True)
class Exchange:
    """A request and the status of its answer."""

    method: str
    path: str  # with the query
    headers: dict[str, str]
    body: Any
    status: int
    warnings: str  # the header x-lightwell-warnings
    answer: str


@dataclass
class Script:
    """What the model writes: a call where the request has the tool, what the tool returned, else `greeting`."""

    tool: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    greeting: str = GREETING

    def reply_to(self, prompt: list[int]) -> list[int]:
        text = _decode(prompt)
        starts = [index for index, token_id in enumerate(prompt) if token_id == IM_START_ID]
        turn = _decode(prompt[starts[-2] : starts[-1]]) if len(starts) > 1 else ""
        reply = self.greeting
        if turn.startswith("tool\n"):
            reply = f"It says: {turn.removeprefix('tool').strip()[:500]}"
        elif self.tool and f'"name": "{self.tool}"' in text:
            reply = f"I will look.\n{tool_call(self.tool, self.arguments)}"
        return list((f"Hm.</think>{reply}" if text.endswith("<think>\n") else reply).encode())


def tool_call(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def _decode(token_ids: list[int]) -> str:
    return bytes(token_id for token_id in token_ids if token_id < 256).decode(errors="replace")


@dataclass
class ScriptedServer:
    url: str
    script: Script
    exchanges: list[Exchange]


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """Run the server. `script` may be changed between requests; `exchanges` has all requests so far."""
    script, exchanges = Script(), list[Exchange]()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lw-")))
        write_tool_model(folder, special_tags=False)
        config = FakeEngineConfig(address=f"ipc://{folder}/engine", max_model_len=CONTEXT, num_blocks=CONTEXT // 32)
        engine = stack.enter_context(FakeEngine(config, script.reply_to))
        context = make_context(api_config(Settings(), EngineProcess(config.address), folder, NAMES))
        app = create_app(context)
        app.layers = Recorder(app.layers, exchanges=exchanges)
        server = stack.enter_context(running_server(context, engine, app=app))
        yield ScriptedServer(server.url, script, exchanges)


class Recorder(BaseHTTPMiddleware):
    """Appends every exchange to a list."""

    def __init__(self, app: ASGIApp, exchanges: list[Exchange]) -> None:
        super().__init__(app)
        self._exchanges = exchanges

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        body, answer = await request.body(), bytearray()
        response: StreamingResponse = await call_next(request)
        parts: Any = response.body_iterator

        async def kept() -> AsyncIterator[Any]:
            try:
                async for part in parts:
                    answer.extend(part)
                    yield part
            finally:
                path, query = request.url.path, request.url.query
                exchange = Exchange(
                    method=request.method,
                    path=f"{path}?{query}" if query else path,
                    headers=dict(request.headers),
                    body=_json(body),
                    status=response.status_code,
                    warnings=response.headers.get("x-lightwell-warnings", ""),
                    answer=answer.decode(errors="replace"),
                )
                self._exchanges.append(exchange)

        response.body_iterator = kept()
        return response


def _json(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        return body.decode(errors="replace")
