"""Executions of a model that show what happens inside, with the kernels that serve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import BatchInputs
from engine.config import GatedDeltaNetSpec
from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.cpu.library import Program
from engine.kernels.interface import AttentionScores
from engine.model.attention import PagedAttention
from engine.model.decoder import CausalLM
from engine.model.layer_inputs import KVCache
from engine.runner import ModelRunner

OBSERVED_LOGIT_ROWS = 4  # that are computed at once: with the weights of an LM head, a few take as long as one


class ObservedExecution:
    """A model that shows what happens inside. It has buffers of its own, so that other steps may run in between."""

    max_logit_rows = OBSERVED_LOGIT_ROWS

    def __init__(self, model: CausalLM, kv_cache: KVCache, builder: BatchBuilder) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.builder = builder

    def forward(self) -> Iterator[Observation]:
        """Run the step that the builder's buffers hold, with the kernels that serve, and yield after each part.

        What is yielded is valid until the next.
        """
        batch = self.builder.current()
        self.model.extend_rotary(int(batch.seq_lens.max()))
        return observe(self.model, batch, self.kv_cache)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits, float32 [R, V], of at most `max_logit_rows` hidden states [R, hidden_size].

        They may be those of any layer. The result is valid until the next call.
        """
        return self.model.compute_logits(hidden, torch.arange(len(hidden), device=hidden.device))

    def attention_weights(self, layer: int, q: Tensor, block_ids: Tensor, first: int) -> Tensor:
        """Return the attention weights, float32 [R, H, n], of a projection's queries q, of positions from `first` on.

        `block_ids`, int64, are the blocks of all positions up to the last.
        """
        attention = self.model.layers[layer].self_attn
        assert isinstance(attention, PagedAttention)
        keys = self.model.kernels.cached_keys(self.kv_cache.layers[layer], block_ids)[: first + len(q)]
        heads = q.view(len(q), attention.spec.num_heads, attention.spec.head_dim)
        return attention_weights(heads, keys, first, attention.scores, attention.spec.window)

    def state_gates(self, layer: int, gates: Tensor) -> Tensor:
        """Return which share of its state each head keeps at each row, and how strongly it writes: float32 [2, R, V].

        `gates` are those of a projection.
        """
        mixer: Any = self.model.layers[layer].self_attn
        return torch.stack(mixer.gates(gates.float()))


class CpuObservedExecution(ObservedExecution):
    """Runs the parts of a program that is recorded once."""

    def __init__(self, kernels: CpuKernels, model: CausalLM, kv_cache: KVCache, builder: BatchBuilder) -> None:
        super().__init__(model, kv_cache, builder)
        batch = builder.buffers()
        index_rows = dict.fromkeys(
            (batch.token_ids.data_ptr(), batch.positions.data_ptr()), builder.num_rows.ctypes.data
        )
        program = Program(kernels.library, kernels.team)
        observed: list[tuple[Observation, range]] = []  # with the calls that compute it
        with kernels.recording(program, index_rows, builder.num_seqs.ctypes.data):
            for observation in observe(model, batch, kv_cache):
                first = observed[-1][1].stop if observed else 0
                observed.append((observation, range(first, len(program.names))))
        program.keep.append(builder)
        self.parts = [(observation, program.part(calls)) for observation, calls in observed]
        self.hidden = torch.zeros(OBSERVED_LOGIT_ROWS, model.config.hidden_size)
        self.logit_rows = torch.arange(OBSERVED_LOGIT_ROWS)
        self.num_logit_rows = np.zeros(2, dtype=np.int64)  # RowCounts
        self.logits_program = Program(kernels.library, kernels.team)
        with kernels.recording(self.logits_program, {self.logit_rows.data_ptr(): self.num_logit_rows.ctypes.data}):
            self.logits = model.compute_logits(self.hidden, self.logit_rows)

    def forward(self) -> Iterator[Observation]:
        batch = self.builder.current()
        self.model.extend_rotary(int(batch.seq_lens.max()))
        for observation, program in self.parts:
            program.run()
            yield observation.first_rows(len(batch.token_ids))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        self.hidden[: len(hidden)] = hidden
        self.num_logit_rows[:] = len(hidden)  # all count as rows of generated tokens
        self.logits_program.run()
        return self.logits[: len(hidden)]


