"""Messages for parts in the engine's loop, over a real socket: changes of adapters, and questions about records."""

from unittest import mock

import msgspec
import pytest

from engine.parts.inspection.records import ReadSteps
from engine.shared.messages import Abort, AdapterDone, Answer, Ask, Outputs, Ready
from tests.engine.test_api_connections import SECONDS, Connected, connect
from tests.support.submits import new_submit
from tests.support.tiny_engine import mixed_submits

QUESTION = msgspec.msgpack.encode(ReadSteps(limit=1))


def test_a_change_of_adapters_that_cannot_be_read(connected: Connected) -> None:
    connected.send(msgspec.msgpack.encode({"type": "LoadAdapter", "request_id": "a", "name": 1, "path": "p"}))
    connected.loop.run_once(timeout=SECONDS)
    done = AdapterDone(request_id="a", error="the request cannot be read", is_temporary=True)
    assert connected.receive(AdapterDone) == done


def test_events_go_to_the_api_process_that_waits_for_them(connected: Connected) -> None:
    other = connect(connected)
    connected.run(mixed_submits(2))
    other.send(msgspec.msgpack.encode(Ask(1, QUESTION)))
    connected.loop.run_once(timeout=SECONDS)
    messages: list[object] = []
    while not messages or not isinstance(messages[-1], Answer):
        assert other.poll(1000 * SECONDS)
        messages.append(connected.decoder.decode(other.recv()))
    other.close()
    assert isinstance(messages[0], Ready)
    assert all(isinstance(message, Outputs) and message.events == [] for message in messages[1:-1])


def test_between_two_steps_one_question_is_answered(connected: Connected) -> None:
    submit = new_submit([1], "a", max_tokens=20, ignore_eos=True)
    connected.run_together([submit, *(Ask(number, QUESTION) for number in range(1, 6))])
    for number in range(1, 6):
        assert connected.receive(Answer).number == number
        assert len(connected.loop.queue) == 5 - number
        assert connected.engine.scheduler.current_stats().steps_total == number
        connected.loop.run_once(timeout=0.0)
    connected.run_together([Abort("a")])
    assert not connected.engine.has_work


def test_of_too_many_questions_the_last_ones_fail(connected: Connected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.parts.inspection.loop.MAX_QUESTIONS", 2)
    connected.run_together([Ask(number, QUESTION) for number in range(1, 5)])
    assert [connected.receive(Answer) for _ in range(2)] == [Answer(3, None), Answer(4, None)]
    assert connected.receive(Answer).number == 1
    connected.loop.run_once(timeout=0.0)
    assert connected.receive(Answer).number == 2


def test_questions_do_not_keep_an_idle_engine_from_its_preparations(connected: Connected) -> None:
    engine, loop = connected.engine, connected.loop
    with (
        mock.patch.object(engine.grammars, "prepare") as prepare,
        mock.patch.object(engine.runner, "capture_next", create=True),
    ):
        for seconds_idle, num_calls in ((0.0, 0), (0.999, 0), (1.0, 1)):
            loop.last_work, loop.clock = 100.0, mock.Mock(return_value=100.0 + seconds_idle)
            connected.send(Ask(1, QUESTION))
            assert connected.connections.socket.poll(1000 * SECONDS)
            loop.run_once(timeout=1.0)
            assert prepare.call_count == num_calls
