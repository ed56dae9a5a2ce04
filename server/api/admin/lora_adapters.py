"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters come and go while the server runs, if it may be."""

import asyncio
import logging
from pathlib import Path

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from server.api.admin.lora_adapter_schemas import LoadAdapterRequest, UnloadAdapterRequest
from server.context import ServerContext, get_context
from server.generation.parameters import unknown_parameters, warnings_header
from server.http.errors import AdapterNotFoundError, InvalidValueError, UpdatesNotAllowedError
from server.http.middleware import StrictJSONRoute
from server.model_paths import ModelError, resolve_adapter

router = APIRouter(route_class=StrictJSONRoute)

logger = logging.getLogger(__name__)


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(request: Request, body: LoadAdapterRequest) -> Response:
    """Loads an adapter, which requests can then ask for by its name as `model`."""
    context = get_context(request)
    headers = _judge(context, body)
    name, replaces = body.lora_name, bool(body.load_inplace)
    if name in context.model_names:
        raise InvalidValueError(f"Invalid 'lora_name': '{name}' is the name of the model.", param="lora_name")
    if name in context.client.adapters and not replaces:
        message = (
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True."
        )
        raise InvalidValueError(message, param="lora_name")
    path = await _find(context, body.lora_path)
    await context.client.load_adapter(name, str(path), replaces)
    logger.info("loaded the LoRA adapter %s from %s", name, path)
    return _done(f"Success: LoRA adapter '{name}' added successfully.", headers)


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(request: Request, body: UnloadAdapterRequest) -> Response:
    """Forgets an adapter. Requests that use it are answered to their end."""
    context = get_context(request)
    headers = _judge(context, body)
    if body.lora_name not in context.client.adapters:
        raise AdapterNotFoundError(body.lora_name)
    await context.client.unload_adapter(body.lora_name)
    logger.info("unloaded the LoRA adapter %s", body.lora_name)
    return _done(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", headers)


def _judge(context: ServerContext, body: BaseModel) -> dict[str, str]:
    """The headers of the answer. Raises UpdatesNotAllowedError, BadRequestError or EngineUnavailableError."""
    if not context.settings.allow_runtime_lora_updating:
        raise UpdatesNotAllowedError
    unknown = unknown_parameters(body, strict=context.settings.strict)
    context.metrics.count_unknown_parameters(len(unknown))
    context.client.check_open()
    return {"x-lightwell-warnings": warnings_header(unknown)} if unknown else {}


async def _find(context: ServerContext, lora_path: str) -> Path:
    """Fetches it if it must. Raises InvalidValueError; EngineUnavailableError as soon as the server shuts down."""
    finding = asyncio.ensure_future(anyio.to_thread.run_sync(resolve_adapter, lora_path, abandon_on_cancel=True))
    draining = asyncio.ensure_future(context.client.on_drain.wait())
    try:
        await asyncio.wait((finding, draining), return_when=asyncio.FIRST_COMPLETED)
        if not finding.done():
            context.client.check_open()
        return await finding
    except ModelError as error:
        raise InvalidValueError(f"Invalid 'lora_path': {error}.", param="lora_path") from None
    finally:
        finding.cancel()
        draining.cancel()


def _done(text: str, headers: dict[str, str]) -> Response:
    return Response(text, headers=headers, media_type="text/plain")
