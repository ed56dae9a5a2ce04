"""LoRA in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.cpu.attention import LANES
from engine.kernels.cpu.c_structs import AddLoraParameters
from engine.kernels.cpu.kernels import CpuKernels
from engine.parts.lora.layers import LoraLayer


class CpuLoraLayer(LoraLayer):
    """Adds a call to the program that is recorded.

    Rows of A are padded to whole vectors, rows of B by one vector more, so that any vector can be read.
    """

    input_multiple = num_more_outputs = LANES

    def __call__(self, x: Tensor, out: Tensor, lora_slots: Tensor) -> None:
        kernels = self.kernels
        assert isinstance(kernels, CpuKernels)
        self.check_sizes(x, out)
        _, num_parts, max_rank, num_inputs = self.a.shape
        part_ends = torch.tensor(self.sizes).cumsum(0)
        shrunk = kernels.temporary(torch.Size((len(x), num_parts, max_rank)), torch.float32)
        parameters = AddLoraParameters(
            num_rows=kernels.buffer(x).num_rows,
            lora_slots=lora_slots.data_ptr(),
            input=kernels.read(x),
            input_stride=x.stride(0),
            num_inputs=num_inputs,
            a=self.a.data_ptr(),
            a_stride=self.a.stride(2),
            b=self.b.data_ptr(),
            b_stride=self.b.stride(1),
            ranks=self.ranks.data_ptr(),
            part_ends=part_ends.data_ptr(),
            num_parts=num_parts,
            max_rank=max_rank,
            shrunk=shrunk.data_ptr(),
            output=kernels.change(out),
            output_stride=out.stride(0),
        )
        kernels.call(f"add_lora_{str(kernels.dtype).removeprefix('torch.')}", parameters, self, part_ends, shrunk)
