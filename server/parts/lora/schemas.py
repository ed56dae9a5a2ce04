"""Requests that load and unload adapters, which follow vLLM."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from server.settings.table import ADAPTER_NAME

MAX_PATH_CHARS = 4096

AdapterName = Annotated[
    str,
    Field(
        pattern=f"^{ADAPTER_NAME}$",
        description="The name that requests pass as `model`: letters, digits and any of _./:@+-",
    ),
]


class LoadAdapterRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

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


class UnloadAdapterRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    lora_name: AdapterName
    lora_int_id: int | None = Field(None, description="Accepted for vLLM clients and ignored.")
