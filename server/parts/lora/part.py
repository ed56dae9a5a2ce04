"""LoRA adapters: `/v1/load_lora_adapter` and `/v1/unload_lora_adapter` change the set of them at runtime.

Both answer 404 unless the server allows it (`--allow-runtime-lora-updating`).
"""

import asyncio
import logging
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from pydantic import Field

from server.api.model_route import ModelRoute
from server.context import get_context
from server.dialect import Dialect, Operation
from server.engine_client.client import EngineClient
from server.generation.preamble import begin, find_model
from server.http.access_control import require_admin
from server.http.errors import APIError, InvalidValueError, MissingParameterError, ModelNotFoundError
from server.model_paths import ModelError, resolve_adapter
from server.models.served_model import ServedModel
from server.part import Part
from server.parts.lora.adapters import AdapterNotFoundError, load_adapter, unload_adapter
from server.schemas.request_fields import OpenObject
from server.settings.setting import ADAPTER_NAME
from server.tenants import get_tenant

MAX_PATH_CHARS = 4096

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
    load_inplace: bool | None = Field(
        None,
        description="Replace a loaded adapter of the same name. Running requests finish with the adapter they "
        "started with.",
    )
    base_model_name: str | None = Field(
        None, description="The model that the adapter belongs to. It can be left out if there is only one."
    )


class UnloadAdapterRequest(OpenObject):
    lora_name: AdapterName
    lora_int_id: int | None = Field(None, description="Accepted for vLLM clients and ignored.")


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

logger = logging.getLogger(__name__)


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(request: Request, body: LoadAdapterRequest) -> Response:
    """Load a LoRA adapter. Requests can then pass its name as `model`."""
    headers = _begin(request, body)
    model = _base_model(request, body.base_model_name)
    name, replaces = body.lora_name, bool(body.load_inplace)
    models, tenant = get_context(request).models, get_tenant(request)
    if any(name in slot.names for slot in models.slots):
        raise InvalidValueError(f"Invalid 'lora_name': '{name}' is the name of a model.", param="lora_name")
    if (owner := models.find_slot(name, tenant)) is not None and owner.served is not model:
        message = f"Invalid 'lora_name': '{name}' is an adapter of the model '{owner.name}'."
        raise InvalidValueError(message, param="lora_name")
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
        raise InvalidValueError(f"Invalid 'base_model_name': {error.message}", param="base_model_name") from None


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

PART = Part(dialects=[ADAPTERS])
