"""Extra samplers over HTTP: the engine receives those that a request turns on."""

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.shared.messages import MIROSTAT_ORDER, ExtraSamplers, SequenceBreaker
from tests.support.clients import CHAT, COMPLETIONS, ask, shared_server
from tests.support.serving import RunningServer

BOTH = (COMPLETIONS, CHAT)


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[RunningServer]:
    with shared_server(model_folder) as server:
        yield server


def breaker(*first: int, rest: tuple[int, ...] = ()) -> SequenceBreaker:
    return SequenceBreaker(array("i", first).tobytes(), rest)


# parameters -> fields of ExtraSamplers that differ from their defaults
EXTRA_SAMPLERS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({"typical_p": 1, "top_n_sigma": -1, "xtc_probability": 0, "dry_multiplier": 0.0, "mirostat": 0}, None),
    ({"xtc_threshold": 0.2, "dry_base": 2, "dry_sequence_breakers": ["a"], "mirostat_tau": 1}, None),
    ({"typical_p": None, "samplers": None, "repeat_last_n": -1}, None),
    ({"typical_p": 0.5}, {"typical_p": 0.5}),
    ({"top_n_sigma": 1.5}, {"top_n_sigma": 1.5}),
    ({"xtc_probability": 0.5}, {"xtc_probability": 0.5}),
    ({"xtc_probability": 0.5, "xtc_threshold": 0}, {"xtc_probability": 0.5, "xtc_threshold": 0.0}),
    ({"repeat_last_n": 0}, {"repeat_last_n": 0}),
    ({"repeat_last_n": 64}, {"repeat_last_n": 64}),
    ({"samplers": []}, {"order": ()}),
    ({"samplers": ["temperature", "min_p"]}, {"order": ("temperature", "min_p")}),
    ({"mirostat": 1}, {"order": MIROSTAT_ORDER, "mirostat": 1}),
    (
        {"mirostat": 2, "mirostat_tau": 3, "mirostat_eta": 0.5},
        {"order": MIROSTAT_ORDER, "mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.5},
    ),
    ({"dry_multiplier": 0.8, "dry_sequence_breakers": []}, {"dry_multiplier": 0.8}),
    (
        {"dry_multiplier": 0.8},
        {"dry_multiplier": 0.8, "dry_breakers": (breaker(10, 34, 42, 58),)},
    ),
    (
        {
            "dry_multiplier": 1,
            "dry_base": 2,
            "dry_allowed_length": 3,
            "dry_penalty_last_n": 100,
            "dry_sequence_breakers": ["z", "bc"],
        },
        {
            "dry_multiplier": 1.0,
            "dry_base": 2.0,
            "dry_allowed_length": 3,
            "dry_penalty_last_n": 100,
            "dry_breakers": (breaker(122), breaker(98, rest=(99,))),
        },
    ),
]


@pytest.mark.parametrize(("fields", "expected"), EXTRA_SAMPLERS)
@pytest.mark.parametrize("path", BOTH)
def test_extra_samplers(
    server: RunningServer, path: str, fields: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    assert ask(server.url, path, **fields).status_code == 200
    samplers = server.engine.submits[-1].params.extra_samplers
    assert samplers == (None if expected is None else ExtraSamplers(**expected))


@pytest.mark.parametrize("path", BOTH)
def test_repeat_penalty_is_repetition_penalty(server: RunningServer, path: str) -> None:
    for fields in ({"repeat_penalty": 1.5}, {"repeat_penalty": 1.5, "repetition_penalty": 1.5}):
        assert ask(server.url, path, **fields).status_code == 200
        params = server.engine.submits[-1].params
        assert (params.repetition_penalty, params.extra_samplers) == (1.5, None)
