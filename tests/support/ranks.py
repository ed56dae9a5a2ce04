"""A model in several ranks: processes, of which the test is rank 0, or threads of the test."""

import dataclasses
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.config import EngineConfig, EngineProcessConfig
from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.interface import Kernels
from engine.loading import LoadedModel, load_model
from engine.parts.distributed.collectives import Collectives, CpuCollectives, SharedMemory, TorchCollectives
from engine.parts.distributed.execution import follow, lead
from engine.parts.distributed.group import Leader
from engine.parts.distributed.rank import ModelPart


def fail(what: str) -> None:
    raise AssertionError(what)


@contextmanager
def load_ranks(config: EngineConfig) -> Iterator[LoadedModel]:
    """Load a model in as many processes as the settings say, with one thread each."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    group = Leader(EngineProcessConfig(address="", config=config), fail)
    try:
        loaded = load_model(config, make_part=partial(ModelPart, group))
        yield dataclasses.replace(loaded, runner=lead(group, loaded.runner, loaded.adapters))
    finally:
        group.close()
        torch.set_num_threads(num_threads)


class Room:
    """What the threads that stand for ranks share."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.barrier = threading.Barrier(num_ranks, timeout=120)
        self.values: list[Any] = [None] * num_ranks
        self.commands: list[queue.Queue[Any]] = [queue.Queue() for _ in range(num_ranks)]
        self.replies: list[queue.Queue[Any]] = [queue.Queue() for _ in range(num_ranks)]
        self.memory = SharedMemory()

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Return the values of all ranks, once all have one."""
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class ThreadCollectives(TorchCollectives):
    """Collectives of plain torch between threads."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room = room
        self.rank = rank

    def _all(self, x: Tensor) -> list[Tensor]:
        return self.room.exchange(self.rank, x.clone())


class ThreadGroup:
    """A group of threads as one of them sees it."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room = room
        self.rank = rank
        self.num_ranks = room.num_ranks
        self.memory = SharedMemory(room.memory.descriptor)

    def least(self, *numbers: int) -> list[int]:
        return [min(some) for some in zip(*self.room.exchange(self.rank, numbers), strict=True)]

    def new_collectives(self, kernels: Kernels) -> Collectives:
        if isinstance(kernels, CpuKernels):
            return CpuCollectives(kernels, self.memory, self.rank, self.num_ranks)
        return ThreadCollectives(self.room, self.rank)

    @contextmanager
    def everywhere(self, *command: Any) -> Iterator[list[Any]]:
        replies: list[Any] = []
        for commands in self.room.commands[1:]:
            commands.put(command)
        yield replies
        replies += [each.get(timeout=60) for each in self.room.replies[1:]]

    def obey(self, rank: object) -> None:
        while (command := self.room.commands[self.rank].get()) is not None:
            name, *arguments = command
            self.room.replies[self.rank].put(getattr(rank, name)(*arguments))


@contextmanager
def load_threads(config: EngineConfig) -> Iterator[LoadedModel]:
    """Load a model in threads of this process. It is as in processes, except that they share torch's settings."""
    room = Room(config.tensor_parallel_size)
    groups: list[Any] = [ThreadGroup(room, rank) for rank in range(room.num_ranks)]
    errors: list[BaseException] = []

    def run(group: Any) -> None:
        try:
            loaded = load_model(config, make_part=partial(ModelPart, group))
            follow(group, loaded.runner, loaded.adapters)
        except BaseException as error:
            errors.append(error)
            room.barrier.abort()

    threads = [threading.Thread(target=run, args=(group,), daemon=True) for group in groups[1:]]
    for thread in threads:
        thread.start()
    try:
        loaded = load_model(config, make_part=partial(ModelPart, groups[0]))
        yield dataclasses.replace(loaded, runner=lead(groups[0], loaded.runner, loaded.adapters))
    except threading.BrokenBarrierError:
        raise errors[0] from None
    finally:
        for commands in room.commands[1:]:
            commands.put(None)
        for thread in threads:
            thread.join(60)
        room.memory.close()
    assert not errors
