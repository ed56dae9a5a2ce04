"""The group of ranks: its processes, what they share, and how rank 0 tells the others what to run."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from engine.config import EngineProcessConfig
from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.interface import Kernels
from engine.parts.distributed.collectives import Collectives, CpuCollectives, SharedMemory, TorchCollectives

LAUNCHER = (sys.executable, "-P", "-m", "engine.shared.launcher", "engine.parts.distributed.rank")
LOAD_SECONDS = 3600.0  # for all ranks to load their weights
END_SECONDS = 5.0  # between the loss of a connection and the end of its process
LOAD_GRACE = 30.0  # seconds for this rank to report why it cannot load either

logger = logging.getLogger("lightwell.engine")


class RankConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank other than 0 reads from its standard input, as JSON."""

    process: EngineProcessConfig
    parent: int  # process id of rank 0
    rank: int
    store: int  # descriptor of the file by which the ranks find each other
    memory: int  # descriptor of the shared memory
    connection: int  # descriptor of the pipe to rank 0


class RankGroup:
    """One rank's view of its group."""

    def __init__(self, rank: int, num_ranks: int, store: int, memory: SharedMemory) -> None:
        """Wait until all ranks are there. `store`: descriptor of a file by which they find each other."""
        self.rank = rank
        self.num_ranks = num_ranks
        self.memory = memory
        self.store = store
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the name of the host resolves to
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=LOAD_SECONDS)
        dist.init_process_group(backend, f"file:///proc/self/fd/{store}", timeout, num_ranks, rank)

    def least(self, *numbers: int) -> list[int]:
        """Return the least of each of the ranks' numbers. All ranks wait for each other."""
        least = torch.tensor([*numbers, 0])  # never empty
        dist.all_reduce(least, dist.ReduceOp.MIN)
        numbers_of_all: list[int] = least.tolist()
        return numbers_of_all[:-1]

    def new_collectives(self, kernels: Kernels) -> Collectives:
        """Return the collectives for the tensors of these kernels."""
        if isinstance(kernels, CpuKernels):
            return CpuCollectives(kernels, self.memory, self.rank, self.num_ranks)
        return TorchCollectives()

    def close(self) -> None:
        dist.destroy_process_group()
        self.memory.close()
        os.close(self.store)


class Leader(RankGroup):
    """The group as rank 0 sees it, which starts the others and ends with the first of them that ends."""

    def __init__(self, config: EngineProcessConfig, on_death: Callable[[str], None]) -> None:
        """`on_death` is called, maybe in another thread, with a sentence that says which rank has ended and how."""
        num_ranks = config.config.tensor_parallel_size
        memory = SharedMemory()
        self._connections: list[Connection[Any, Any]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ranks: dict[int, int] = {}  # by the descriptor of their process
        self._is_closing = threading.Event()
        self._grace = 0.0
        self._on_death = on_death
        store = os.memfd_create("lightwell-store")  # which needs no name, and ends with the group
        for rank in range(1, num_ranks):
            self._start(config, rank, store, memory)
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()
        super().__init__(0, num_ranks, store, memory)
        for connection in self._connections:
            with suppress(OSError):  # the watcher tells of the rank that has ended
                connection.send(None)

    def _start(self, config: EngineProcessConfig, rank: int, store: int, memory: SharedMemory) -> None:
        own, other = Pipe()
        fds = (memory.descriptor, store, other.fileno())
        rank_config = RankConfig(
            process=config,
            parent=os.getpid(),
            rank=rank,
            store=store,
            memory=memory.descriptor,
            connection=other.fileno(),
        )
        with other:
            process = subprocess.Popen(LAUNCHER, stdin=subprocess.PIPE, pass_fds=fds)
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(msgspec.json.encode(rank_config))
        self._connections.append(own)
        self._processes.append(process)
        self._ranks[os.pidfd_open(process.pid)] = rank

    @contextmanager
    def everywhere(self, command: str, *arguments: Any) -> Iterator[list[Any]]:
        """Have the other ranks run a command, a method of `Rank`, of which the caller runs this rank's part.

        Wait until all have. What they have returned, in their order, is then in the list that the context gives. If
        this rank's part fails, the group cannot go on: the others wait for it in vain.
        """
        replies: list[Any] = []
        try:
            for connection in self._connections:
                connection.send((command, *arguments))
            yield replies
            replies += [connection.recv() for connection in self._connections]
        except Exception as error:
            self._watcher.join(END_SECONDS)  # if another rank's end is the cause, it is reported
            if self._watcher.is_alive():
                self._on_death(f"rank 0 of {self.num_ranks} has failed: {error or type(error).__name__}")
            raise

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While the caller loads its part, give it time to report why it cannot if another rank ends.

        What one rank finds wrong with the model or the settings, all do.
        """
        self._grace = LOAD_GRACE
        yield
        self._grace = 0.0

    def _watch(self) -> None:
        """Wait until a rank ends, and report it."""
        poll = select.poll()
        for descriptor in self._ranks:
            poll.register(descriptor, select.POLLIN)
        ended = self._ranks[poll.poll()[0][0]]
        code = self._processes[ended - 1].wait()
        for descriptor in self._ranks:
            os.close(descriptor)
        how = f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        what = f"rank {ended} of {len(self._processes) + 1} {how}"
        if self._grace and not self._is_closing.is_set():
            logger.error("%s", what)
        if not self._is_closing.wait(self._grace):
            self._on_death(what)

    def close(self) -> None:
        """End the other ranks."""
        self._is_closing.set()
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()  # it may wait for this rank
            process.wait()
        self._watcher.join()
        super().close()


class Follower(RankGroup):
    """The group as a rank other than 0 sees it."""

    def __init__(self, config: RankConfig) -> None:
        num_ranks = config.process.config.tensor_parallel_size
        self._connection: Connection[Any, Any] = Connection(config.connection)
        super().__init__(config.rank, num_ranks, config.store, SharedMemory(config.memory))
        self._connection.recv()  # if this rank ended before, rank 0 would only see a broken connection

    def obey(self, rank: object) -> None:
        """Run the commands of rank 0, methods of `rank`, until it ends."""
        with suppress(EOFError):
            while True:
                command, *arguments = self._connection.recv()
                self._connection.send(getattr(rank, command)(*arguments))
