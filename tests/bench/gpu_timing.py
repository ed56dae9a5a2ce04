"""Times on a GPU, between events in its queue and of replayed graphs. On a CPU, for tests, the host's clock."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from triton.testing import do_bench_cudagraph

from engine.batch.inputs import BatchInputs
from engine.runner import ModelRunner, PendingOutputs
from engine.scheduling.record import StepClock
from engine.scheduling.request import Step

CALLS = 10  # that are timed on a CPU


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
    """Return the seconds that the device takes for a call, without the host: the median of replays of a graph.

    `function` must not wait for the device.
    """
    if device.type == "cuda":
        return float(do_bench_cudagraph(function, return_mode="median")) / 1000
    return statistics.median(elapsed(function, device) for _ in range(CALLS))


class TimedRunner:
    """A runner that records events in the device's queue before and after the work of each step."""

    def __init__(self, runner: ModelRunner, device: torch.device) -> None:
        self._runner = runner
        self._device = device
        self._begins: list[Any] = []
        self._end = new_event(device)  # of the last step
        self.num_tokens: list[int] = []  # of each step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, step: Step, clock: StepClock) -> BatchInputs:
        self.num_tokens.append(step.num_tokens)
        self._begins.append(new_event(self._device))
        self._begins[-1].record()
        return self._runner.forward(step, clock)

    def sample(self, step: Step, batch: BatchInputs, clock: StepClock) -> PendingOutputs:
        outputs = self._runner.sample(step, batch, clock)
        self._end.record()
        return outputs

    def step_seconds(self) -> list[float]:
        """Return the seconds from the beginning of each step to that of the next, or to its own end."""
        wait_for(self._device)
        return [seconds_between(first, last) for first, last in itertools.pairwise([*self._begins, self._end])]
