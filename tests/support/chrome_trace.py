"""Reads traces in Chrome's format, and checks what Perfetto needs of them."""

from collections import defaultdict
from typing import Any

Event = dict[str, Any]
Track = tuple[int, int]  # process, thread


def check_trace(trace: dict[str, Any]) -> None:
    """Fail unless Perfetto shows all slices and counters of a trace, where they belong and under a name."""
    events = trace["traceEvents"]
    assert isinstance(events, list)
    for event in events:
        assert event["ph"] in ("X", "C", "M"), event
        assert isinstance(event["name"], str), event
        assert event["name"], event
        assert type(event["pid"]) is type(event["tid"]) is int, event
        if event["ph"] in ("X", "C"):
            assert type(event["ts"]) is int, event
            assert event["ts"] > 1_600_000_000_000_000, event  # microseconds of Unix time
    for counter in (event for event in events if event["ph"] == "C"):
        assert counter["args"], counter
        assert all(type(value) is int for value in counter["args"].values()), counter
    named = [event for event in events if event["name"] in ("process_name", "thread_name")]
    names = {(event["name"], event["pid"], event["tid"]): event["args"]["name"] for event in named}
    processes = {pid for kind, pid, _ in names if kind == "process_name"}
    for track, slices in tracks(trace).items():
        assert track[0] in processes
        assert names["thread_name", *track]
        check_nesting(slices)
    threads = [thread for _, thread in tracks(trace)]
    assert len(threads) == len(set(threads))


def check_nesting(slices: list[Event]) -> None:
    """Fail unless of any two slices of a track, one lies within the other or they do not overlap."""
    open_ends: list[int] = []
    for event in sorted(slices, key=lambda event: event["ts"]):  # stable: of two that start together, the whole first
        start, duration = event["ts"], event["dur"]
        assert type(duration) is int, event
        assert duration > 0, event
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        assert not open_ends or start + duration <= open_ends[-1], event
        open_ends.append(start + duration)


def tracks(trace: dict[str, Any]) -> dict[Track, list[Event]]:
    """Return the slices of each track."""
    found: dict[Track, list[Event]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append(event)
    return dict(found)


def slices_named(trace: dict[str, Any], *names: str) -> list[Event]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["name"] in names]


def requests_in(trace: dict[str, Any]) -> list[list[Event]]:
    """Return the slices of each track that has a request, the request itself first."""
    return [slices for slices in tracks(trace).values() if slices[0]["name"] == "request"]
