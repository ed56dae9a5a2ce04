"""The response store and the event log against plain lists: limits, the order of eviction, and what readers get."""

import asyncio
import gc
import multiprocessing
import random
import sys
import tracemalloc
from concurrent.futures import ProcessPoolExecutor

import msgspec
import pytest

from server.generation.endpoint import AnswerMetadata
from server.parts.responses import store as stores
from server.parts.responses.conversion import new_response
from server.parts.responses.schemas import MessageItem, OutputText, ResponsesRequest
from server.parts.responses.store import EventLog, ResponseGoneError, ResponseStore, StoredResponse
from server.tenants import EVERYBODY

LIMIT = 60_000
LONG = pytest.mark.long


def make(number: int, size: int, earlier: StoredResponse | None = None, owner: str = EVERYBODY) -> StoredResponse:
    request = ResponsesRequest.model_validate({"model": "m", "input": "x"})
    response = new_response(request, AnswerMetadata(f"resp_{number}", 1, "m", "fp"), {})
    items, log = [message(item_id("msg", number), "x" * size)], None if number % 3 else EventLog(response.id)
    stored = StoredResponse(response, items, earlier.items if earlier else [], log, owner)
    add_output(stored, item_id("out", number), "y")
    return stored


def message(item_id: str, text: str) -> bytes:
    (item,) = stores.encode_each([{"id": item_id, "type": "message", "role": "user", "content": text}])
    return item


def add_output(stored: StoredResponse, item_id: str, text: str) -> None:
    assert stored.response is not None
    stored.response.output.append(MessageItem(id=item_id, content=[OutputText(text)]))


def item_id(kind: str, number: int) -> str:
    """Return an item id in the form that the server generates."""
    return f"{kind}_{number:032x}"


def size_of(stored: StoredResponse) -> int:
    texts = [*stored.items, msgspec.json.encode(msgspec.json.decode(stored.to_json()) | {"output": []})]
    num_bytes = sum(map(len, texts)) + (stored.events.num_bytes if stored.events is not None else 0)
    return stores.RESPONSE_BYTES + stores.ITEM_BYTES * (len(texts) - 1) + 2 * stores.FOUND_BYTES + num_bytes


def test_against_a_list(rng: random.Random) -> None:
    store, model, made = ResponseStore(8, LIMIT), list[StoredResponse](), list[StoredResponse]()
    for number in range(900):
        action, target = rng.random(), f"resp_{rng.randrange(number + 1)}"
        found = next((each for each in model if each.id == target), None)
        if action < 0.2:
            assert store.get(target) is found
            model += [model.pop(model.index(found))] if found else []
        elif action < 0.25:
            kind = rng.choice(("msg", "out"))
            item = store.item(item_id(kind, int(target.removeprefix("resp_"))))
            assert item == (found and found.own_items[kind == "out"])
            model += [model.pop(model.index(found))] if found else []
        elif action < 0.35:
            assert store.delete(target) is (found is not None)
            model = [each for each in model if each is not found]
        elif action < 0.6 and found is not None and found.events is not None:
            found.events.append([rng.randbytes(rng.randrange(100)) for _ in range(rng.choice((1, 10, 200)))])
            store.count_events(found)
            model.remove(found)
            model = fit([*model, found])
        else:
            stored = make(number, rng.randrange(8000), found)
            made.append(stored)
            store.put(stored)
            model = fit([*model, stored])
            if rng.random() < 0.5:
                store.end(stored)
        assert (len(store), store.num_bytes) == (len(model), sum(map(size_of, model)))
        for each in made:
            assert each.events is None or each.events.is_dropped is (each not in model)


def fit(model: list[StoredResponse]) -> list[StoredResponse]:
    """Return the responses that remain after the last one was used."""
    if size_of(model[-1]) > LIMIT:
        return model[:-1]
    while len(model) > 8 or sum(map(size_of, model)) > LIMIT:
        model = model[1:]
    return model


def test_a_response_stays_as_it_was_when_it_ended() -> None:
    store, stored = ResponseStore(2, 10_000), make(1, 1)
    store.put(stored)
    assert msgspec.json.decode(stored.to_json())["status"] == "in_progress"
    add_output(stored, item_id("out", 2), "z")
    before = msgspec.json.decode(stored.to_json())
    items = stored.items
    store.end(stored)
    after = msgspec.json.decode(stored.to_json())
    assert list(after) == list(before)
    assert after == before | {"status": "cancelled"}  # nothing was stored when it was complete
    assert stored.items == items
    assert store.item(item_id("out", 2)) == items[-1]
    assert store.num_bytes == size_of(stored) + stores.FOUND_BYTES