def new_observed_execution(runner: ModelRunner, max_num_rows: int) -> ObservedExecution:
    """Return an execution of a runner's model, for steps of one request with at most so many rows."""
    builder = runner.builder.smaller(max_num_rows)
    if isinstance(runner.kernels, CpuKernels):
        return CpuObservedExecution(runner.kernels, runner.model, runner.kv_cache, builder)
    return ObservedExecution(runner.model, runner.kv_cache, builder)


class Part(Enum):
    """A part of a forward pass, after which there is something to see."""

    EMBEDDING = auto()
    PROJECTION = auto()  # of a layer's queries, keys and values; these are in the KV cache, or the state has advanced
    ATTENTION = auto()  # or another mixer
    FEED_FORWARD = auto()  # the layer is complete


@dataclass(frozen=True, slots=True)
class Observation:
    """What one part has computed for the T rows of the batch. The next part may overwrite it."""

    part: Part
    layer: int  # -1 before the first
    residual: Tensor  # [T, hidden_size]
    q: Tensor | None = None  # [T, H * D], rotated: of a projection
    gates: Tensor | None = None  # [T, 2 * V], what `GatedDeltaNet.gates` reads: of its projection
    router_logits: Tensor | None = None  # float32 [T, E]: of the feed-forward part of a layer with experts

    def first_rows(self, num_rows: int) -> Observation:
        """Return what it shows of the first rows only."""
        seen = {name: getattr(self, name) for name in ("residual", "q", "gates", "router_logits")}
        return replace(self, **{name: some[:num_rows] for name, some in seen.items() if some is not None})


def observe(model: CausalLM, batch: BatchInputs, kv_cache: KVCache) -> Iterator[Observation]:
    """Compute all rows in all layers, as `CausalLM.forward` does with its `hidden_rows`, and yield after each part.

    Like `forward`, this may be recorded with placeholder tensors.
    """
    x = model.embed(batch.token_ids)
    inputs = model.layer_inputs(batch, kv_cache, x, range(len(model.layers)))
    yield Observation(Part.EMBEDDING, -1, x)
    for index, layer in enumerate(model.layers):
        with model.kernels.temporaries():
            projected = layer.project(x, inputs)
            q = projected[0] if index in kv_cache.layers else None
            has_gates = isinstance(model.config.layers[index].mixer, GatedDeltaNetSpec)
            yield Observation(Part.PROJECTION, index, x, q, gates=projected[1] if has_gates else None)
            layer.attend(x, projected, inputs)
            yield Observation(Part.ATTENTION, index, x)
            router_logits = None
            if layer.mlp.experts is not None:
                router_logits = layer.mlp.router_logits(layer.feed_forward_input(x, projected))
            layer.feed_forward(x, projected, inputs)
            yield Observation(Part.FEED_FORWARD, index, x, router_logits=router_logits)


def attention_weights(q: Tensor, keys: Tensor, first: int, scores: AttentionScores, window: int | None) -> Tensor:
    """Return the weights, float32 [R, H, n], with which the values at n positions are added up for each row and head.

    `q` [R, H, D] are the rotated queries of the positions from `first` on, `keys` [n, KH, D] those of positions 0 to
    n - 1. A head's weights add up to 1, or with an attention sink to less.
    """
    num_rows, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = keys.shape[:2]
    grouped = q.float().view(num_rows, num_kv_heads, -1, head_dim)
    products = torch.einsum("rkgd,nkd->rkgn", grouped, keys).reshape(num_rows, num_heads, num_keys) * scores.scale
    if scores.softcap is not None:
        products = (products / scores.softcap).tanh() * scores.softcap
    rows = torch.arange(first, first + num_rows, device=q.device)[:, None]
    distance = rows - torch.arange(num_keys, device=q.device)
    is_hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    products.masked_fill_(is_hidden[:, None], float("-inf"))
    if scores.sinks is None:
        return products.softmax(dim=-1)
    sinks = scores.sinks.float()[None, :, None].expand(num_rows, -1, 1)
    return torch.cat((products, sinks), dim=-1).softmax(dim=-1)[..., :-1]
