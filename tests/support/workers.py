"""A coordinator and a worker, as API processes would be, each on a port of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.app import create_app
from server.coordination.relay import Relay
from server.main import make_context
from server.settings.process_configs import ApiProcessConfig, EngineProcess, WorkerLink
from server.settings.table import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.serving import MODEL_NAMES, RunningServer, api_config, own_address, running_server


@contextmanager
def running_worker(
    fake_engine: FakeEngine, model_folder: Path, *, server: dict[str, Any] | None = None, **settings: Any
) -> Iterator[tuple[RunningServer, RunningServer]]:
    """Run a coordinator in front of `fake_engine`, and a worker. Yield both, the coordinator first."""
    config = api_config(Settings(**settings), EngineProcess(fake_engine.config.address), model_folder, MODEL_NAMES)
    with own_address() as address:
        context = make_context(config)
        app = create_app(context)
        context.workers.append(Relay(address, context, app))
        link = WorkerLink(address, sockets_fd=-1)
        worker = make_context(ApiProcessConfig(settings=config.settings, models=config.models, coordinator=link))
        with (
            running_server(context, fake_engine, app=app, **(server or {})) as coordinator,
            running_server(worker, fake_engine, **(server or {})) as running,
        ):
            yield coordinator, running
