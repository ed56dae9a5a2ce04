"""The API process, with an `ApiProcessConfig` as JSON on standard input.

SIGTERM drains the server: it accepts no new work, finishes running requests and exits with code 0. A second SIGTERM
ends it at once. If the engine dies and is not restarted, requests fail, probes report it for `DEATH_GRACE` seconds, and
the exit code is 1. The configuration comes from standard input only, never from environment variables.
"""

import asyncio
import contextlib
import faulthandler
import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence, Set
from functools import partial

import msgspec

from engine.shared.launcher import collect_garbage, die_with_parent
from engine.shared.logs import configure_logging
from server.api_server import APIServer, collect_in_steps, raise_file_limit
from server.app import create_app
from server.context import Role, ServerContext
from server.http.errors import EngineUnavailableError
from server.models.registry import ModelRegistry
from server.part import load_parts, server_type
from server.part_table import load_module
from server.processes.supervisor_channel import (
    DUMP_SIGNAL,
    HEARTBEAT_SECONDS,
    Channel,
    EngineGone,
    EngineStarted,
    Heartbeat,
)
from server.running_servers import DEFAULT_URL, RunningServer, registered
from server.settings.process_configs import ApiProcessConfig
from server.shares import MemoryBudget
from server.sockets import listening, url
from server.tenants import load_api_keys

logger = logging.getLogger("lightwell.api")  # __name__ is __main__ here

DEATH_GRACE = 2.0  # seconds between the engine's death and the exit, in which probes and clients can notice it
KEY = "YOUR_KEY"  # stands for the key, which the log must not hold
WILDCARDS = {"//0.0.0.0": "//127.0.0.1", "//[::]": "//[::1]"}  # addresses to listen on, but not to call


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is handled by the supervisor
    die_with_parent(os.getppid())
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=ApiProcessConfig)
    flush_logs = configure_logging(config.settings.log_level, config.settings.log_format)
    if config.coordinator is not None:
        logger.setLevel(logging.ERROR)  # the coordinator says all else
    collect_in_steps()
    exit_code = run(config, flush_logs)
    flush_logs()
    os._exit(exit_code)  # sys.exit would wait for threads that download an adapter


def run(config: ApiProcessConfig, flush_logs: Callable[[], None]) -> int:
    """Serve until the process is asked to stop or the engine dies. Return the exit code."""
    settings = config.settings
    with contextlib.ExitStack() as stack:
        try:
            sockets = []
            if config.coordinator is None:
                sockets = stack.enter_context(listening(settings.host, settings.port, settings.uds))
            channel = None if config.supervisor_fd is None else Channel.from_fd(config.supervisor_fd)
            context = make_context(config, channel)
        except (OSError, ValueError) as error:  # errors in the configuration, which need no traceback
            logger.error("%s", error)
            return 1
        try:
            app = create_app(context)
            context.role.lead(context, app)
            server = server_type()(app, context, raise_file_limit(settings.api_server_count))
            collect_garbage()
            addresses = [url(each, is_tls=settings.ssl_certfile is not None) for each in sockets]
            if addresses:
                logger.debug("%s is open for health probes", addresses[0])
            return asyncio.run(Lifecycle(server, context, flush_logs, channel).run(sockets, addresses))
        except Exception:
            logger.exception("the server failed")
            return 1


