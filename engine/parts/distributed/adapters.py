"""LoRA adapters of which each rank has a part. Rank 0 alone reads those that are loaded while steps run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine.model.linear import Linear
from engine.parts.distributed.collectives import SharedMemory
from engine.parts.distributed.group import Command, Leader
from engine.parts.distributed.plan import ShardingPlan, shard_lora
from engine.parts.lora.checkpoint import LoraMatrices, module_shapes
from engine.parts.lora.slots import LoraAdapters

MAX_PROJECTIONS = 3  # of a linear layer


class ShardedAdapters(LoraAdapters):
    """The adapters of one rank. Rank 0 passes on the matrices of each linear layer when it writes its own part."""

    def __init__(
        self, plan: ShardingPlan, memory: SharedMemory, linears: Sequence[Linear], max_loras: int, max_rank: int
    ) -> None:
        super().__init__(linears, max_loras, max_rank)
        self.plan = plan
        self.leader: Leader | None = None  # of rank 0, once each rank has loaded the settings' adapters itself
        layers = range(plan.config.num_hidden_layers)
        largest = max(sum(shape) for layer in layers for shape in module_shapes(plan.config, layer).values())
        size = MAX_PROJECTIONS * max_rank * largest if max_loras else 0
        self._target = memory.integers((2,))  # the number of the linear layer, and the slot
        self._shapes = memory.integers((MAX_PROJECTIONS, 3))  # of each projection: rank, inputs and outputs
        self._numbers = memory.take(size * torch.float32.itemsize).view(torch.float32)

    def write_layer(self, index: int, slot: int, matrices: Mapping[str, LoraMatrices]) -> None:
        if self.leader is None:
            self._write_part(index, slot, matrices)
            return
        self._target[:] = index, slot
        self._shapes[:] = 0
        first = 0
        for number, name in enumerate(self._linears[index][0]):
            if (update := matrices.get(name)) is not None:
                self._shapes[number] = *update.a.shape, len(update.b)
                for matrix in (update.a, update.b):
                    self._numbers[first : first + matrix.numel()] = matrix.flatten()
                    first += matrix.numel()
        with self.leader.everywhere(Command.WRITE_ADAPTER):
            self._write_part(index, slot, matrices)

    def receive(self) -> None:
        """Write this rank's part of what rank 0 has passed on."""
        index, slot = self._target.tolist()
        matrices: dict[str, LoraMatrices] = {}
        first = 0
        names = self._linears[index][0]
        for name, (rank, num_inputs, num_outputs) in zip(names, self._shapes.tolist(), strict=False):
            if rank:
                sizes = [rank * num_inputs, rank * num_outputs]
                a, b = torch.split(self._numbers[first : first + sum(sizes)], sizes)
                matrices[name] = LoraMatrices(a.view(rank, num_inputs), b.view(num_outputs, rank))
                first += sum(sizes)
        self._write_part(index, slot, matrices)

    def _write_part(self, index: int, slot: int, matrices: Mapping[str, LoraMatrices]) -> None:
        parts = {name: shard_lora(name, update, self.plan) for name, update in matrices.items()}
        super().write_layer(index, slot, parts)
