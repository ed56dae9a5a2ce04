"""Tests of recordings, and of replays that differ from them."""

import sys
from itertools import product

import httpx
import pytest

from engine.shared.messages import SamplingParams, Submit, TokenEvent, TokenLogprobs
from server.parts.recordings import part as recordings
from server.parts.recordings.part import NUM_TOP, Recordings, new_recording
from tests.server.conftest import StartServer
from tests.support.clients import CHAT, COMPLETIONS, MINIMAL
from tests.support.fake_engine import FakeEngine
from tests.support.serving import check_error

ENTRY = TokenLogprobs.pack(-1.0, 2, [3], [-0.5])


def submit(num_tokens: int = 3, **params: object) -> Submit:
    settings = SamplingParams(max_tokens=9, **params)  # type: ignore[arg-type]
    return Submit(request_id="r", prompt_token_ids=[1] * num_tokens, params=settings, arrival=0.0, n=2)


def test_log_probabilities_are_always_recorded_but_returned_only_on_request() -> None:
    for requested, recorded in ((None, NUM_TOP), (0, 0), (9, 9)):
        recording = new_recording([submit() if requested is None else submit(logprobs=requested)])
        assert recording.submits[0].params.logprobs == recorded
        event = TokenEvent(request_id="r", index=1, token_ids=[7], logprobs=[ENTRY], prompt_logprobs=[ENTRY, ENTRY])
        recording.take(0, event)
        assert event.logprobs == (None if requested is None else [ENTRY])
        assert recording.choices[0][0].token_ids == []
        choice = recording.choices[0][1]
        assert (choice.token_ids, choice.logprobs, choice.prompt_logprobs) == ([7], [ENTRY], [ENTRY, ENTRY])


def test_the_oldest_are_dropped() -> None:
    kept = Recordings(2)
    all_of_them = [new_recording([submit()], ids=(f"r{number}", "mine")) for number in range(4)]
    for recording in all_of_them:
        kept.add(recording)
        kept.add(recording)
    assert [kept.get(f"r{number}") for number in range(4)] == [None, None, *all_of_them[2:]]
    assert kept.get("mine") is all_of_them[3]
    assert len(kept) == 2


def test_one_owner_does_not_push_out_the_recordings_of_others() -> None:
    kept = Recordings(4)
    kept.add(new_recording([submit()], ids=("r",), owner="bob"))
    for number in range(9):
        kept.add(new_recording([submit()], ids=(f"r{number}",), owner="alice"))
    assert kept.get("r", "bob") is not None
    assert [number for number in range(9) if kept.get(f"r{number}", "alice")] == [6, 7, 8]


def test_log_probabilities_and_parameters_count() -> None:
    """A list of token ids takes the memory of its numbers, once for all prompts."""
    recording = new_recording([submit(1)])
    empty = recording.num_bytes
    top = TokenLogprobs.pack(-1.0, 1, list(range(50_000)), [-1.0] * 50_000)
    recording.take(0, TokenEvent(request_id="r", index=1, token_ids=[1], logprobs=[top]))
    assert recording.num_bytes - empty >= 50_000 * 8
    allowed = tuple(range(1000, 51_000))
    few, many = (new_recording([submit(1, **params)] * 2) for params in ({}, {"allowed_token_ids": allowed}))
    assert many.num_bytes - few.num_bytes > sum(map(sys.getsizeof, allowed)) + sys.getsizeof(allowed)


def test_many_bytes_are_dropped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "MAX_BYTES", 102 * recordings.TOKEN_BYTES)
    kept = Recordings(9)
    for number, num_tokens in enumerate((60, 40, 1)):
        kept.add(new_recording([submit(num_tokens)], ids=(f"r{number}",)))
    assert [kept.get(f"r{number}") is None for number in range(3)] == [True, False, False]
    kept.add(new_recording([submit(103)], ids=("large",)))
    assert len(kept) == 0
    assert kept.get("large") is None


def test_recordings_of_running_requests_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "MAX_BYTES", 102 * recordings.TOKEN_BYTES)
    kept = Recordings(9)
    kept.add(new_recording([submit(60)], ids=("ended",)))
    small, large = (new_recording([submit(num_tokens)], ids=(f"r{num_tokens}",)) for num_tokens in (10, 20))
    for recording in (small, large):
        kept.begin(recording)
    assert kept.get("ended") is not None
    event = TokenEvent(request_id="r", index=1, token_ids=[7] * 71, logprobs=[ENTRY])
    kept.take(large, 0, event)
    assert (len(kept), large.is_abandoned, small.is_abandoned) == (0, True, False)
    assert event.logprobs is None
    kept.take(large, 0, event)
    for recording in (large, small):
        kept.add(recording)
        kept.add(recording)
    assert (kept.get("r20"), kept.get("r10")) == (None, small)
    kept.add(new_recording([submit(90)], ids=("next",)))
    assert len(kept) == 2


def test_a_replay_that_differs(start_server: StartServer, fake_engine: FakeEngine) -> None:
    server = start_server(record_requests=3)
    for path, stream in product((CHAT, COMPLETIONS), (False, True)):
        fake_engine.config.reply = list(b"Hello")
        body = MINIMAL[path] | {"n": 2, "max_tokens": 5, "stream": stream}
        assert httpx.post(server.url + path, json=body, headers={"x-request-id": "mine"}).status_code == 200
        url = f"{server.url}/v1/requests/mine/replay"
        choices = [{"index": i, "num_tokens": 5, "bit_equal": True, "difference": None} for i in range(2)]
        assert httpx.post(url).json() == {"id": "mine", "object": "replay", "bit_equal": True, "choices": choices}
        fake_engine.config.reply = list(b"HelLo")
        first, second = httpx.post(url).json()["choices"]
        assert first["difference"] == second["difference"]
        difference = first["difference"]
        assert (difference["part"], difference["position"]) == ("output", 3)
        assert (difference["recorded"]["token"], difference["replayed"]["token"]) == ("l", "L")
        assert len(difference["recorded"]["top"]) == len(difference["replayed"]["top"]) == NUM_TOP
        fake_engine.config.reply = list(b"He")
        (ended, _) = httpx.post(url).json()["choices"]
        assert ended["difference"]["replayed"]["token_id"] == 256
        fake_engine.config.reply = []
        assert httpx.post(url).json()["choices"][0]["difference"]["position"] == 0
    fake_engine.config.fail_request = True
    failed = httpx.post(url)
    check_error(failed, 500)
    assert "secret" not in failed.text
    assert server.model.client.num_in_flight == 0


def test_requests_that_are_not_recorded(start_server: StartServer) -> None:
    for num_kept, words in ((0, "--record-requests"), (7, "among the last 7 finished requests")):
        server = start_server(record_requests=num_kept)
        error = check_error(httpx.post(f"{server.url}/v1/requests/unknown/replay"), 404)
        assert error["code"] == "request_not_found"
        assert words in error["message"]
