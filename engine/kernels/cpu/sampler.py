"""The sampler in C++: the results of `engine.sampling.sampler.Sampler`, in a few passes over each row of logits.

Special rows, which are rare, go through that sampler itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.kernels.cpu.c_structs import SampledRow, SampleParameters
from engine.kernels.cpu.library import Library, Program, Team
from engine.kernels.lazy_memory import lazy_zeros
from engine.sampling.sampler import NO_MASKS, Sampler, SamplerOutput, banned_token_ids, packed_masks
from engine.scheduling.request import SamplingRow
from engine.shared.messages import GREEDY_TEMPERATURE

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

LANES = 16  # as in simd.h


class CpuSampler:
    """Samples tokens of a vocabulary on the threads of a team. Not thread-safe."""

    def __init__(self, library: Library, team: Team, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = [token_id for token_id in eos_token_ids if token_id < vocab_size]
        num_values = (-(-vocab_size // LANES) + 2) * LANES
        self._scratch = lazy_zeros((team.num_threads, 2 * num_values + vocab_size), torch.float32)
        self._c_rows = (SampledRow * 0)()
        self._parameters = SampleParameters(
            vocab_size=vocab_size, scratch=self._scratch.data_ptr(), scratch_stride=self._scratch.stride(0) * 4
        )
        self._program = Program(library, team)
        self._program.add("sample", self._parameters)
        # Waking another thread takes longer than one row.
        self._program_of_one = Program(library, library.new_team(1))
        self._program_of_one.add("sample", self._parameters)

    def sample(
        self, logits: Tensor, rows: Sequence[SamplingRow], masks: Mapping[int, bytes] = NO_MASKS
    ) -> SamplerOutput:
        """Sample the next token of each row from its logits, float32 [R, V]. May change the logits in place.

        The logits of special rows become those of the final distribution. `masks` are described in
        `engine.sampling.sampler.apply_masks`.
        """
        num_rows = len(rows)
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
        ids, biases = self._fill_rows(rows)
        parameters.ids, parameters.biases = ids.ctypes.data, biases.ctypes.data
        packed = packed_masks(masks, self.vocab_size) if masks else ()
        for index, mask in zip(masks, packed, strict=True):
            self._c_rows[index].allowed = mask.ctypes.data
        (self._program if num_rows > 1 else self._program_of_one).run()
        special = [index for index, row in enumerate(rows) if row.request.sampling.is_special]
        if special:
            part = logits[special]  # a copy, to which the program has only applied the masks
            sampled = self._reference_sampler.sample(part, [rows[index] for index in special])
            output.token_ids[special], output.is_finite[special] = sampled.token_ids, sampled.is_finite
            logits[special] = part
        return output

    @cached_property
    def _reference_sampler(self) -> Sampler:
        return Sampler(self.vocab_size, self.eos_token_ids, torch.device("cpu"))

    def _fill_rows(self, rows: Sequence[SamplingRow]) -> tuple[IntArray, FloatArray]:
        """Fill the C structs of all rows, and return the token ids and the biases that they refer to.

        Structs of special rows stay zero, which changes no logits.
        """
        if len(rows) > len(self._c_rows):
            self._c_rows = (SampledRow * (2 * len(rows)))()
            self._parameters.rows = ctypes.addressof(self._c_rows)
        ctypes.memset(self._c_rows, 0, ctypes.sizeof(SampledRow) * len(rows))
        ids: list[int] = []
        biases: list[float] = []
        for index, row in enumerate(rows):
            params, state = row.request.params, row.request.sampling
            if state.is_special:
                continue
            if params.temperature >= GREEDY_TEMPERATURE:
                _set_sampling(self._c_rows[index], row)
            if params.logit_bias or params.min_tokens or params.bad_words or state.has_penalty:
                self._set_changes(self._c_rows[index], row, ids, biases)
        return np.fromiter(ids, np.int32, len(ids)), np.fromiter(biases, np.float32, len(biases))

    def _set_changes(self, c_row: ctypes.Structure, row: SamplingRow, ids: list[int], biases: list[float]) -> None:
        """Set biases, banned tokens and penalties."""
        params = row.params
        c_row.first_id, c_row.first_bias, c_row.num_biased = len(ids), len(biases), len(params.logit_bias)
        ids += params.logit_bias.keys()
        biases += params.logit_bias.values()
        banned = banned_token_ids(row, self.eos_token_ids)
        c_row.num_banned = len(banned)
        ids += banned
        if row.request.sampling.has_penalty:
            c_row.history, c_row.num_history = row.request.history().buffer_info()
            c_row.num_prompt_tokens, c_row.num_drafted = row.num_prompt_tokens, len(row.draft_token_ids)
            ids += row.draft_token_ids
            c_row.repetition_penalty = params.repetition_penalty
            c_row.frequency_penalty = params.frequency_penalty
            c_row.presence_penalty = params.presence_penalty


def _set_sampling(c_row: ctypes.Structure, row: SamplingRow) -> None:
    """Set what sampling needs beyond greedy decoding."""
    request, params = row.request, row.request.params
    c_row.seed = request.seed
    c_row.position = len(request.token_ids) - request.num_prompt_tokens + len(row.draft_token_ids)
    c_row.temperature = params.temperature
    c_row.top_k = params.top_k
    c_row.top_p = params.top_p
    c_row.min_p = params.min_p
