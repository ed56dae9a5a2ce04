"""Mixers: what layers have in place of attention.

A mixer keeps a state of fixed size for each sequence, which rows advance one by one in the order of their positions.
So the bits of a state depend neither on the chunks of a prompt nor on other sequences. The state before a step stays as
it was: a step can be taken back. States are float32, [blocks, size]: the last inputs of the convolution, then the
journal with the rows of the last draft, then a matrix for each head.

Shapes: T rows of the batch, S sequences, C channels of the convolution, V value heads.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch.inputs import MAX_DRAFTED
from engine.config import GatedDeltaNetSpec, MixerSpec, ModelConfig, ShortConvSpec
from engine.kernels.cpu.c_structs import GatedDeltaNetParameters, ShortConvParameters, StateParameters
from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.cpu.recorder import ProgramRecorder
from engine.kernels.interface import Kernels
from engine.kernels.lazy_memory import lazy_zeros
from engine.model.layer_inputs import LayerInputs
from engine.model.linear import Linear, Parameters
from engine.shared.parts import engine_part

L2_EPS = 1e-6
FLOAT_BYTES = 4


def state_size(spec: MixerSpec) -> int:
    """Return how many numbers the state of a layer has."""
    return (spec.conv_size - 1) * spec.num_channels + MAX_DRAFTED * spec.row_size + spec.matrix_size


def state_bytes(config: ModelConfig) -> int:
    """Return the bytes of the state of one sequence in all layers."""
    return FLOAT_BYTES * sum(map(state_size, config.mixers.values()))


def new_states(config: ModelConfig, num_states: int, device: torch.device) -> dict[int, Tensor]:
    """Return memory for states, float32 [num_states, size], of each layer that has them."""
    sizes = {index: state_size(spec) for index, spec in config.mixers.items()}
    memory = lazy_zeros((num_states, sum(sizes.values())), torch.float32, device)
    return dict(zip(sizes, torch.split(memory, list(sizes.values()), dim=1), strict=True))


class Mixer(ABC):
    """A mixer and its projections; this class and its subclasses compute in plain torch."""

    in_proj: Linear
    o_proj: Linear

    def __init__(self, index: int, spec: MixerSpec, kernels: Kernels) -> None:
        self.index = index
        self.kernels = kernels
        self.num_channels, self.conv_size, self.row_size = spec.num_channels, spec.conv_size, spec.row_size

    @abstractmethod
    def project(self, x: Tensor, inputs: LayerInputs) -> list[Tensor]:
        """Advance the states by hidden states [T, hidden_size]; return what `o_proj` reads of each row."""

    def __call__(self, projected: list[Tensor], inputs: LayerInputs, residual: Tensor | None) -> Tensor:
        """Return the output for what `project` returned, or add it to `residual` in place."""
        return self.o_proj(projected[0], inputs.lora_slots, residual)

    @property
    def linears(self) -> list[Linear]:
        """The linear layers, in the order of their use."""
        return [self.in_proj, self.o_proj]

    def take_convolution(self, parameters: Parameters, name: str) -> Tensor:
        """Take the weights of the convolution, and return them as float32 [conv_size, C], the row itself last."""
        weights = parameters.take(name, self.num_channels, self.conv_size)
        return weights.float().T.contiguous().to(self.kernels.device)

    def sequences(self, rows: Tensor, states: Tensor, moves: Tensor) -> Iterator[MixedRows]:
        """Yield the rows of each sequence. `rows` is [T, row_size or more]; what is stored is [blocks, size]."""
        for first, num_rows, num_drafts, num_replayed, source, target in moves.tolist():
            assert source != target
            past = states.new_zeros(self.conv_size - 1, self.num_channels)
            before = states.new_zeros(states.shape[1]) if source < 0 else states[source]
            if source >= 0:
                past = before[: past.numel()].view_as(past)
            journal = before[past.numel() :][: MAX_DRAFTED * self.row_size].view(MAX_DRAFTED, self.row_size)
            replayed = journal[:num_replayed]
            own = rows[first : first + num_rows, : self.row_size].float()
            yield MixedRows(slice(first, first + num_rows), past, replayed, own, num_drafts, before, states[target])


@dataclass(frozen=True)
class MixedRows:
    """The rows of one sequence."""

    batch: slice  # of the batch
    past: Tensor  # [conv_size - 1, C] before all others
    replayed: Tensor  # [rows, row_size] accepted rows of the last draft
    own: Tensor  # [rows, row_size] of the batch
    num_drafts: int  # at their end, whose state is not kept
    before: Tensor  # the state before
    after: Tensor  # and after the rows that are kept

    def convolved(self, weights: Tensor) -> Tensor:
        """Return the convolution [rows, C] of the rows, those that are replayed included."""
        num_channels = weights.shape[1]
        inputs = torch.cat([self.past, self.replayed[:, :num_channels], self.own[:, :num_channels]])
        total = torch.zeros_like(inputs[len(self.past) :])
        for offset, weight in enumerate(weights):
            total = total + inputs[offset : offset + len(total)] * weight
        return total

    def store(self) -> None:
        """Store the past of later rows, and the drafted rows."""
        num_kept, num_channels = len(self.own) - self.num_drafts, self.past.shape[1]
        kept = torch.cat([self.past, self.replayed[:, :num_channels], self.own[:num_kept, :num_channels]])
        size = self.past.numel()
        self.after[:size] = kept[len(kept) - len(self.past) :].reshape(-1)
        drafted = self.own[num_kept:].reshape(-1)
        self.after[size : size + len(drafted)] = drafted


class GatedDeltaNet(Mixer):
    """A gated delta net (Yang et al. 2025): every value head has a matrix [D_k, D_v] that tokens decay and write to.

    S = exp(g) S; S = S + k (beta (v - S^T k))^T; the output is the norm of S^T q, gated.
    """

    def __init__(
        self, index: int, spec: GatedDeltaNetSpec, config: ModelConfig, parameters: Parameters, kernels: Kernels
    ):
        super().__init__(index, spec, kernels)
        self.spec = spec
        prefix, num_heads = f"model.layers.{index}.linear_attn", spec.num_value_heads
        self.value_size = num_heads * spec.value_head_dim
        sizes = {"qkv": spec.num_channels, "b": num_heads, "a": num_heads, "z": self.value_size}
        projections = [(f"{prefix}.in_proj_{name}", size) for name, size in sizes.items()]
        self.in_proj = Linear(kernels, parameters, projections, config.hidden_size, has_bias=False)
        self.conv = self.take_convolution(parameters, f"{prefix}.conv1d.weight")
        self.decay = parameters.take(f"{prefix}.decay", num_heads).float()
        self.step_bias = parameters.take(f"{prefix}.dt.bias", num_heads).float()
        self.norm = parameters.take(f"{prefix}.norm.weight", spec.value_head_dim).float()
        self.eps = config.rms_norm_eps
        out = [(f"{prefix}.out_proj", config.hidden_size)]
        self.o_proj = Linear(kernels, parameters, out, self.value_size, has_bias=False)
        heads, num_keys = torch.arange(num_heads, device=kernels.device), spec.num_key_heads
        self.key_heads = heads % num_keys if spec.is_tiled else heads // (num_heads // num_keys)  # of value heads

    def project(self, x: Tensor, inputs: LayerInputs) -> list[Tensor]:
        rows = self.in_proj(x, inputs.lora_slots)
        assert inputs.states is not None
        mixed = self.mix(rows, inputs.kv_cache.states[self.index], inputs.states)
        return [mixed, rows[:, self.num_channels : self.row_size]]  # what `gates` reads, for those who look inside

    def gates(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return which share of the state is kept and how strongly is written, [..., V] each, for rows [..., 2 * V]."""
        strengths, steps = rows.chunk(2, dim=-1)
        steps = steps + self.step_bias
        softplus = steps.clamp(min=0) + torch.log(1 + torch.exp(-steps.abs()))
        return torch.exp(-self.decay * softplus), 1 / (1 + torch.exp(-strengths))

    def mix(self, rows: Tensor, states: Tensor, moves: Tensor) -> Tensor:
        """Return the outputs of all heads [T, V * D_v] for projected rows [T, row_size + V * D_v]."""
        out = rows.new_empty(len(rows), self.value_size)
        for sequence in self.sequences(rows, states, moves):
            gates = rows[sequence.batch, self.row_size :].float()
            heads = list(self._advance(sequence))[len(sequence.replayed) :]
            for row, (head, gate) in enumerate(zip(heads, gates, strict=True), start=sequence.batch.start):
                normed = head * torch.rsqrt(head.pow(2).mean(-1, keepdim=True) + self.eps) * self.norm
                out[row] = (normed.flatten() * _silu(gate)).to(out.dtype)
            sequence.store()
        return out

    def _advance(self, sequence: MixedRows) -> Iterator[Tensor]:
        """Advance the state row by row, so that no result depends on the number of rows. Yield S^T q [V, D_v]."""
        spec = self.spec
        num_keys, num_values, sizes = spec.num_key_heads, spec.num_value_heads, (spec.key_head_dim, spec.value_head_dim)
        first = len(sequence.before) - spec.matrix_size
        state = sequence.before[first:].view(num_values, *sizes)
        rows = torch.cat([sequence.replayed, sequence.own])[:, spec.num_channels :]
        for number, (mixed, row) in enumerate(zip(sequence.convolved(self.conv), rows, strict=True), start=1):
            q, k, v = torch.split(_silu(mixed), [num_keys * sizes[0], num_keys * sizes[0], self.value_size])
            q, k = (_unit(each.view(num_keys, -1))[self.key_heads] for each in (q, k))
            kept, strengths = self.gates(row)
            state = state * kept[:, None, None]
            delta = (v.view(num_values, sizes[1]) - (state * k[:, :, None]).sum(1)) * strengths[:, None]
            state = state + k[:, :, None] * delta[:, None]
            yield (state * (q * sizes[0] ** -0.5)[:, :, None]).sum(1)
            if number == len(rows) - sequence.num_drafts:
                sequence.after[first:] = state.reshape(-1)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))  # F.silu may round an element by its index


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2_EPS)


