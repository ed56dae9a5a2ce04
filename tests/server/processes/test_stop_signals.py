"""Signals as events: which ones stop, which are echoes, and what is restored."""

import os
import selectors
import signal
from typing import Any

import pytest

from server.processes.stop_signals import ECHO_SECONDS, STOP_SIGNALS, StopSignals
from tests.support.turned_clock import TurnedClock


def taken(signals: StopSignals) -> int | None:
    """Wait for a signal with a selector, as the supervisor does, and take it."""
    with selectors.DefaultSelector() as selector:
        selector.register(signals, selectors.EVENT_READ)
        assert selector.select(5)
    return signals.take()


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_is_an_event_once(signum: int) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    clock = TurnedClock()
    with StopSignals(now=clock.now) as signals:
        for seconds, expected in ((0.0, signum), (0.99, None), (0.02, signum)):  # None: an echo
            clock.time += seconds * ECHO_SECONDS
            send(signum)
            assert taken(signals) == expected
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_hangup_is_passed_on_if_the_server_reloads() -> None:
    passed_on: list[int] = []

    class Reloader:
        send = staticmethod(passed_on.append)

    reloader: Any = Reloader()
    with StopSignals(reloads=True) as signals:
        send(signal.SIGHUP)
        assert taken(signals) is None  # before there is a process
        signals.reloaders = [reloader]
        send(signal.SIGHUP)
        assert taken(signals) is None
        assert passed_on == [signal.SIGHUP]
        send(signal.SIGTERM)
        assert taken(signals) == signal.SIGTERM  # no echo of the hangup
