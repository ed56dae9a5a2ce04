"""Steps that all ranks run: rank 0 says what is next, and the others follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch.inputs import BatchInputs
from engine.execution import Execution
from engine.loading import Adapters
from engine.model.linear import Linear
from engine.parts.distributed.collectives import SharedMemory
from engine.parts.distributed.group import Command, Follower, Leader, RankGroup
from engine.parts.distributed.plan import ShardingPlan, shard_lora
from engine.parts.lora.checkpoint import LoraMatrices, module_shapes
from engine.parts.lora.slots import LoraAdapters
from engine.runner import ModelRunner

if TYPE_CHECKING:
    from engine.parts.inspection.executions import Observation, ObservedExecution


class Message:
    """What a command is about, in shared memory. The batch is in the buffers of the builder."""

    def __init__(self, memory: SharedMemory, max_num_rows: int) -> None:
        self.max_observed = memory.integers((1,))  # rows of an observed execution
        self._num_rows = memory.integers((1,))
        self._rows = memory.integers((max_num_rows,))

    def write_rows(self, rows: Tensor) -> None:
        """Say which rows' logits are to be computed."""
        self._num_rows[0] = len(rows)
        self._rows[: len(rows)] = rows.cpu().numpy()

    def read_rows(self, device: torch.device) -> Tensor:
        return torch.from_numpy(np.array(self._rows[: self._num_rows[0]])).to(device)


class LeadingExecution(Execution):
    """The execution of rank 0, which the other ranks follow."""

    def __init__(self, execution: Execution, group: Leader, message: Message) -> None:
        self.execution = execution
        self.group = group
        self.message = message
        self.max_logit_rows = execution.max_logit_rows

    def forward(self, batch: BatchInputs) -> None:
        with self.group.everywhere(Command.FORWARD):
            self.execution.forward(batch)

    def compute_hidden(self, rows: Tensor) -> Tensor:
        return self.execution.compute_hidden(rows)  # which are the same on all ranks

    def compute_logits(self, rows: Tensor) -> Tensor:
        """Compute the logits in one run for each command: a second run would write to memory that ranks still read."""
        if len(rows) > self.max_logit_rows:
            return torch.cat([self.compute_logits(some).clone() for some in torch.split(rows, self.max_logit_rows)])
        self.message.write_rows(rows)
        with self.group.everywhere(Command.LOGITS):
            return self.execution.compute_logits(rows)


def lead(group: Leader, runner: ModelRunner, adapters: Adapters) -> ModelRunner:
    """Return a runner whose steps the other ranks follow from now on."""
    message = Message(group.memory, runner.builder.rows.shape[1])
    if isinstance(adapters, ShardedAdapters):
        adapters.leader = group
    leading = LeadingRunner(runner, group, message.max_observed)
    leading.execution = LeadingExecution(runner.execution, group, message)
    return leading


@torch.inference_mode()
def follow(group: Follower, runner: ModelRunner, adapters: Adapters) -> None:
    """Run what rank 0 runs, until it ends."""
    message = Message(group.memory, runner.builder.rows.shape[1])
    observer: ObservingFollower | None = None
    for command in group.commands():
        if command is Command.FORWARD:
            batch = runner.builder.current()
            runner.model.extend_rotary(int(batch.seq_lens.max()))
            runner.execution.forward(batch)
        elif command is Command.LOGITS:
            runner.execution.compute_logits(message.read_rows(runner.builder.device))
        elif command is Command.WRITE_ADAPTER:
            assert isinstance(adapters, ShardedAdapters)
            adapters.receive()
        elif command is Command.PREPARE_TO_OBSERVE:
            max_num_rows = int(message.max_observed[0])
            execution = runner.new_observed_execution(max_num_rows)
            memory = ObservationMemory(group, runner, max_num_rows, execution.max_logit_rows)
            observer = ObservingFollower(execution, memory, group.rank)
        else:
            assert observer is not None
            observer.run(command)


