"""Steps that all ranks run: rank 0 says what is next, and the others follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.execution import Execution
from engine.loading import Adapters
from engine.model.linear import Linear
from engine.parts.distributed.group import Follower, Leader
from engine.parts.distributed.plan import ShardingPlan, shard_lora
from engine.parts.lora.checkpoint import LoraMatrices
from engine.parts.lora.slots import LoraAdapters
from engine.runner import ModelRunner

if TYPE_CHECKING:
    from engine.parts.inspection.executions import Observation, ObservedExecution

FloatArray = NDArray[np.float32]


class LeadingExecution(Execution):
    """The execution of rank 0, which the other ranks follow. The batch is in the buffers of the builder."""

    def __init__(self, execution: Execution, group: Leader) -> None:
        self.execution = execution
        self.group = group
        self.max_logit_rows = execution.max_logit_rows

    def forward(self, batch: BatchInputs) -> None:
        with self.group.everywhere("forward"):
            self.execution.forward(batch)

    def compute_hidden(self, rows: Tensor) -> Tensor:
        return self.execution.compute_hidden(rows)  # which are the same on all ranks

    def compute_logits(self, rows: Tensor) -> Tensor:
        """Compute the logits in one run for each command: a second run would write to memory that ranks still read."""
        if len(rows) > self.max_logit_rows:
            return torch.cat([self.compute_logits(some).clone() for some in torch.split(rows, self.max_logit_rows)])
        with self.group.everywhere("compute_logits", rows.cpu().numpy()):
            return self.execution.compute_logits(rows)


def lead(group: Leader, runner: ModelRunner, adapters: Adapters) -> ModelRunner:
    """Return a runner whose steps the other ranks follow from now on."""
    if isinstance(adapters, ShardedAdapters):
        adapters.leader = group
    leading = LeadingRunner(runner, group)
    leading.execution = LeadingExecution(runner.execution, group)
    return leading


@torch.inference_mode()
def follow(group: Follower, runner: ModelRunner, adapters: Adapters) -> None:
    """Run what rank 0 runs, until it ends."""
    group.obey(Rank(runner, adapters))


class Rank:
    """A rank other than 0: a method for each command of rank 0, which gets what it returns."""

    observed: ObservedExecution  # once it has been prepared
    parts: Iterator[Observation]
    last: Observation

    def __init__(self, runner: ModelRunner, adapters: Adapters) -> None:
        self.runner = runner
        self.adapters = adapters

    def forward(self) -> None:
        batch = self.runner.builder.current()
        self.runner.model.extend_rotary(int(batch.seq_lens.max()))
        self.runner.execution.forward(batch)

    def compute_logits(self, rows: Lengths) -> None:
        self.runner.execution.compute_logits(torch.from_numpy(rows).to(self.runner.builder.device))

    def write_adapter(self, index: int, slot: int, arrays: Mapping[str, tuple[FloatArray, FloatArray]]) -> None:
        """Write this rank's part of the matrices of one linear layer."""
        assert isinstance(self.adapters, ShardedAdapters)
        matrices = {name: LoraMatrices(*map(torch.from_numpy, pair)) for name, pair in arrays.items()}
        self.adapters.write_part(index, slot, matrices)

    def prepare_to_observe(self, max_num_rows: int) -> None:
        self.observed = self.runner.new_observed_execution(max_num_rows)

    def observe(self, is_first: bool) -> None:
        """Run the first or the next part of a step."""
        if is_first:
            self.parts = self.observed.forward()
        self.last = next(self.parts, None) or self.last

    def weigh_attention(self, layer: int, block_ids: Lengths, first: int) -> FloatArray:
        """Return the weights of the last part, of this rank's heads."""
        q = self.last.q
        assert q is not None
        weights = self.observed.attention_weights(layer, q, torch.from_numpy(block_ids).to(q.device), first)
        array: FloatArray = weights.cpu().numpy()
        return array

    def read_gates(self, layer: int) -> FloatArray:
        """Return what this rank's heads of the last part keep of their states and write to them."""
        gates = self.last.gates
        assert gates is not None
        array: FloatArray = self.observed.state_gates(layer, gates).cpu().numpy()
        return array

    def look_through_lens(self, hidden: FloatArray) -> None:
        self.observed.compute_logits(torch.from_numpy(hidden).to(self.last.residual))


class LeadingObservedExecution:
    """An execution of rank 0 that shows what happens inside, which the other ranks follow."""

    def __init__(self, execution: ObservedExecution, group: Leader) -> None:
        self.execution = execution
        self.builder = execution.builder
        self.max_logit_rows = execution.max_logit_rows
        self.group = group

    def forward(self) -> Iterator[Observation]:
        parts = self.execution.forward()
        is_first = True
        while True:
            with self.group.everywhere("observe", is_first):
                observation = next(parts, None)
            if observation is None:
                return
            yield observation
            is_first = False

    def attention_weights(self, layer: int, q: Tensor, block_ids: Tensor, first: int) -> Tensor:
        with self.group.everywhere("weigh_attention", layer, block_ids.cpu().numpy(), first) as replies:
            own = self.execution.attention_weights(layer, q, block_ids, first)
        return torch.cat([own, *(torch.from_numpy(reply).to(own.device) for reply in replies)], dim=1)

    def state_gates(self, layer: int, gates: Tensor) -> Tensor:
        with self.group.everywhere("read_gates", layer) as replies:
            own = self.execution.state_gates(layer, gates)
        return torch.cat([own, *(torch.from_numpy(reply).to(own.device) for reply in replies)], dim=2)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        with self.group.everywhere("look_through_lens", hidden.float().cpu().numpy()):
            return self.execution.compute_logits(hidden)


class LeadingRunner(ModelRunner):
    """The runner of rank 0, whose observed executions the other ranks follow too."""

    def __init__(self, runner: ModelRunner, group: Leader) -> None:
        self.__dict__ |= runner.__dict__
        self.group = group

    @torch.inference_mode()
    def new_observed_execution(self, max_num_rows: int) -> LeadingObservedExecution:
        with self.group.everywhere("prepare_to_observe", max_num_rows):
            execution = super().new_observed_execution(max_num_rows)
        return LeadingObservedExecution(execution, self.group)


class ShardedAdapters(LoraAdapters):
    """The adapters of one rank. Rank 0 passes on the matrices of each linear layer when it writes its own part."""

    leader: Leader | None = None  # of rank 0, once each rank has loaded the settings' adapters itself

    def __init__(self, plan: ShardingPlan, linears: Sequence[Linear], max_loras: int, max_rank: int) -> None:
        super().__init__(linears, max_loras, max_rank)
        self.plan = plan

    def write_layer(self, index: int, slot: int, matrices: Mapping[str, LoraMatrices]) -> None:
        if self.leader is None:
            self.write_part(index, slot, matrices)
            return
        arrays = {name: (update.a.numpy(), update.b.numpy()) for name, update in matrices.items()}
        with self.leader.everywhere("write_adapter", index, slot, arrays):
            self.write_part(index, slot, matrices)

    def write_part(self, index: int, slot: int, matrices: Mapping[str, LoraMatrices]) -> None:
        """Write this rank's part of the matrices."""
        parts = {name: shard_lora(name, update, self.plan) for name, update in matrices.items()}
        super().write_layer(index, slot, parts)
