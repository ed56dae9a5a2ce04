"""LoRA adapters: those that are loaded and unloaded at runtime."""

from server.dialect import Dialect, Operation
from server.part import Part
from server.parts.lora.routes import router

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
