"""Mixers in Triton, against those in plain torch, whose models tests/parity compares with transformers."""

import zlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch.inputs import MAX_DRAFTED, StateMove
from engine.config import GatedDeltaNetSpec, MixerSpec, ShortConvSpec
from engine.kernels.interface import KernelOptions, Kernels
from engine.kernels.torch.kernels import TorchKernels
from engine.model.linear import Parameters
from engine.parts.hybrid.mixers import GatedDeltaNet, ShortConv, new_mixer, state_size
from engine.parts.triton.kernels import TritonKernels
from tests.support.kernel_device import ALSO_ON_A_GPU, DEVICE, assert_close, random_tensor

pytestmark = ALSO_ON_A_GPU

DELTA = GatedDeltaNetSpec(num_key_heads=2, num_value_heads=4, key_head_dim=48, value_head_dim=32, conv_size=4)
CONVOLUTION = ShortConvSpec(num_channels=300, conv_size=3, bias=True)
each_spec = pytest.mark.parametrize("spec", [DELTA, CONVOLUTION], ids=lambda spec: spec.description)


class RandomParameters(Parameters):
    def take_weight(self, name: str, *shape: int) -> Tensor:
        weights = random_tensor(zlib.crc32(name.encode()), *shape)
        return weights.abs() if name.endswith("decay") else weights


def mix(kernels: Kernels, spec: MixerSpec, rows: Tensor, states: Tensor, moves: list[StateMove]) -> Tensor:
    """Return what a mixer makes of projected rows, of which each sequence has its own."""
    config: Any = SimpleNamespace(hidden_size=32, rms_norm_eps=1e-5, mixers={0: spec})
    mixer, plan = new_mixer(config, 0, RandomParameters([]), kernels), torch.tensor(moves, device=DEVICE)
    if isinstance(mixer, ShortConv):
        return mixer.mix(rows[:, : mixer.num_channels], rows[:, mixer.num_channels :], states, plan)
    assert isinstance(mixer, GatedDeltaNet)
    return mixer.mix(rows, states, plan)


def projected(spec: MixerSpec, num_rows: int) -> Tensor:
    gate_size = DELTA.num_value_heads * DELTA.value_head_dim if spec is DELTA else CONVOLUTION.num_channels
    return random_tensor(1, num_rows, spec.row_size + gate_size)


@each_spec
def test_rows_of_several_sequences(spec: MixerSpec) -> None:
    """A prompt with drafts, a row after drafts that were accepted, both, and padding. No other state is changed."""
    moves = [StateMove(0, 5, 2, 0, -1, 3), StateMove(5, 1, 0, 3, 0, 4), StateMove(6, 9, 8, 1, 1, 5)]
    rows, before = projected(spec, 15), random_tensor(2, 6, state_size(spec))
    options, states, expected_states = KernelOptions(dtype=torch.float32), before.clone(), before.clone()
    expected = mix(TorchKernels(options, DEVICE), spec, rows, expected_states, moves)
    out = mix(TritonKernels(options, DEVICE), spec, rows, states, [*moves, StateMove(0, 0, 0, 0, 0, 0)])
    assert_close(out, expected)
    assert_close(states, expected_states)
    assert torch.equal(states[:3], before[:3])
    assert (states[3:] != before[3:]).any(dim=1).all()


@each_spec
def test_bits_are_those_of_one_step(spec: MixerSpec) -> None:
    """A chunk, then a row with three drafts, of which two are accepted, then more rows beside another sequence."""
    kernels, rows = TritonKernels(KernelOptions(dtype=torch.float32), DEVICE), projected(spec, 9)
    states = random_tensor(2, 5, state_size(spec))
    whole = mix(kernels, spec, rows, states, [StateMove(0, 9, 0, 0, -1, 0)])
    first = mix(kernels, spec, rows[:2], states, [StateMove(0, 2, 0, 0, -1, 1)])
    drafted = mix(kernels, spec, rows[2:6], states, [StateMove(0, 4, 3, 0, 1, 2)])
    moves = [StateMove(0, 2, 0, 0, -1, 4), StateMove(2, 4, 0, 2, 2, 3)]
    last = mix(kernels, spec, torch.cat([rows[:2], rows[5:]]), states, moves)
    assert torch.equal(torch.cat([first, drafted, last[3:]]), whole)
    assert torch.equal(last[:2], first)
    journal = slice((spec.conv_size - 1) * spec.num_channels, state_size(spec) - spec.matrix_size)
    assert journal.stop - journal.start == MAX_DRAFTED * spec.row_size
    states[:, journal] = 0
    assert torch.equal(states[3], states[0])
    assert torch.equal(states[4], states[1])
