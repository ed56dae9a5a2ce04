"""A coordinator and a worker, as API processes would be, each on a port of its own."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

from msgspec.structs import replace

from server.app import create_app
from server.main import make_context
from server.parts.workers.relay import Relay, WorkerRole
from server.processes.supervisor_channel import make_channel
from server.settings.process_configs import ApiProcessConfig, EngineProcess, WorkerLink
from server.settings.table import Settings
from tests.support.fake_engine import FakeEngine, FakeEngineConfig
from tests.support.serving import MODEL_NAMES, RunningServer, api_config, own_address, running_server, wait_until

Pair: TypeAlias = tuple[RunningServer, RunningServer]  # the coordinator, and the worker


@contextmanager
def running_worker(
    fake_engine: FakeEngine,
    model_folder: Path,
    *,
    server: dict[str, Any] | None = None,
    can_restart: bool = False,
    more_engines: Sequence[FakeEngine] = (),
    **settings: Any,
) -> Iterator[Pair]:
    """Run a coordinator in front of `fake_engine`, and a worker. Yield both, the coordinator first.

    `can_restart`: with a supervisor, which a test is, an engine that dies is replaced.
    """
    engines = tuple(EngineProcess(engine.config.address) for engine in (fake_engine, *more_engines))
    config = api_config(Settings(**settings), engines[0], model_folder, MODEL_NAMES)
    config = replace(config, models=(replace(config.models[0], engines=engines),))
    with own_address() as address, ExitStack() as stack:
        channel, other = make_channel()
        stack.callback(channel.close)
        stack.callback(other.close)
        context = make_context(config, channel if can_restart else None)
        app = create_app(context)
        context.workers.append(Relay(address, context, app))
        link = WorkerLink(address, sockets_fd=-1)
        worker = make_context(ApiProcessConfig(settings=config.settings, models=config.models, coordinator=link))
        stack.enter_context(patch.object(WorkerRole, "accept", return_value=None))  # it has a port of its own
        with (
            running_server(context, fake_engine, app=app, **(server or {})) as coordinator,
            running_server(worker, fake_engine, **(server or {})) as running,
        ):
            yield coordinator, running


@contextmanager
def shared_pair(model_folder: Path, *, engine: dict[str, Any] | None = None, **settings: Any) -> Iterator[Pair]:
    """Run both with their own fake engine, for several tests. `engine` are fields of `FakeEngineConfig`."""
    with (
        own_address() as address,
        FakeEngine(FakeEngineConfig(address=address, **(engine or {}))) as fake_engine,
        running_worker(fake_engine, model_folder, **settings) as pair,
    ):
        yield pair


def reset_pair(pair: Pair) -> None:
    """Prepare both for another test, after the requests of the last one have ended."""
    coordinator, worker = pair
    coordinator.reset()
    wait_until(lambda: not worker.context.running and not worker.num_requests)
    coordinator.reset()  # counts what the worker has reported since