class ShortConv(Mixer):
    """A gated convolution of each channel (LFM 2): y = C * convolution(B * x)."""

    def __init__(
        self, index: int, spec: ShortConvSpec, config: ModelConfig, parameters: Parameters, kernels: Kernels
    ) -> None:
        super().__init__(index, spec, kernels)
        prefix, size = f"model.layers.{index}.conv", spec.num_channels
        self.in_proj = Linear(
            kernels, parameters, [(f"{prefix}.in_proj", 3 * size)], config.hidden_size, has_bias=spec.bias
        )
        self.conv = self.take_convolution(parameters, f"{prefix}.conv.weight")
        self.bias = parameters.take(f"{prefix}.conv.bias", size).float() if spec.bias else None
        out = [(f"{prefix}.out_proj", config.hidden_size)]
        self.o_proj = Linear(kernels, parameters, out, size, has_bias=spec.bias)

    def project(self, x: Tensor, inputs: LayerInputs) -> list[Tensor]:
        b, c, x = torch.split(self.in_proj(x, inputs.lora_slots), self.num_channels, dim=1)
        rows = self.kernels.act_and_mul(b, x, "identity")
        assert inputs.states is not None
        return [self.mix(rows, c, inputs.kv_cache.states[self.index], inputs.states)]

    def mix(self, rows: Tensor, gate: Tensor, states: Tensor, moves: Tensor) -> Tensor:
        """Return the gated convolution [T, C] of rows [T, C]."""
        out = torch.empty_like(rows)
        for sequence in self.sequences(rows, states, moves):
            convolved = sequence.convolved(self.conv)[len(sequence.replayed) :]
            if self.bias is not None:
                convolved = convolved + self.bias
            out[sequence.batch] = (convolved * gate[sequence.batch].float()).to(out.dtype)
            sequence.store()
        return out


