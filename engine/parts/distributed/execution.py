"""Steps that all ranks run: rank 0 says what is next, and the others follow."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.adapters import Adapters
from engine.batch.inputs import BatchInputs
from engine.execution.load import Execution
from engine.parts.distributed.adapters import ShardedAdapters
from engine.parts.distributed.group import Command, Follower, Leader
from engine.parts.distributed.observation import LeadingRunner, ObservationMemory, ObservingFollower
from engine.parts.distributed.shared_memory import SharedMemory
from engine.runner import ModelRunner


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


class LeadingExecution:
    """The execution of rank 0, which the other ranks follow."""

    def __init__(self, execution: Execution, group: Leader, message: Message) -> None:
        self.execution = execution
        self.group = group
        self.message = message
        self.max_logit_rows = execution.max_logit_rows
        self.uncaptured: list[int] = []

    def capture_next(self) -> None:
        """Do nothing: there are no graphs."""

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
