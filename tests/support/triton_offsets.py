"""Check that no address of the Triton kernels overflows 32 bits: `python -m tests.support.triton_offsets`.

Steps of extreme sizes run on the meta device. Each kernel that they launch is compiled to TTIR for its own arguments,
and with these and its grid, its integers are bounded (`ttir_intervals.py`). Prints the findings as JSON, by kernel.
Runs in a process of its own, since kernels are interpreted or compiled for good when they are defined.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from engine.scheduling.request import NO_LORA_SLOT
from engine.shared.messages import ReasoningLimit
from tests.support.gpu_cards import GB, Card
from tests.support.gpu_shapes import Shape
from tests.support.gpu_trace import Launch, TensorSpec
from tests.support.meta_models import Sequence, hybrid_config, load_meta_model, model_config, traced_step
from tests.support.ttir_intervals import Analysis, Interval, parse

LARGEST_CARD = Card("192 GB", (9, 0), 160, 192 * GB, 8e12, 2.2e15, 126 * 2**20, 228 * 1024, 1.9e9)
# The widest layers of Llama 3 (405B) and the largest vocabularies; two layers, so that one holds half of the cache.
LARGEST_SHAPE = Shape(16384, 53248, 2, 128, 8, 262144)
SMALL_SHAPE = Shape(1024, 8192, 2, 16, 8, 128256)  # with so few outputs that products are split
MAX_MODEL_LEN = 2**20
NUM_ROWS = 65536
NUM_SEQUENCES = 256
EXTREMES = [
    [Sequence(4096)] * NUM_SEQUENCES,
    [Sequence(4096)] * (NUM_SEQUENCES - 1) + [Sequence(MAX_MODEL_LEN - 1)],
    [Sequence(MAX_MODEL_LEN // 4)],  # whose attention is split
    [Sequence(MAX_MODEL_LEN - NUM_ROWS, NUM_ROWS)],
]

SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "logit_bias": {3: 1.0}}
SAMPLING["reasoning_limit"] = ReasoningLimit(start_id=1, end_id=2, max_tokens=1, is_open=True)  # a mask

TYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32", "torch.uint8": "u8"}
TYPES |= {"torch.int8": "i8", "torch.int32": "i32", "torch.int64": "i64", "torch.bool": "i1"}


def extreme_launches() -> list[Launch]:
    """Return the launches of steps with the largest cache, logits, prompts, adapters and packed weights."""
    launches: list[Launch] = []
    largest = model_config(LARGEST_SHAPE, MAX_MODEL_LEN)
    for config, settings in (
        (largest, {"max_loras": 63, "max_lora_rank": 256}),
        (largest, {"kv_cache_dtype": "int8", "packed": "Q4_K"}),
        (model_config(SMALL_SHAPE, MAX_MODEL_LEN), {"packed": "Q8_0"}),
        (hybrid_config(4, MAX_MODEL_LEN), {}),
    ):
        model = load_meta_model(
            config, LARGEST_CARD, max_num_seqs=NUM_SEQUENCES, max_num_batched_tokens=NUM_ROWS, **settings
        )
        for sequences in EXTREMES:
            step = traced_step(model, sequences, 62 if "max_loras" in settings else NO_LORA_SLOT, **SAMPLING)
            launches += [launch for launch in step.launches if launch.kernel is not None]
    return launches


def findings(launches: Iterable[Launch]) -> dict[str, list[str]]:
    """Return what can overflow, by kernel; an empty list for a kernel without findings."""
    groups: dict[str, list[Launch]] = defaultdict(list)
    for launch in launches:
        signature, constants = signature_of(launch)
        groups[f"{launch.name} {signature} {constants}"].append(launch)
    found: dict[str, dict[str, None]] = {}
    for group in groups.values():
        found.setdefault(group[0].name, {}).update(dict.fromkeys(analyse(group)))
    return {name: list(texts) for name, texts in found.items()}


def analyse(group: list[Launch]) -> list[str]:
    """Return what can overflow in launches of one compiled kernel."""
    signature, constants = signature_of(group[0])
    compiled = compile_to_ttir(group[0].kernel, signature, constants)
    arguments: dict[str, tuple[str, Interval]] = {}
    loaded: dict[str, Interval] = {}
    left = [name for name, kind in signature.items() if kind != "constexpr"]
    for index, name in enumerate(left):
        kind = signature[name]
        if kind.startswith("*"):
            arguments[f"%arg{index}"] = ("ptr", Interval(0, 0))
            if name in LOADED and kind[1:].startswith("i"):
                loaded[f"%arg{index}"] = Interval(-1, max(LOADED[name](launch) for launch in group))
        else:
            values = [launch.arguments[name] for launch in group]
            is_integer = kind.startswith("i")
            interval = Interval(min(values), max(values)) if is_integer else Interval(0, 0)
            arguments[f"%arg{index}"] = (kind if is_integer else "f32", interval)
    grid = tuple(max(sizes) for sizes in zip(*(launch.grid for launch in group), strict=True))
    analysis = Analysis(arguments, grid, loaded)
    analysis.run(parse(compiled))
    return list(analysis.findings)


# Integers that kernels read from memory -> the largest that is there. All others may be any.
LOADED: Mapping[str, Callable[[Launch], int]] = {
    "tables": lambda launch: launch.arguments["keys"].shape[0],
    "work": lambda launch: max(MAX_MODEL_LEN, *(launch.arguments[name].shape[0] for name in ("work", "partial"))),
    "tiles": lambda launch: launch.arguments["num_columns"],
    "slot_mapping": lambda launch: launch.arguments["keys"].shape[0] * launch.arguments["keys"].shape[1],
    "lora_slots": lambda launch: launch.arguments["ranks"].shape[0],
    "ranks": lambda launch: launch.arguments["max_rank"],
    "changes": lambda launch: launch.arguments["logits"].shape[0] * MAX_MODEL_LEN,
    "draws": lambda launch: launch.arguments["logits"].shape[1],
    "rows": lambda launch: launch.arguments["logits"].shape[0],
    "lists": lambda launch: launch.arguments["logits"].shape[1],
    "nums_found": lambda launch: launch.arguments["logits"].shape[1],
}


def signature_of(launch: Launch) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the types of a launch's arguments and its constants, as Triton's launcher specialises them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if isinstance(value, TensorSpec):
            signature[parameter.name] = "*" + TYPES[str(value.dtype)]
            continue
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return signature, constants


def compile_to_ttir(kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any]) -> str:
    """Return the TTIR of a kernel, with all functions inlined."""
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": 4, "enable_fp_fusion": False})
    source = ASTSource(
        kernel, dict(signature), {(kernel.arg_names.index(name),): constants[name] for name in constants}
    )
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, functions, backend.get_module_map(), context)
    return str(backend.make_ttir(module, {}, options, target.arch).str_nodebug())


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret, "kernels must be compiled, not interpreted"
    print(json.dumps(findings(extreme_launches())))