# In C++: see mixers.h.


def _state_parameters(recorder: ProgramRecorder, states: Tensor, moves: Tensor) -> ctypes.Structure:
    return StateParameters(
        blocks=states.data_ptr(), block_stride=states.stride(0), num_seqs=recorder.num_seqs, moves=moves.data_ptr()
    )


class CpuGatedDeltaNet(GatedDeltaNet):
    """A gated delta net in C++. The matrix of a head is stored in strips of columns."""

    def mix(self, rows: Tensor, states: Tensor, moves: Tensor) -> Tensor:
        recorder, spec = self.kernels, self.spec
        assert isinstance(recorder, CpuKernels)
        assert rows.shape[1] == self.row_size + self.value_size
        assert states.shape[1] == state_size(spec)
        assert self.conv.shape == (spec.conv_size, spec.num_channels)
        assert self.decay.shape == self.step_bias.shape == (spec.num_value_heads,)
        assert self.norm.shape == (spec.value_head_dim,)
        out = recorder.new(recorder.buffer(rows).num_rows, len(rows), self.value_size).tensor
        parameters = GatedDeltaNetParameters(
            states=_state_parameters(recorder, states, moves),
            input=recorder.read(rows),
            input_stride=rows.stride(0),
            num_key_heads=spec.num_key_heads,
            num_value_heads=spec.num_value_heads,
            is_tiled=spec.is_tiled,
            key_size=spec.key_head_dim,
            value_size=spec.value_head_dim,
            conv_size=spec.conv_size,
            conv=self.conv.data_ptr(),
            decay=self.decay.data_ptr(),
            step_bias=self.step_bias.data_ptr(),
            norm=self.norm.data_ptr(),
            epsilon=self.eps,
            output=out.data_ptr(),
            output_stride=out.stride(0),
        )
        recorder.call("gated_delta_net", parameters, self, states, moves)
        return out


