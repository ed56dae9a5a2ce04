"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, which are vLLM's."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from server.settings.table import ADAPTER_NAME

MAX_PATH_CHARS = 4096

AdapterName = Annotated[
    str, Field(pattern=f"^{ADAPTER_NAME}$", description="What requests call it as `model`: letters, digits, _./:@+-")
]


class LoadAdapterRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    lora_name: AdapterName
    lora_path: str = Field(
        min_length=1,
        max_length=MAX_PATH_CHARS,
        description="On the server: a folder in PEFT's format or a GGUF file; or a Hugging Face id of either.",
    )
    load_inplace: bool | None = Field(
        None,
        description="It may take the place of one of that name. Running requests end with the one they began with.",
    )


class UnloadAdapterRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    lora_name: AdapterName
    lora_int_id: int | None = Field(None, description="Ignored: the name says which.")
