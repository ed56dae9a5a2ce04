"""Tests of the channel between the supervisor and the API process."""

import os

from server.processes.supervisor_channel import Channel, EngineGone, EngineStarted, Heartbeat, make_channel


def test_messages_arrive_in_order() -> None:
    supervisor, api = make_channel()
    assert supervisor.receive() == []
    for message in (EngineStarted(0, 7), EngineGone(1, "x")):
        supervisor.send(message)
    api.send(Heartbeat((7, 8)))
    assert api.receive() == [EngineStarted(0, 7), EngineGone(1, "x")]
    assert supervisor.receive() == [Heartbeat((7, 8))]
    assert not api.has_ended
    supervisor.send(EngineStarted(1, 8))
    supervisor.close()
    assert api.receive() == [EngineStarted(1, 8)]
    assert api.has_ended
    api.close()


def test_sending_never_blocks_or_fails() -> None:
    """The other process may be stopped, or gone."""
    supervisor, api = make_channel()
    for number in range(10_000):
        api.send(Heartbeat((number,)))
    assert supervisor.receive()[:2] == [Heartbeat((0,)), Heartbeat((1,))]
    supervisor.close()
    api.send(Heartbeat((1,)))
    assert api.receive() == []
    assert api.has_ended
    api.close()


def test_an_inherited_descriptor() -> None:
    supervisor, api = make_channel()
    inherited = Channel.from_fd(os.dup(api.fileno()))
    api.close()
    supervisor.send(EngineStarted(0, 7))
    assert inherited.receive() == [EngineStarted(0, 7)]
    inherited.close()
    assert supervisor.receive() == []
    assert supervisor.has_ended
    supervisor.close()
