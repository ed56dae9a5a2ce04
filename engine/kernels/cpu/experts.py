"""Mixture of experts in C++: the parameters of routing, of products grouped by expert, and of the sum of results."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.config import RouterSpec
from engine.kernels.cpu.c_structs import (
    CombineExpertsParameters,
    ExpertLinearParameters,
    ExpertRows,
    GatherPairsParameters,
    LinearParameters,
    RouteParameters,
    Routing,
)
from engine.kernels.cpu.recorder import ProgramRecorder
from engine.kernels.cpu.weights import FLOAT32, Format, Matrix
from engine.kernels.interface import ExpertLinearOp

SCORINGS = {"softmax": 0, "sigmoid": 1}  # RouterScoring of experts.h
MAX_EXPERTS = 1024  # of experts.h


@dataclass(frozen=True)
class CpuRouting:
    """The routing that the program fills in each step."""

    parameters: ctypes.Structure  # Routing
    num_rows: int  # the address of the RowCounts of the rows
    num_experts: int
    num_chosen: int
    max_pairs: int
    keep: tuple[Any, ...]

    @property
    def address(self) -> int:
        return ctypes.addressof(self.parameters)

    @property
    def num_pairs(self) -> int:
        """The address of the RowCounts of the pairs."""
        return self.address + Routing.num_pairs.offset


def route(
    recorder: ProgramRecorder,
    logits: Tensor,
    router: RouterSpec,
    bias: Tensor | None = None,
    expert_scales: Tensor | None = None,
) -> CpuRouting:
    """Add a call that chooses the experts of each row. All layers of a program share the buffers of one routing."""
    num_rows, num_experts = logits.shape
    assert num_experts == router.num_experts <= MAX_EXPERTS
    assert all(vector is None or vector.shape == (num_experts,) for vector in (bias, expert_scales))
    num_chosen = router.num_experts_per_tok
    max_pairs = num_rows * num_chosen
    groups = recorder.shared(f"expert groups {num_experts}", (2 * num_experts, ctypes.sizeof(ExpertRows)), torch.uint8)
    integers = recorder.shared(f"expert pairs {max_pairs}", (3, max_pairs), torch.int64)
    weights = recorder.shared(f"expert weights {max_pairs}", (max_pairs,), torch.float32)
    experts, rows, places = integers
    routing = Routing(
        groups=groups.data_ptr(),
        experts=experts.data_ptr(),
        weights=weights.data_ptr(),
        rows=rows.data_ptr(),
        places=places.data_ptr(),
    )
    parameters = RouteParameters(
        num_rows=recorder.buffer(logits).num_rows,
        logits=recorder.read(logits),
        logits_stride=logits.stride(0),
        num_experts=num_experts,
        num_chosen=num_chosen,
        scoring=SCORINGS[router.scoring],
        normalize=router.normalize,
        scale=router.scale,
        num_groups=router.num_groups,
        num_best_groups=router.topk_group,
        group_scores=1 if router.group_score == "max" else 2,
        bias=bias.data_ptr() if bias is not None else None,
        expert_scales=expert_scales.data_ptr() if expert_scales is not None else None,
        routing=ctypes.addressof(routing),
    )
    recorder.call("route", parameters, routing, bias, expert_scales)
    return CpuRouting(routing, parameters.num_rows, num_experts, num_chosen, max_pairs, (groups, integers, weights))


def expert_linear(recorder: ProgramRecorder, experts: Sequence[Matrix], bias: Tensor | None = None) -> ExpertLinearOp:
    """Return an operation that adds the calls of the products of each pair's expert."""
    num_outputs = experts[0].num_outputs
    assert all(expert.shapes == experts[0].shapes for expert in experts)
    assert bias is None or bias.shape == (len(experts), num_outputs)
    columns = [
        (part.format, (ctypes.c_void_p * len(experts))(*[expert.parts[index].data.data_ptr() for expert in experts]))
        for index, part in enumerate(experts[0].parts)
    ]

    def product(x: Tensor, routing: CpuRouting) -> Tensor:
        assert routing.num_experts == len(experts)
        assert x.shape[1] == experts[0].num_inputs
        out = recorder.new(routing.num_pairs, routing.max_pairs, num_outputs).tensor
        first = 0
        for part, (form, addresses) in zip(experts[0].parts, columns, strict=True):
            rows, stride = _pair_rows(recorder, x, form, routing)
            linear = LinearParameters(
                input=rows,
                input_stride=stride,
                num_inputs=part.num_inputs,
                num_outputs=part.num_outputs,
                bias=bias[:, first:].data_ptr() if bias is not None else None,
                output=out[:, first:].data_ptr(),
                output_stride=out.stride(0),
            )
            weights = ctypes.addressof(addresses)
            parameters = ExpertLinearParameters(routing.address, weights, num_outputs, linear)
            recorder.call(f"expert_linear_{form.name}", parameters, routing, experts, addresses, bias)
            first += part.num_outputs
        return out

    return product


def _pair_rows(recorder: ProgramRecorder, x: Tensor, form: Format, routing: CpuRouting) -> tuple[int, int]:
    """Return address and bytes of each pair's row in the input form of a product, in the order of sorted pairs."""
    address, stride = recorder.prepared(x, form)
    if recorder.buffer(x).num_rows == routing.num_pairs:
        assert len(x) == routing.max_pairs
        return address, stride
    assert len(x) == routing.max_pairs // routing.num_chosen
    key = f"pair rows {FLOAT32 if form.form == FLOAT32 else (form.form, form.prompt_form)} {stride}"
    rows = recorder.shared(key, (routing.max_pairs, stride), torch.uint8)
    recorder.call("gather_pairs", GatherPairsParameters(routing.address, address, stride, rows.data_ptr()), routing)
    return rows.data_ptr(), stride


def combine_experts(
    recorder: ProgramRecorder, x: Tensor, routing: CpuRouting, residual: Tensor | None = None
) -> Tensor:
    """Add a call that adds up the weighted results of each row's experts, and return its result, or `residual`."""
    out = residual
    if out is None:
        out = recorder.new(routing.num_rows, routing.max_pairs // routing.num_chosen, x.shape[1]).tensor
    assert len(x) == routing.max_pairs
    assert out.shape == (routing.max_pairs // routing.num_chosen, x.shape[1])
    parameters = CombineExpertsParameters(
        num_rows=routing.num_rows,
        routing=routing.address,
        input=recorder.read(x),
        input_stride=x.stride(0),
        size=x.shape[1],
        num_chosen=routing.num_chosen,
        output=out.data_ptr() if residual is None else recorder.change(out),
        output_stride=out.stride(0),
        accumulate=residual is not None,
    )
    recorder.call("combine_experts", parameters, routing)
    return out
