"""The protocols of executions: models that are ready to run step after step, or part by part."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import BatchInputs
from engine.model.observation import Observation

OBSERVED_LOGIT_ROWS = 4  # that are computed at once: with the weights of an LM head, a few take as long as one


class Execution(Protocol):
    """A model that is ready to run step after step in the same buffers."""

    max_logit_rows: int  # whose logits one run of the model's head computes
    uncaptured: list[int]  # batch sizes whose CUDA graphs are still to be captured, the next one last

    def capture_next(self) -> None:
        """Capture the graphs of the last size of `uncaptured`, if any, which is then removed from the list.

        No step may be in flight.
        """
        ...

    def forward(self, batch: BatchInputs) -> None:
        """Compute the last hidden states of the batch's `hidden_rows`, and store the keys and values of every row."""
        ...

    def compute_hidden(self, rows: Tensor) -> Tensor:
        """Return the normalized last hidden states [R, hidden_size] of the rows [R] int64 of `hidden_rows`.

        The result is valid until the next call.
        """
        ...

    def compute_logits(self, rows: Tensor) -> Tensor:
        """Return the float32 logits [R, V] of the rows [R] int64 of `hidden_rows`, valid until the next call."""
        ...


class ObservedExecution(Protocol):
    """A model that shows what happens inside. It has buffers of its own, so that other steps may run in between."""

    builder: BatchBuilder

    def forward(self) -> Iterator[Observation]:
        """Run the step that the builder's buffers hold, with the kernels that serve, and yield after each part.

        What is yielded is valid until the next.
        """
        ...

    def attention_weights(self, layer: int, q: Tensor, block_ids: Tensor, first: int) -> Tensor:
        """Return the attention weights, float32 [R, H, n], of a projection's queries q, of positions from `first` on.

        `block_ids`, int64, are the blocks of all positions up to the last.
        """
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits, float32 [R, V], of at most `OBSERVED_LOGIT_ROWS` hidden states [R, hidden_size].

        They may be those of any layer. The result is valid until the next call.
        """
        ...
