"""Times on a GPU, between events in its queue and of replayed graphs. On a CPU, for tests, the host's clock."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from engine.batch.inputs import BatchInputs
from engine.runner import ModelRunner, PendingOutputs
from engine.scheduling.record import StepClock
from engine.scheduling.request import Step

CALLS = 10  # in a graph
REPLAYS = 10

T = TypeVar("T")


class HostEvent:
    """A replacement for device events on a CPU, whose work is complete when a call returns."""

    def record(self) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, other: HostEvent) -> float:
        return 1000 * (other._time - self._time)


def new_event(device: torch.device) -> Any:
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else HostEvent()


def seconds_between(first: Any, last: Any) -> float:
    return float(first.elapsed_time(last)) / 1000


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that the device takes for one call, with its waits for the host."""
    first, last = new_event(device), new_event(device)
    first.record()
    function()
    last.record()
    wait_for(device)
    return seconds_between(first, last)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that the device takes for a call, without the host: the median of replays of a graph."""
    if device.type != "cuda":
        return statistics.median(elapsed(function, device) for _ in range(REPLAYS))
    replay = captured(function)
    replay()
    return statistics.median(elapsed(replay, device) for _ in range(REPLAYS)) / CALLS


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """Return a function that replays CALLS calls. `function` must not wait for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled at their first use
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    return graph.replay


class TimedRunner:
    """A runner that records events in the device's queue before and after the work of each step."""

    def __init__(self, runner: ModelRunner, device: torch.device) -> None:
        self._runner = runner
        self._device = device
        self.spans: list[tuple[Any, Any]] = []  # events: of the forward pass and of the sampling of each step
        self.num_tokens: list[int] = []  # of each step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, step: Step, clock: StepClock) -> BatchInputs:
        self.num_tokens.append(step.num_tokens)
        return self._between(lambda: self._runner.forward(step, clock))

    def sample(self, step: Step, batch: BatchInputs, clock: StepClock) -> PendingOutputs:
        return self._between(lambda: self._runner.sample(step, batch, clock))

    def _between(self, work: Callable[[], T]) -> T:
        first, last = new_event(self._device), new_event(self._device)
        first.record()
        result = work()
        last.record()
        self.spans.append((first, last))
        return result

    def step_seconds(self) -> list[float]:
        """Return the seconds from the beginning of each step to that of the next, or to its own end."""
        wait_for(self._device)
        begins = [first for first, _ in self.spans[::2]]
        return [seconds_between(first, last) for first, last in itertools.pairwise([*begins, self.spans[-1][1]])]

    def idle_seconds(self, num_steps: int) -> float:
        """Return the seconds of the last steps in which the device had nothing to do."""
        wait_for(self._device)
        spans = self.spans[-2 * num_steps :]
        return sum(seconds_between(last, first) for (_, last), (first, _) in itertools.pairwise(spans))