class ObservationMemory:
    """What ranks exchange beside the buffers of the batch. Each attends with a part of the heads."""

    def __init__(self, group: RankGroup, runner: ModelRunner, max_num_rows: int, max_logit_rows: int) -> None:
        config = runner.model.config
        max_blocks = runner.builder.tables.shape[2]
        num_heads = max(layer.attention.num_heads for layer in config.layers)
        self.target = group.memory.integers((3,))  # layer, first position, number of blocks
        self.block_ids = group.memory.integers((max_blocks,))
        self.num_hidden = group.memory.integers((1,))
        hidden_bytes = max_logit_rows * config.hidden_size * torch.float32.itemsize
        self.hidden = group.memory.take(hidden_bytes).view(torch.float32).view(max_logit_rows, -1)
        num_weights = max_num_rows * num_heads * max_blocks * runner.builder.block_size
        self.weights = [group.memory.take(num_weights * 4).view(torch.float32) for _ in range(group.num_ranks)]


class LeadingObservedExecution:
    """The execution of rank 0, which the other ranks follow."""

    def __init__(self, execution: ObservedExecution, group: Leader, memory: ObservationMemory) -> None:
        self.execution = execution
        self.builder = execution.builder
        self.max_logit_rows = execution.max_logit_rows
        self.group = group
        self.memory = memory

    def forward(self) -> Iterator[Observation]:
        parts = self.execution.forward()
        command = Command.OBSERVE
        while True:
            with self.group.everywhere(command):
                observation = next(parts, None)
            if observation is None:
                return
            yield observation
            command = Command.OBSERVE_NEXT

    def attention_weights(self, layer: int, q: Tensor, block_ids: Tensor, first: int) -> Tensor:
        memory = self.memory
        memory.target[:] = layer, first, len(block_ids)
        memory.block_ids[: len(block_ids)] = block_ids.cpu().numpy()
        with self.group.everywhere(Command.WEIGH_ATTENTION):
            own = self.execution.attention_weights(layer, q, block_ids, first)
        others = [weights[: own.numel()].view(own.shape).to(own.device) for weights in memory.weights[1:]]
        return torch.cat([own, *others], dim=1)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        self.memory.num_hidden[0] = len(hidden)
        self.memory.hidden[: len(hidden)] = hidden
        with self.group.everywhere(Command.LOOK_THROUGH_LENS):
            return self.execution.compute_logits(hidden)


class ObservingFollower:
    """What a rank other than 0 does for an execution of rank 0 that shows what happens inside."""

    def __init__(self, execution: ObservedExecution, memory: ObservationMemory, rank: int) -> None:
        self.execution = execution
        self.memory = memory
        self.rank = rank
        self.parts: Iterator[Observation] = iter(())
        self.last: Observation | None = None

    def run(self, command: Command) -> None:
        if command is Command.WEIGH_ATTENTION:
            self._weigh_attention()
        elif command is Command.LOOK_THROUGH_LENS:
            assert self.last is not None
            hidden = self.memory.hidden[: self.memory.num_hidden[0]]
            self.execution.compute_logits(hidden.to(self.last.residual))
        else:
            if command is Command.OBSERVE:
                self.parts = self.execution.forward()
            self.last = next(self.parts, self.last)

    def _weigh_attention(self) -> None:
        assert self.last is not None
        assert self.last.q is not None
        layer, first, num_blocks = self.memory.target.tolist()
        block_ids = torch.from_numpy(self.memory.block_ids[:num_blocks]).to(self.last.q.device)
        weights = self.execution.attention_weights(layer, self.last.q, block_ids, first)
        self.memory.weights[self.rank][: weights.numel()] = weights.flatten()


class LeadingRunner(ModelRunner):
    """The runner of rank 0, whose observed executions the other ranks follow too."""

    def __init__(self, runner: ModelRunner, group: Leader, max_observed: NDArray[np.int64]) -> None:
        """`max_observed`: a number in shared memory, for the rows of an observed execution."""
        self.__dict__ |= runner.__dict__
        self.group = group
        self._max_observed = max_observed

    @torch.inference_mode()
    def new_observed_execution(self, max_num_rows: int) -> LeadingObservedExecution:
        self._max_observed[0] = max_num_rows
        with self.group.everywhere(Command.PREPARE_TO_OBSERVE):
            execution = super().new_observed_execution(max_num_rows)
            memory = ObservationMemory(self.group, self, max_num_rows, execution.max_logit_rows)
        return LeadingObservedExecution(execution, self.group, memory)


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