class CpuShortConv(ShortConv):
    """A short convolution in C++."""

    def mix(self, rows: Tensor, gate: Tensor, states: Tensor, moves: Tensor) -> Tensor:
        recorder = self.kernels
        assert isinstance(recorder, CpuKernels)
        assert rows.shape == gate.shape
        assert rows.shape[1] == self.num_channels
        assert states.shape[1] == (self.conv_size - 1 + MAX_DRAFTED) * self.num_channels
        assert self.conv.shape == (self.conv_size, self.num_channels)
        assert self.bias is None or self.bias.shape == (self.num_channels,)
        out = recorder.new(recorder.buffer(rows).num_rows, len(rows), self.num_channels).tensor
        parameters = ShortConvParameters(
            states=_state_parameters(recorder, states, moves),
            input=recorder.read(rows),
            input_stride=rows.stride(0),
            gate=recorder.read(gate),
            gate_stride=gate.stride(0),
            num_channels=self.num_channels,
            conv_size=self.conv_size,
            conv=self.conv.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            output=out.data_ptr(),
            output_stride=out.stride(0),
        )
        recorder.call("short_conv", parameters, self, states, moves)
        return out


# In Triton: see engine/parts/triton/mixers.py.


class TritonGatedDeltaNet(GatedDeltaNet):
    """A gated delta net on a GPU."""

    def mix(self, rows: Tensor, states: Tensor, moves: Tensor) -> Tensor:
        triton, size = engine_part("triton", "mixers"), self.spec.value_head_dim
        convolved = triton.convolve(rows, self.row_size, self.conv, None, states, moves, has_silu=True)
        heads = triton.advance(convolved, self.spec, states, moves, self.key_heads, self.decay, self.step_bias)
        normed = self.kernels.rms_norm(heads.view(-1, size), self.norm, self.eps).view(heads.shape)
        return self.kernels.act_and_mul(rows[:, self.row_size :], normed, "silu")


class TritonShortConv(ShortConv):
    """A short convolution on a GPU."""

    def mix(self, rows: Tensor, gate: Tensor, states: Tensor, moves: Tensor) -> Tensor:
        triton = engine_part("triton", "mixers")
        convolved = triton.convolve(rows, self.row_size, self.conv, self.bias, states, moves, has_silu=False)
        return self.kernels.act_and_mul(gate, convolved[-len(rows) :], "identity")


def new_mixer(config: ModelConfig, index: int, parameters: Parameters, kernels: Kernels) -> Mixer:
    """Return the mixer of a layer, for its kernels."""
    kinds: tuple[type[GatedDeltaNet], type[ShortConv]] = GatedDeltaNet, ShortConv
    if isinstance(kernels, CpuKernels):
        kinds = CpuGatedDeltaNet, CpuShortConv
    elif kernels.name.startswith("triton"):
        kinds = TritonGatedDeltaNet, TritonShortConv
    spec = config.mixers[index]
    if isinstance(spec, GatedDeltaNetSpec):
        return kinds[0](index, spec, config, parameters, kernels)
    return kinds[1](index, spec, config, parameters, kernels)
