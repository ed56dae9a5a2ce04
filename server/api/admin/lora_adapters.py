"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: change the set of LoRA adapters at runtime.

Both answer 404 unless the server allows it (`--allow-runtime-lora-updating`).
"""

import asyncio
import logging
from pathlib import Path

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from server.api.admin.schemas import LoadAdapterRequest, UnloadAdapterRequest
from server.context import get_context
from server.engine_client.client import EngineClient
from server.generation.preamble import begin, find_model
from server.http.access_control import require_admin
from server.http.errors import AdapterNotFoundError, InvalidValueError, UpdatesNotAllowedError
from server.http.json_route import StrictJSONRoute
from server.model_paths import ModelError, resolve_adapter
from server.models.served_model import ServedModel

router = APIRouter(route_class=StrictJSONRoute)

logger = logging.getLogger(__name__)


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(request: Request, body: LoadAdapterRequest) -> Response:
    """Load a LoRA adapter. Requests can then pass its name as `model`."""
    model, headers = _begin(request, body)
    name, replaces = body.lora_name, bool(body.load_inplace)
    if name in model.names:
        raise InvalidValueError(f"Invalid 'lora_name': '{name}' is the name of the model.", param="lora_name")
    if name in model.client.adapters and not replaces:
        message = (
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True."
        )
        raise InvalidValueError(message, param="lora_name")
    path = await _resolve_path(model.client, body.lora_path)
    await model.client.load_adapter(name, str(path), replaces)
    logger.info("loaded the LoRA adapter %s from %s", name, path)
    return _done(f"Success: LoRA adapter '{name}' added successfully.", headers)


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(request: Request, body: UnloadAdapterRequest) -> Response:
    """Unload a LoRA adapter. Running requests that use it finish normally."""
    model, headers = _begin(request, body)
    if body.lora_name not in model.client.adapters:
        raise AdapterNotFoundError(body.lora_name)
    await model.client.unload_adapter(body.lora_name)
    logger.info("unloaded the LoRA adapter %s", body.lora_name)
    return _done(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", headers)


def _begin(request: Request, body: LoadAdapterRequest | UnloadAdapterRequest) -> tuple[ServedModel, dict[str, str]]:
    """Return the base model and the headers of the answer.

    Raises ForbiddenError, UpdatesNotAllowedError, BadRequestError or EngineUnavailableError.
    """
    require_admin(request)
    if not get_context(request).settings.allow_runtime_lora_updating:
        raise UpdatesNotAllowedError
    model = find_model(request, None)
    headers = begin(request, body).accept()
    model.base.client.check_open()
    return model.base, headers


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
        raise InvalidValueError(f"Invalid 'lora_path': {error}.", param="lora_path") from None
    finally:
        resolving.cancel()
        draining.cancel()


def _done(text: str, headers: dict[str, str]) -> Response:
    return Response(text, headers=headers, media_type="text/plain")
