"""The sampler in C++: what engine.sampler does on any device, in a few passes over each row of logits.

Special rows, which are rare, go through that sampler itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import Structure, c_float, c_int64, c_uint64, c_void_p
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.kernels.cpu.library import Library, Team
from engine.kernels.cpu.program import Program
from engine.kernels.lazy_memory import lazy_zeros
from engine.sampling.ops import GREEDY_TEMPERATURE, has_penalty
from engine.sampling.sampler import NO_MASKS, Sampler, SamplerOutput, banned_token_ids, packed_masks
from engine.scheduling.request import SampledRequest
from engine.shared.messages import SamplingParams

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

LANES = 16  # as in simd.h


class SampledRow(Structure):
    """The settings of one row, as in sampler.h. It is greedy where all of them are 0."""

    _fields_ = [
        ("seed", c_uint64),
        ("position", c_int64),
        ("first_id", c_int64),
        ("first_bias", c_int64),
        ("num_biased", c_int64),
        ("num_banned", c_int64),
        ("num_drafted", c_int64),
        ("history", c_void_p),
        ("num_history", c_int64),
        ("num_prompt_tokens", c_int64),
        ("allowed", c_void_p),
        ("top_k", c_int64),
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("repetition_penalty", c_float),
        ("frequency_penalty", c_float),
        ("presence_penalty", c_float),
    ]


class Sample(Structure):
    _fields_ = [
        ("num_rows", c_int64),
        ("logits", c_void_p),
        ("logits_stride", c_int64),
        ("vocab_size", c_int64),
        ("rows", c_void_p),
        ("ids", c_void_p),
        ("biases", c_void_p),
        ("token_ids", c_void_p),
        ("is_finite", c_void_p),
        ("scratch", c_void_p),
        ("scratch_stride", c_int64),
    ]


class CpuSampler:
    """Samples tokens of a vocabulary on the threads of a team. Not for two threads at once."""

    def __init__(self, library: Library, team: Team, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = [token_id for token_id in eos_token_ids if token_id < vocab_size]
        num_values = (-(-vocab_size // LANES) + 2) * LANES
        self._scratch = lazy_zeros((team.num_threads, 2 * num_values + vocab_size), torch.float32)
        self._rows = (SampledRow * 0)()
        self._parameters = Sample(
            vocab_size=vocab_size,
            scratch=self._scratch.data_ptr(),
            scratch_stride=self._scratch.stride(0) * 4,
        )
        self._program = Program(library, team)
        self._program.add("sample", self._parameters)
        # One row is done sooner than another thread is woken.
        self._program_of_one = Program(library, library.new_team(1))
        self._program_of_one.add("sample", self._parameters)

    def sample(
        self, logits: Tensor, requests: Sequence[SampledRequest], masks: Mapping[int, bytes] = NO_MASKS
    ) -> SamplerOutput:
        """The next token of each request from its row of logits, float32 [R, V], which may be changed in place.

        Special rows of them become what their token was drawn from. `masks` are those of `engine.sampler.apply_masks`.
        """
        num_rows = len(requests)
        assert logits.shape == (num_rows, self.vocab_size)
        assert logits.dtype == torch.float32
        assert logits.is_cpu
        assert logits.stride(1) == 1
        output = SamplerOutput(torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, dtype=torch.bool))
        parameters = self._parameters
        parameters.num_rows = num_rows
        parameters.logits = logits.data_ptr()
        parameters.logits_stride = logits.stride(0)
        parameters.token_ids = output.token_ids.data_ptr()
        parameters.is_finite = output.is_finite.data_ptr()
        ids, biases = self._fill_rows(requests)
        parameters.ids, parameters.biases = ids.ctypes.data, biases.ctypes.data
        packed = packed_masks(masks, self.vocab_size)
        for row, mask in zip(masks, packed, strict=True):
            self._rows[row].allowed = mask.ctypes.data
        (self._program if num_rows > 1 else self._program_of_one).run()
        special = [row for row, request in enumerate(requests) if request.params.is_special]
        if special:
            part = logits[special]  # the program has done no more than mask them
            sampled = self._any_sampler.sample(part, [requests[row] for row in special])
            output.token_ids[special], output.is_finite[special] = sampled.token_ids, sampled.is_finite
            logits[special] = part
        return output

    @cached_property
    def _any_sampler(self) -> Sampler:
        return Sampler(self.vocab_size, self.eos_token_ids, torch.device("cpu"))

    def _fill_rows(self, requests: Sequence[SampledRequest]) -> tuple[IntArray, FloatArray]:
        """Returns the lists of all rows, one after the other: token ids, and biases. Special rows change nothing."""
        if len(requests) > len(self._rows):
            self._rows = (SampledRow * (2 * len(requests)))()
            self._parameters.rows = ctypes.addressof(self._rows)
        ctypes.memset(self._rows, 0, ctypes.sizeof(SampledRow) * len(requests))
        ids: list[int] = []
        biases: list[float] = []
        for index, request in enumerate(requests):
            params = request.params
            if params.is_special:
                continue
            if params.temperature >= GREEDY_TEMPERATURE:
                _set_sampling(self._rows[index], request, params)
            if params.logit_bias or params.min_tokens or params.bad_words or has_penalty(params):
                self._set_changes(self._rows[index], request, ids, biases)
        return np.fromiter(ids, np.int32, len(ids)), np.fromiter(biases, np.float32, len(biases))

    def _set_changes(self, row: SampledRow, request: SampledRequest, ids: list[int], biases: list[float]) -> None:
        params = request.params
        row.first_id, row.first_bias, row.num_biased = len(ids), len(biases), len(params.logit_bias)
        ids += params.logit_bias.keys()
        biases += params.logit_bias.values()
        banned = banned_token_ids(request, self.eos_token_ids)
        row.num_banned = len(banned)
        ids += banned
        if has_penalty(params):
            row.history, row.num_history = request.history().buffer_info()
            row.num_prompt_tokens, row.num_drafted = request.num_prompt_tokens, len(request.draft_token_ids)
            ids += request.draft_token_ids
            row.repetition_penalty = params.repetition_penalty
            row.frequency_penalty = params.frequency_penalty
            row.presence_penalty = params.presence_penalty


def _set_sampling(row: SampledRow, request: SampledRequest, params: SamplingParams) -> None:
    row.seed = request.seed
    row.position = request.num_output_tokens
    row.temperature = params.temperature
    row.top_k = params.top_k
    row.top_p = params.top_p
    row.min_p = params.min_p
