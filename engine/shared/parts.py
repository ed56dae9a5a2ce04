"""Parts: folders beside the core, which the core never imports, but loads by name where they are there."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

ENGINE_PARTS = "engine.parts"

# Parts of the engine: what each is for, as errors say it where the folder is missing.
ENGINE_PART_TITLES = {
    "build_kernels": "the compiler of the CPU kernels",
    "triton": "the GPU kernels",
    "distributed": "tensor parallelism",
    "inspection": "the inspection of the engine",
    "hybrid": "layers with a state in place of attention",
    "lora": "LoRA adapters",
    "tokenizers": "a tokenizer without tokenizer.json",
    "quantized": "quantised safetensors (GPTQ, AWQ, FP8, compressed-tensors, MXFP4)",
}


# Parts that a part imports.
ENGINE_PART_NEEDS = {"distributed": ("lora",)}


class MissingPartError(ValueError):
    """What was asked for needs a part that is not installed."""

    def __init__(self, name: str, title: str) -> None:
        super().__init__(f"this needs the part '{name}' ({title}), which is not installed")


@cache
def has_part(folder: str, name: str) -> bool:
    """Return whether the folder of a part is there. `folder`: the package of all parts."""
    try:
        spec = find_spec(f"{folder}.{name}")
    except ModuleNotFoundError:  # there is no part at all
        return False
    return spec is not None and spec.origin is not None  # not just a folder, which compiled files may have left


def missing_engine_part(name: str) -> MissingPartError | None:
    """Return what a part of the engine lacks, which may be itself; None if it can be used."""
    for each in (name, *ENGINE_PART_NEEDS.get(name, ())):
        if not has_part(ENGINE_PARTS, each):
            return MissingPartError(each, ENGINE_PART_TITLES[each])
    return None


def engine_part(name: str, module: str) -> Any:
    """Return a module of a part of the engine. Raises MissingPartError."""
    if (error := missing_engine_part(name)) is not None:
        raise error
    return import_module(f"{ENGINE_PARTS}.{name}.{module}")