def cost_of(num_items: int, size: int) -> tuple[int, int, int]:
    """Measure 60 stored responses of 30 conversations, in a process of its own without other threads.

    Return the bytes that are counted, those of items that several of them have, and those that are taken.
    """

    def add(number: int, earlier: StoredResponse | None) -> StoredResponse:
        stored = make(number, size, earlier)
        stored.events = None
        stored.input_items += [message(item_id("in", number * 1000 + n), "x" * size) for n in range(num_items - 1)]
        store.put(stored)
        store.end(stored)
        return stored

    store = ResponseStore(1000, 1 << 30)
    add(0, None)  # what is imported and made once
    tracemalloc.start()
    gc.collect()
    before, counted = tracemalloc.get_traced_memory()[0], store.num_bytes
    for number in range(1, 60, 2):
        add(number + 1, add(number, None))
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0] - before
    shared = sum(len(store._by_id[EVERYBODY, f"resp_{n}"].earlier_items) for n in range(1, 61)) * size
    return store.num_bytes - counted, shared, taken


@pytest.mark.parametrize(
    ("num_items", "size"), [(1, 1), pytest.param(1, 5000, marks=LONG), (300, 1), pytest.param(300, 400, marks=LONG)]
)
def test_what_is_counted_is_what_it_takes(num_items: int, size: int) -> None:
    """Also of small items, whose objects would be several times as large.

    A conversation has several responses, whose common items count for each.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        counted, shared, taken = processes.submit(cost_of, num_items, size).result()
    assert 0.3 * (counted - shared) < taken < counted


def test_a_response_that_grows_is_counted_anew() -> None:
    store, stored = ResponseStore(2, 10_000), make(1, 10)
    store.put(stored)
    before = store.num_bytes
    add_output(stored, item_id("out", 2), "z" * 100)
    assert store.item(item_id("out", 2)) is None
    store.put(stored)
    assert msgspec.json.decode(store.item(item_id("out", 2)) or b"")["content"][0]["text"] == "z" * 100
    assert (len(store), store.num_bytes) == (1, size_of(stored) + stores.FOUND_BYTES)
    assert store.num_bytes > before + 100
    add_output(stored, "more", "z" * 20_000)
    store.put(stored)
    assert (len(store), store.num_bytes) == (0, 0)


@pytest.mark.parametrize("size", [1, 3000])  # the number is the limit, or the size
def test_one_owner_does_not_push_out_what_others_have_stored(size: int) -> None:
    store = ResponseStore(20, 20 * stores.RESPONSE_BYTES + 50_000)
    for number in range(2):
        store.put(make(number, size, owner="bob"))
    for number in range(2, 100):
        store.put(make(number, size, owner="alice"))
    assert [store.get(f"resp_{number}", "bob") is None for number in range(2)] == [False, False]
    left = [number for number in range(2, 100) if store.get(f"resp_{number}", "alice") is not None]
    assert left == list(range(100 - len(left), 100))
    assert len(left) + 2 == len(store) > 5


# Event logs: what fast and slow readers get, and the memory that they account for.


def event(number: int, rng: random.Random) -> bytes:
    return b'event: a\ndata: {"number": %d, "text": "%s"}\n\n' % (number, b"x" * rng.randrange(200))


async def read(log: EventLog, start: int, pauses: random.Random | None = None) -> bytes:
    """Read all events, and let others run in between."""
    found = []
    async for events in log.read(start):
        found.append(events)
        for _ in range(pauses.choice((0, 1, 20)) if pauses is not None else 0):
            await asyncio.sleep(0)
    return b"".join(found)


@pytest.mark.anyio
async def test_every_reader_gets_all_events_from_its_own_on(rng: random.Random) -> None:
    log, written, readers = EventLog("resp_1"), list[bytes](), list[tuple[int, asyncio.Task[bytes]]]()
    for _ in range(150):
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


def test_the_size() -> None:
    log, events = EventLog("resp_1"), [event(number, random.Random(1)) for number in range(100)]
    log.append(events)
    assert log.num_bytes == sum(map(sys.getsizeof, [*events, list(events)])) - sys.getsizeof([])


@pytest.mark.anyio
@pytest.mark.parametrize("num_events", [2, 3 * stores.EVENTS_AT_ONCE])
async def test_a_log_that_is_dropped(num_events: int) -> None:
    """Readers that are behind get an error; others read to the end."""
    log = EventLog("resp_1")
    log.append([b"%d\n\n" % number for number in range(num_events)])
    waiting = asyncio.create_task(read(log, num_events - 1))
    behind, started = log.read(0), log.read(0)
    if num_events > stores.EVENTS_AT_ONCE:
        assert (await anext(started)).startswith(b"0\n\n1\n\n")
    for _ in range(10):  # the first one reads what there is, and waits
        await asyncio.sleep(0)
    log.drop()
    log.append([b"c\n\n"])
    log.close()
    assert await waiting == b"%d\n\nc\n\n" % (num_events - 1)
    for reader in (behind, started):
        with pytest.raises(ResponseGoneError, match="resp_1"):
            await anext(reader)