def make_context(config: ApiProcessConfig, channel: Channel | None = None) -> ServerContext:
    """Create the context from the models' files. Raises ValueError if they are missing or invalid.

    `channel` leads to the supervisor; without one, no engine is restarted.
    """
    settings, role = config.settings, Role()
    if config.workers or config.coordinator is not None:
        role = load_module("workers", "relay").choose_role(config)
    kind = load_module("models", "manager").ModelManager if settings.unloads_models else ModelRegistry
    models: ModelRegistry = kind(config, partial(role.new_metrics, settings), channel)
    metrics = models.slots[0].metrics
    api_keys = load_api_keys(settings)
    context = ServerContext(
        settings=settings,
        created=int(time.time()),
        metrics=metrics,
        role=role,
        running=role.running,
        api_keys=api_keys,
        answers=MemoryBudget(settings.max_buffered_bytes // settings.api_server_count),
        models=models,
        ledger=role.new_ledger(settings),
    )
    for part in load_parts():
        part.attach(context)
    role.join(context)
    context.services.append(models)
    models.load(role.new_client(settings, metrics))  # the last step, since it starts a process
    return context


class Lifecycle:
    """Runs the server until a signal, the engine's death or a failure of the server ends it.

    `channel` leads to the supervisor; without one, the engine is not restarted.
    """

    def __init__(
        self, server: APIServer, context: ServerContext, flush_logs: Callable[[], None], channel: Channel | None = None
    ) -> None:
        self._server = server
        self._context = context
        self._models = context.models
        self._died = context.models.died
        self._flush_logs = flush_logs
        self._channel = channel
        self._terminated = asyncio.Event()

    async def run(self, sockets: list[socket.socket], addresses: Sequence[str]) -> int:
        """Serve until the end, announced with the URLs `addresses`. Return the exit code: 0 after SIGTERM, else 1."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)
        if self._context.settings.api_keys_file is not None:
            loop.add_signal_handler(signal.SIGHUP, loop.run_in_executor, None, self._context.api_keys.reload)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])  # the supervisor starts this process so
        serving = asyncio.create_task(self._server.serve(sockets))
        opening = announce(self._context, addresses) if addresses else self._open()
        announcing = asyncio.create_task(opening)
        events = [asyncio.create_task(event.wait()) for event in (self._terminated, self._died)]
        talking = [] if self._channel is None else [asyncio.create_task(self._talk_to_supervisor(self._channel))]
        await asyncio.wait([serving, *events], return_when=asyncio.FIRST_COMPLETED)
        if self._terminated.is_set():
            await self._drain()
        if self._died.is_set() and self._models.default.client.info is not None:  # its requests have already failed
            await asyncio.sleep(DEATH_GRACE)
        for task in (announcing, *events, *talking):
            task.cancel()
        for model in self._models.loaded:
            model.client.fail_streams(EngineUnavailableError("The server is shutting down.", close=True))
        exit_code = 0 if self._terminated.is_set() and not self._died.is_set() else 1
        self._server.stop()
        await serving
        return exit_code

    async def _open(self) -> None:
        """Have the coordinator pass connections on to this process once it can answer."""
        await self._models.default.client.became_ready.wait()
        await self._context.role.open()

    def _on_sigterm(self) -> None:
        if self._terminated.is_set():
            self._flush_logs()
            os._exit(1)
        self._terminated.set()

    async def _talk_to_supervisor(self, channel: Channel) -> None:
        """Read the supervisor's messages, and send a heartbeat each second and when the state of an engine changes."""
        faulthandler.register(DUMP_SIGNAL)
        asyncio.get_running_loop().add_reader(channel, self._on_supervisor_message, channel)
        while True:
            channel.send(Heartbeat(tuple(pid for model in self._models.loaded for pid in model.client.ready_pids)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._models.wait_changed(), HEARTBEAT_SECONDS)

    def _on_supervisor_message(self, channel: Channel) -> None:
        for message in channel.receive():
            match message:
                case EngineStarted():
                    self._models.engine_started(message.number, message.pid)
                case EngineGone():
                    self._models.engine_gone(message.number, message.reason)
        if channel.has_ended:
            asyncio.get_running_loop().remove_reader(channel)

    async def _drain(self) -> None:
        """Accept no new work and wait for the current requests, but at most --drain-timeout seconds."""
        self._models.drain()
        requests = set(self._server.server_state.tasks)
        num_requests = len(requests) + sum(worker.num_running for worker in self._context.workers)
        logger.info("draining: waiting for %d running requests", num_requests)
        death = asyncio.create_task(self._died.wait())
        finished = asyncio.create_task(self._finish(requests))
        waiting = {death, finished}
        await asyncio.wait(waiting, timeout=self._context.settings.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        death.cancel()
        finished.cancel()

    async def _finish(self, requests: Set[asyncio.Task[None]]) -> None:
        """Wait until requests have ended, and until no other process has some that this one serves."""
        if requests:
            await asyncio.wait(requests)
        await self._context.role.finish()


# How the server is announced once it is ready: in the log, and in a file by which `lightwell chat` finds it.


async def announce(context: ServerContext, urls: Sequence[str]) -> None:
    """Wait until the models are loaded, log how to use them, and keep the server registered until cancelled."""
    state = await context.models.wait_started()
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
        address = shlex.quote(url.removeprefix("unix:"))
        return {"base_url": url, "curl": f"curl --unix-socket {address} http://localhost{path}{options}"}
    steps: dict[str, object] = {"base_url": f"{url}/v1", "curl": f"curl {url}{path}{options}"}
    if can_chat:
        flags = ("" if url == DEFAULT_URL else f" --url {url}") + (f" --api-key {KEY}" if key else "")
        steps["chat"] = f"lightwell chat{flags}"
    return steps


if __name__ == "__main__":
    main()
