"""The protocol of an execution: a model that is ready to run step after step."""

from typing import Protocol

from torch import Tensor

from engine.batch.inputs import BatchInputs


class Execution(Protocol):
    """A model that is ready to run step after step in the same buffers."""

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
