"""LoRA adapters: `/v1/load_lora_adapter` and `/v1/unload_lora_adapter` change the set of them at runtime.

Both answer 404 unless the server allows it (`--allow-runtime-lora-updating`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import Field

from engine.shared.messages import AdapterDone, AdapterField, LoadAdapter, LoraAdapter, ToEngine, UnloadAdapter
from server.context import ServerContext, get_context
from server.dialect import Dialect, ModelRoute, Operation
from server.engine_client.client import EngineClient
from server.engine_client.connected_engine import ConnectedEngine, EngineAdapters
from server.generation.preamble import begin, find_model
from server.http.access_control import require_admin
from server.http.errors import (
    APIError,
    BadRequestError,
    EngineUnavailableError,
    InvalidValueError,
    MissingParameterError,
    ModelNotFoundError,
    clip,
    invalid,
)
from server.metrics import Metrics
from server.model_paths import ModelError
from server.models.served_model import ServedModel
from server.part import Part
from server.parts.lora.files import resolve_adapter
from server.schemas.request_fields import OpenObject, optional
from server.settings.setting import ADAPTER_NAME
from server.tenants import get_tenant

logger = logging.getLogger(__name__)

PARAMS = {AdapterField.NAME: "lora_name", AdapterField.PATH: "lora_path"}  # names of the fields in the API

Change = LoadAdapter | UnloadAdapter
MAX_PATH_CHARS = 4096


class AdapterNotFoundError(APIError):
    def __init__(self, name: str) -> None:
        message = f"The lora adapter '{clip(name)}' cannot be found."
        super().__init__(404, message, code="model_not_found", param="lora_name")


class AdaptersBusyError(EngineUnavailableError):
    """The engine cannot load a LoRA adapter at the moment. The message comes from the engine."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="adapters_busy")


