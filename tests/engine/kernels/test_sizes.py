"""Tensors of different sizes reach no kernel that takes a size from one of them and uses it for the other."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import AttentionKind, KVShape, RouterSpec
from engine.kernels.cpu.attention import CpuAttentionPlan
from engine.kernels.cpu.c_structs import AttentionPlan
from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.interface import AttentionScores, HeadNorms, KernelOptions, Kernels, Rotations
from engine.kernels.torch.attention import TorchAttentionPlan
from engine.kernels.torch.kernels import TorchKernels
from engine.parts.triton.attention import TritonAttentionPlan
from engine.parts.triton.kernels import TritonKernels
from tests.support.kernel_choice import code_paths
from tests.support.recorded_kernels import make_kernels

CPU = torch.device("cpu")
OPTIONS = KernelOptions(torch.float32)
NUM_ROWS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 4, 2, 16
KIND = AttentionKind(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, None)


def new_kernels(name: str) -> Kernels:
    if name == "torch":
        return TorchKernels(OPTIONS, CPU)
    if name == "triton":
        return TritonKernels(OPTIONS, CPU)
    if not code_paths():
        pytest.skip("no kernels in C++ for this processor")
    return make_kernels(code_paths()[0], options=OPTIONS)


def new_rows(kernels: Kernels, *shape: int) -> Tensor:
    """Return rows that operations can read."""
    return kernels.new(0, *shape).tensor if isinstance(kernels, CpuKernels) else torch.zeros(shape)


def new_plan(kernels: Kernels) -> Any:
    """Return a plan of no rows."""
    if isinstance(kernels, CpuKernels):
        return CpuAttentionPlan(AttentionPlan(), KIND)
    if isinstance(kernels, TorchKernels):
        return TorchAttentionPlan([], KIND)
    return TritonAttentionPlan(torch.zeros((0, 7), dtype=torch.int64), 0, 0, 1, KIND)


def attend(kernels: Kernels, heads: int, kv_heads: int, head_dim: int, num_sinks: int) -> None:
    """Attend with a plan of KIND."""
    ((cache,),) = kernels.new_kv_cache([[KVShape(kv_heads, head_dim)]], 2, 16)
    q, table = new_rows(kernels, NUM_ROWS, heads, HEAD_DIM), torch.zeros((1, 1), dtype=torch.int64)
    kernels.paged_attention(q, cache, new_plan(kernels), table, AttentionScores(1.0, None, torch.ones(num_sinks)))


def store(wrong: str, kernels: Kernels, _x: Tensor) -> None:
    """Rotate heads and store keys and values, one of whose sizes is wrong."""
    stored = KVShape(1 if wrong == "KV heads" else NUM_KV_HEADS, HEAD_DIM * (1 + (wrong == "head size")))
    ((cache,),) = kernels.new_kv_cache([[stored]], 2, 16)
    nums_heads = (NUM_HEADS, NUM_KV_HEADS, 1 if wrong == "values" else NUM_KV_HEADS)
    q, k, v = (new_rows(kernels, NUM_ROWS, heads, HEAD_DIM) for heads in nums_heads)
    table = new_rows(kernels, NUM_ROWS, HEAD_DIM // 2 if wrong == "rotations" else HEAD_DIM)
    slots = torch.zeros(NUM_ROWS - (wrong == "slots"), dtype=torch.int64)
    weight = torch.ones(HEAD_DIM - (wrong == "norm"))
    kernels.rope_and_store_kv(q, k, v, Rotations(table, table), slots, cache, HeadNorms(weight, weight, weight, 1e-5))


def product(kernels: Kernels, x: Tensor, num_inputs: int, num_biases: int, residual: Tensor | None = None) -> None:
    """Multiply x with a matrix of 6 outputs."""
    kernels.linear(kernels.pack([torch.zeros(6, num_inputs)]), torch.zeros(num_biases))(x, residual)


def expert_product(kernels: Kernels, x: Tensor, num_experts: int, num_inputs: int, num_biases: int = 6) -> None:
    """Multiply x with the matrices of two experts of 8 for each row."""
    routing = kernels.route(new_rows(kernels, NUM_ROWS, 8), RouterSpec(num_experts=8, num_experts_per_tok=2))
    matrices = kernels.pack_experts([[torch.zeros(6, num_inputs)]] * num_experts)
    kernels.expert_linear(matrices, torch.zeros(num_experts, num_biases))(x, routing)


def route(kernels: Kernels, logits: Tensor, num_experts: int, num_biases: int) -> None:
    kernels.route(logits, RouterSpec(num_experts=num_experts, num_experts_per_tok=2), torch.zeros(num_biases))


WRONG: dict[str, Callable[[Kernels, Tensor], Any]] = {  # x is [4, 8]
    "inputs": lambda kernels, x: product(kernels, x, 9, 6),
    "bias": lambda kernels, x: product(kernels, x, 8, 5),
    "residual": lambda kernels, x: product(kernels, x, 8, 6, new_rows(kernels, NUM_ROWS, 7)),
    "norm": lambda kernels, x: kernels.rms_norm(x, torch.ones(7), 1e-5),
    "normed residual": lambda kernels, x: kernels.rms_norm(x, torch.ones(8), 1e-5, new_rows(kernels, NUM_ROWS, 7)),
    "layer norm": lambda kernels, x: kernels.layer_norm(x, torch.ones(7), 1e-5),
    "added": lambda kernels, x: kernels.add(new_rows(kernels, NUM_ROWS, 7), x, 0.5),
    "gate": lambda kernels, x: kernels.act_and_mul(x, new_rows(kernels, NUM_ROWS, 7), "silu"),
    "router": lambda kernels, x: route(kernels, x, 9, 9),
    "correction": lambda kernels, x: route(kernels, x, 8, 7),
    "experts": lambda kernels, x: expert_product(kernels, x, 7, 8),
    "inputs of experts": lambda kernels, x: expert_product(kernels, x, 8, 7),
    "biases of experts": lambda kernels, x: expert_product(kernels, x, 8, 8, 5),
    # torch compares the sizes above itself, with RuntimeError.
    "attention: KV heads": lambda kernels, x: attend(kernels, NUM_HEADS, 1, HEAD_DIM, NUM_HEADS),
    "attention: head size": lambda kernels, x: attend(kernels, NUM_HEADS, NUM_KV_HEADS, 2 * HEAD_DIM, NUM_HEADS),
    "attention: query heads": lambda kernels, x: attend(kernels, 2 * NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, 2 * NUM_HEADS),
    "attention: sinks": lambda kernels, x: attend(kernels, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_KV_HEADS),
}
STORED = ("KV heads", "head size", "values", "rotations", "slots", "norm")
WRONG |= {f"stored: {part}": partial(store, part) for part in STORED}


@pytest.mark.parametrize(
    ("wrong", "name"),
    [(wrong, name) for wrong in WRONG for name in ("torch", "cpu", "triton") if ":" in wrong or name != "torch"],
)
def test_a_size_that_differs(wrong: str, name: str) -> None:
    kernels = new_kernels(name)
    with pytest.raises((AssertionError, RuntimeError) if ":" not in wrong else AssertionError):
        WRONG[wrong](kernels, new_rows(kernels, NUM_ROWS, 8))
