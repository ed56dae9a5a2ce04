"""The event log against a plain list: what fast and slow readers get, and the memory it accounts for."""

import asyncio
import random

import pytest

from server.api.responses.event_log import BLOCK_EVENTS, EventLog
from server.http.errors import ResponseGoneError


def event(number: int, rng: random.Random) -> bytes:
    return b'event: a\ndata: {"number": %d, "text": "%s"}\n\n' % (number, b"x" * rng.randrange(200))


async def read(log: EventLog, start: int, pauses: random.Random | None = None) -> bytes:
    """Read all events, pausing in between."""
    found = []
    async for events in log.read(start):
        found.append(events)
        if pauses is not None:
            await asyncio.sleep(pauses.choice((0, 0, 0.001)))
    return b"".join(found)


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(5))
async def test_every_reader_gets_all_events_from_its_own_on(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    log, written, readers = EventLog("resp_1"), list[bytes](), list[tuple[int, asyncio.Task[bytes]]]()
    for _ in range(60):
        batch = [event(len(written) + i, rng) for i in range(rng.choice((0, 1, 1, 2, 70, 200)))]
        log.append(batch)
        written += batch
        assert log.num_events == len(written)
        start = rng.randrange(len(written) + 1)
        readers.append((start, asyncio.create_task(read(log, start, random.Random(len(written))))))
        await asyncio.sleep(0)
    log.close()
    for start, reader in readers:
        assert await reader == b"".join(written[start:])
    for start in (*range(0, len(written), 97), len(written)):
        assert await read(log, start) == b"".join(written[start:])


@pytest.mark.anyio
async def test_a_reader_waits_for_events() -> None:
    log = EventLog("resp_1")
    reader = asyncio.create_task(read(log, 0))
    await asyncio.sleep(0.01)
    assert not reader.done()
    log.append([b"a\n\n"])
    log.close()
    assert await asyncio.wait_for(reader, 1) == b"a\n\n"


def test_the_size() -> None:
    """Similar events compress well, and every event is accounted for."""
    rng, log, num_bytes = random.Random(1), EventLog("resp_1"), 0
    for number in range(10 * BLOCK_EVENTS - 1):
        num_bytes += len(event(number, rng))
        log.append([event(number, random.Random(1))])
    kept = sum(map(len, log._blocks)) + sum(map(len, log._tail))
    assert kept < log.num_bytes < kept + 50 * (len(log._blocks) + len(log._tail))
    before = log.num_bytes
    log.close()
    assert sum(map(len, log._blocks)) < log.num_bytes < min(before, num_bytes / 5)


@pytest.mark.anyio
async def test_a_log_that_is_dropped() -> None:
    """Readers that are behind get an error; others read to the end."""
    log = EventLog("resp_1")
    log.append([b"a\n\n", b"b\n\n"])
    waiting = asyncio.create_task(read(log, 1))
    behind = log.read(0)
    await asyncio.sleep(0.01)
    log.drop()
    log.append([b"c\n\n"])
    log.close()
    assert await asyncio.wait_for(waiting, 1) == b"b\n\nc\n\n"
    with pytest.raises(ResponseGoneError, match="resp_1"):
        await anext(behind)


@pytest.mark.anyio
async def test_a_log_that_is_dropped_while_it_is_read() -> None:
    log = EventLog("resp_1")
    log.append([b"%d\n\n" % number for number in range(3 * BLOCK_EVENTS)])
    log.close()
    reader = log.read(0)
    assert (await anext(reader)).startswith(b"0\n\n1\n\n")
    log.drop()
    with pytest.raises(ResponseGoneError):
        await anext(reader)