class LoadedAdapters(EngineAdapters):
    """The adapters that the engine has reported as loaded, and the changes that callers wait for."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        super().__init__(send)
        self._send = send
        self._changes: dict[str, tuple[Change, asyncio.Future[None]]] = {}  # by request_id
        self._is_restoring = False
        self._reported: Sequence[LoraAdapter] = ()  # by the engine

    def load(self, name: str, path: str, *, replaces: bool) -> asyncio.Future[None]:
        """Load an adapter. The result comes once requests can use it.

        Raises BadRequestError or AdaptersBusyError with the engine's message, or the error passed to `fail`.
        """
        return self._change(LoadAdapter(request_id=secrets.token_hex(16), name=name, path=path, replaces=replaces))

    def unload(self, name: str) -> asyncio.Future[None]:
        """Unload an adapter. New requests cannot use it from now on; requests that already use it are completed.

        Raises AdapterNotFoundError, and what `load` raises.
        """
        self.by_name.pop(name, None)
        return self._change(UnloadAdapter(request_id=secrets.token_hex(16), name=name))

    def _change(self, message: Change) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changes[message.request_id] = message, done
        self._send(message)
        return done

    def update(self, adapters: Sequence[LoraAdapter]) -> None:
        """Set the loaded adapters, except those being unloaded: the engine may not have read that request yet.

        While the engine is being restarted, they stay what they were: `restore` needs them.
        """
        self._reported = adapters
        if self._is_restoring:
            return
        unloading = {change.name for change, _ in self._changes.values() if isinstance(change, UnloadAdapter)}
        self.by_name = {adapter.name: adapter for adapter in adapters if adapter.name not in unloading}

    def finish(self, message: AdapterDone) -> None:
        """Complete a pending change with its result or error."""
        if (pending := self._changes.pop(message.request_id, None)) is None:
            return
        change, done = pending
        if done.done():  # the caller was cancelled
            return
        if message.error:
            done.set_exception(_error(change, message))
        else:
            done.set_result(None)

    def keep(self) -> None:
        """Keep the adapters of an engine that is lost until `restore` has loaded them in another one."""
        self._is_restoring = True

    async def restore(self, loaded: Sequence[LoraAdapter]) -> None:
        """Load the adapters of the lost engine into another one, which has `loaded`, and log those that fail.

        It is to be cancelled if that engine is lost too.
        """
        self.update(loaded)
        fingerprints = {adapter.name: adapter.fingerprint for adapter in loaded}
        for name in fingerprints.keys() - self.by_name.keys():
            await self._change(UnloadAdapter(request_id=secrets.token_hex(16), name=name))
        for adapter in list(self.by_name.values()):
            if fingerprints.get(adapter.name) != adapter.fingerprint:
                await self._load_again(adapter)
        self._is_restoring = False
        self.update(self._reported)

    async def _load_again(self, adapter: LoraAdapter) -> None:
        try:
            await self.load(adapter.name, adapter.path, replaces=True)
        except (BadRequestError, AdaptersBusyError) as error:
            logger.error("the LoRA adapter %s is lost: %s", adapter.name, error.message)

    def fail(self, error: APIError) -> None:
        """Fail all pending changes with `error`."""
        for _, done in self._changes.values():
            if not done.done():
                done.set_exception(error)
        self._changes.clear()


def _error(change: Change, message: AdapterDone) -> APIError:
    """Return the API error for a change that the engine rejected."""
    if message.is_temporary:
        return AdaptersBusyError(message.error)
    if message.field is None:
        return BadRequestError(message.error)
    if isinstance(change, UnloadAdapter) and message.field is AdapterField.NAME:
        return AdapterNotFoundError(change.name)
    return InvalidValueError(message.error, param=PARAMS[message.field])


async def load_adapter(client: EngineClient, name: str, path: str, *, replaces: bool) -> None:
    """Load an adapter into all engines of a model, or none; see `LoadedAdapters.load`.

    If only some engines fail to replace one, all unload it. Raises EngineUnavailableError if no new work is accepted.
    """
    engines = _engines_to_change(client)
    loads = [_adapters(engine).load(name, path, replaces=replaces) for engine in engines]
    errors = [result for result in await asyncio.gather(*loads, return_exceptions=True) if result is not None]
    client.tell_listeners()
    if not errors:
        return
    if len(errors) < len(engines):
        unloads = [_adapters(engine).unload(name) for engine in engines if engine.liveness.is_ready]
        await asyncio.gather(*unloads, return_exceptions=True)
    raise errors[0]


async def unload_adapter(client: EngineClient, name: str) -> None:
    """Unload an adapter; see `LoadedAdapters.unload`. Raises EngineUnavailableError if no new work is accepted."""
    unloads = [_adapters(engine).unload(name) for engine in _engines_to_change(client)]
    client.tell_listeners()
    await asyncio.gather(*unloads)


def _engines_to_change(client: EngineClient) -> Sequence[ConnectedEngine]:
    """Return the engines that are left. Raises EngineUnavailableError unless all are ready."""
    client.check_open()
    for engine in client.alive:
        engine.liveness.check_ready()
    return client.alive


def _adapters(engine: ConnectedEngine) -> LoadedAdapters:
    assert isinstance(engine.adapters, LoadedAdapters)
    return engine.adapters


AdapterName = Annotated[
    str,
    Field(
        pattern=f"^{ADAPTER_NAME}$",
        description="The name that requests pass as `model`: letters, digits and any of _./:@+-",
    ),
]


class LoadAdapterRequest(OpenObject):
    lora_name: AdapterName
    lora_path: str = Field(
        min_length=1,
        max_length=MAX_PATH_CHARS,
        description="A PEFT folder or a GGUF file on the server, or the Hugging Face id of either.",
    )
    load_inplace: bool | None = optional(
        "Replace a loaded adapter of the same name. Running requests finish with the adapter they started with."
    )
    base_model_name: str | None = optional(
        "The model that the adapter belongs to. It can be left out if there is only one."
    )


class UnloadAdapterRequest(OpenObject):
    lora_name: AdapterName
    lora_int_id: int | None = optional("Accepted for vLLM clients and ignored.")


class AdapterRoute(ModelRoute):
    """A route for requests that name the model of an adapter."""

    name_fields = ("base_model_name",)
    ends_with_client = False

    async def respond(self, request: Request, fields: dict[str, Any]) -> Response:
        """Raise APIError before the model is loaded."""
        require_admin(request)
        if not get_context(request).settings.allow_runtime_lora_updating:
            message = "LoRA adapters cannot be changed: start the server with --allow-runtime-lora-updating."
            raise APIError(404, message, code="not_enabled")
        return await super().respond(request, fields)


router = APIRouter(route_class=AdapterRoute)


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(request: Request, body: LoadAdapterRequest) -> Response:
    """Load a LoRA adapter. Requests can then pass its name as `model`."""
    headers = _begin(request, body)
    model = _base_model(request, body.base_model_name)
    name, replaces = body.lora_name, bool(body.load_inplace)
    models, tenant = get_context(request).models, get_tenant(request)
    if any(name in slot.names for slot in models.slots):
        raise invalid("lora_name", f"'{name}' is the name of a model")
    if (owner := models.find_slot(name, tenant)) is not None and owner.served is not model:
        raise invalid("lora_name", f"'{name}' is an adapter of the model '{owner.name}'")
    if name in model.client.adapters and not replaces:
        message = (
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True."
        )
        raise InvalidValueError(message, param="lora_name")
    path = await _resolve_path(model.client, body.lora_path)
    await load_adapter(model.client, name, str(path), replaces=replaces)
    logger.info("loaded the LoRA adapter %s from %s", name, path)
    return _done(f"Success: LoRA adapter '{name}' added successfully.", headers)


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(request: Request, body: UnloadAdapterRequest) -> Response:
    """Unload a LoRA adapter. Running requests that use it finish normally."""
    headers = _begin(request, body)
    models = [model for model in get_context(request).models.loaded if body.lora_name in model.client.adapters]
    if not models:
        raise AdapterNotFoundError(body.lora_name)
    await unload_adapter(models[0].client, body.lora_name)
    logger.info("unloaded the LoRA adapter %s", body.lora_name)
    return _done(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", headers)


def _begin(request: Request, body: LoadAdapterRequest | UnloadAdapterRequest) -> dict[str, str]:
    """Return the headers of the answer. Raises BadRequestError or EngineUnavailableError."""
    headers = begin(request, body).accept()
    for model in get_context(request).models.loaded:
        model.client.check_open()
    return headers


def _base_model(request: Request, name: str | None) -> ServedModel:
    """Return the model of an adapter. Raises MissingParameterError if there are several, or InvalidValueError."""
    if name is None and len(get_context(request).models.slots) > 1:
        raise MissingParameterError("base_model_name")
    try:
        return find_model(request, name).base
    except ModelNotFoundError as error:
        raise invalid("base_model_name", error.message.removesuffix(".")) from None


async def _resolve_path(client: EngineClient, lora_path: str) -> Path:
    """Return the local path of an adapter, downloading it if needed.

    Raises InvalidValueError if there is none, EngineUnavailableError as soon as the server shuts down.
    """
    resolving = asyncio.ensure_future(anyio.to_thread.run_sync(resolve_adapter, lora_path, abandon_on_cancel=True))
    draining = asyncio.ensure_future(client.drain_requested.wait())
    try:
        await asyncio.wait((resolving, draining), return_when=asyncio.FIRST_COMPLETED)
        if not resolving.done():
            client.check_open()
        return await resolving
    except ModelError as error:
        raise invalid("lora_path", f"{error}") from None
    finally:
        resolving.cancel()
        draining.cancel()


def _done(text: str, headers: dict[str, str]) -> Response:
    return Response(text, headers=headers, media_type="text/plain")


class AdapterCollector(Collector):
    """Reads at scrape time which adapters are in use: names as labels and the current time as the value.

    vLLM keeps a sample of each earlier combination of names, too.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        engines = self._metrics.engines
        max_loras = max((engine.info.max_loras for engine in engines if engine.info is not None), default=0)
        if max_loras == 0:
            return
        stats = [engine.stats() for engine in engines]
        waiting = {name for each in stats for name in each.waiting_adapters}
        running = {name for each in stats for name in each.running_adapters}
        labels = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
        name = f"{self._metrics.prefix}lora_requests_info"
        family = GaugeMetricFamily(name, "LoRA adapters in use.", labels=labels)
        family.add_metric([str(max_loras), ",".join(sorted(waiting)), ",".join(sorted(running))], time.time())
        yield family


def _attach(context: ServerContext) -> None:
    for slot in context.models.slots:
        slot.metrics.registry.register(AdapterCollector(slot.metrics))


ADAPTER = {"lora_name": "sql"}
ADAPTER_DONE = "Success: LoRA adapter 'sql' {} successfully."

ADAPTERS = Dialect(
    tag="Lightwell",
    routers=[router],
    operations={
        ("/v1/load_lora_adapter", "post"): Operation(
            str, ADAPTER | {"lora_path": "./adapters/sql"}, answer_example=ADAPTER_DONE.format("added"), has_model=False
        ),
        ("/v1/unload_lora_adapter", "post"): Operation(
            str, ADAPTER, answer_example=ADAPTER_DONE.format("removed"), has_model=False
        ),
    },
    in_workers=False,
)

PART = Part(dialects=[ADAPTERS], attach=_attach)
