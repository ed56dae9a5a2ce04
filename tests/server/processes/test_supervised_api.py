"""When an API process hangs. The tests of the supervisor have the rest, with real processes."""

import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from server.processes.supervised_api import SupervisedApi, linked_configs
from server.processes.supervisor_channel import Heartbeat, make_channel
from server.settings.process_configs import ApiProcessConfig
from server.settings.table import Settings
from tests.support.turned_clock import TurnedClock


@pytest.mark.parametrize(("share", "seconds"), [(0.0, 15), (0.4, 15), (0.7, 17), (0.9, 25), (1.0, 143), (1.2, 143)])
def test_a_silent_api_process_hangs_even_if_the_machine_is_busy(
    monkeypatch: pytest.MonkeyPatch, share: float, seconds: int
) -> None:
    """`share` of the time, one of its threads waits for a CPU, while another one may loop."""
    clock = TurnedClock()
    began = clock.time
    monkeypatch.setattr("server.processes.run_queue.cpu_waits", lambda _: {1: share * clock.time})
    process: Any = SimpleNamespace(pid=0)
    channel, other_end = make_channel()
    api = SupervisedApi(process, channel, 10.0, clock)
    assert not api.hangs()
    other_end.send(Heartbeat())
    assert api.receive() == [Heartbeat()]
    assert api.hangs_at == began + 13.0
    while not api.hangs() and clock.time < began + 200:
        clock.time += 1.0
    assert clock.time - began == seconds
    other_end.close()
    channel.close()


def test_workers_are_linked_with_the_coordinator_alone() -> None:
    config = ApiProcessConfig(settings=Settings(), models=(), supervisor_fd=7)
    with linked_configs(config, []) as configs:
        assert configs == [config]
        assert config.inherited_fds == [7]
    with linked_configs(config, ["ipc://a", "ipc://b"]) as (coordinator, *workers):
        for link, worker in zip(coordinator.workers, workers, strict=True):
            assert worker.coordinator is not None
            assert worker.coordinator.address == link.address
            assert worker.inherited_fds == [7, worker.coordinator.sockets_fd]
            ends = [socket.socket(fileno=os.dup(fd)) for fd in (link.sockets_fd, worker.coordinator.sockets_fd)]
            with ends[0], ends[1]:
                ends[0].send(link.address.encode())
                assert ends[1].recv(100) == link.address.encode()
        fds = [link.sockets_fd for link in coordinator.workers]
        assert coordinator.inherited_fds == [7, *fds]
