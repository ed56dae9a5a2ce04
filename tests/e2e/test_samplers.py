"""Tests of the sampling parameters with a real model: each has an effect, and the output is reproducible."""

import math
from typing import Any

import pytest

from tests.support.server_process import ServerProcess

REPEAT = "One fish swims home. " * 3 + "One fish"


def complete(server: ServerProcess, prompt: str = "Once upon a time", **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 20, "seed": 3} | fields
    answer: dict[str, Any] = server.complete(**body).json()
    choice: dict[str, Any] = answer["choices"][0]
    return choice


@pytest.mark.parametrize(
    "fields",
    [
        {"typical_p": 0.1},
        {"top_n_sigma": 0.5},
        {"xtc_probability": 1, "xtc_threshold": 0.01},
        {"mirostat": 1, "mirostat_tau": 1},
        {"mirostat": 2, "mirostat_tau": 1},
        {"samplers": ["top_k"], "temperature": 0.5},
        {"allowed_token_ids": [216, 260, 282, 338]},
    ],
)
def test_a_sampler_has_an_effect_and_is_reproducible(server: ServerProcess, fields: dict[str, Any]) -> None:
    plain = complete(server, temperature=1.5)["text"]
    text = complete(server, **{"temperature": 1.5} | fields)["text"]
    assert text != plain
    assert complete(server, **{"temperature": 1.5} | fields)["text"] == text


def test_dry_breaks_a_repeat(server: ServerProcess) -> None:
    greedy: dict[str, Any] = {"prompt": REPEAT, "temperature": 0}
    assert complete(server, **greedy)["text"].startswith(" swims home.")
    assert "swims home" not in complete(server, **greedy, dry_multiplier=100)["text"]
    broken = complete(server, **greedy, dry_multiplier=100, dry_sequence_breakers=[" fish", " swims"])["text"]
    assert broken.startswith(" swims home.")


def test_repetition_detection_ends_a_choice(server: ServerProcess) -> None:
    fields: dict[str, Any] = {"temperature": 0, "logit_bias": {"260": 100}, "return_token_ids": True}
    detection = {"max_pattern_size": 10, "min_pattern_size": 3, "min_count": 2}
    choice = complete(server, **fields, repetition_detection=detection)
    assert (choice["token_ids"], choice["finish_reason"]) == ([260] * 6, "repetition")
    choice = complete(server, **fields)
    assert (choice["token_ids"], choice["finish_reason"]) == ([260] * 20, "length")


def test_penalties_see_the_last_tokens(server: ServerProcess) -> None:
    penalised: dict[str, Any] = {"prompt": REPEAT, "temperature": 0, "repetition_penalty": 10}
    assert "swims home" not in complete(server, **penalised)["text"]
    assert complete(server, **penalised, repeat_last_n=1)["text"].startswith(" swims home.")


def test_bad_words_are_not_generated(server: ServerProcess) -> None:
    prompt = "Q: What is the capital of France?\nA: The capital of France is"
    assert "Paris" in complete(server, prompt, temperature=0)["text"]
    assert "Paris" not in complete(server, prompt, temperature=0, bad_words=["Paris"])["text"]


def test_probabilities_after_sampling(server: ServerProcess) -> None:
    """The probabilities of the tokens left by top_k add up to 1. The text does not change."""
    fields: dict[str, Any] = {"top_k": 3, "logprobs": 5, "temperature": 0.7}
    own, after = complete(server, **fields), complete(server, **fields, post_sampling_probs=True)
    assert own["text"] == after["text"]
    for before, some in zip(own["logprobs"]["top_logprobs"], after["logprobs"]["top_logprobs"], strict=True):
        assert len(some) == 3
        assert sum(map(math.exp, some.values())) == pytest.approx(1, abs=1e-5)
        assert list(some) == list(before)[:3]
        assert list(some.values()) != list(before.values())[:3]
    greedy = complete(server, logprobs=2, temperature=0, post_sampling_probs=True)
    assert greedy["logprobs"]["token_logprobs"] == [0.0] * 20


def test_best_of_returns_the_most_likely_choices(server: ServerProcess) -> None:
    fields: dict[str, Any] = {"prompt": ["Once upon a time", "The sky"], "max_tokens": 8, "seed": 5, "stop": ["."]}
    every = server.complete(**fields, n=4, logprobs=0).json()
    best = server.complete(**fields, n=2, best_of=4).json()

    def mean(choice: dict[str, Any]) -> float:
        logprobs: list[float] = choice["logprobs"]["token_logprobs"]
        return sum(logprobs) / len(logprobs)

    ranked = [sorted(every["choices"][first : first + 4], key=mean, reverse=True) for first in (0, 4)]
    expected = [choice["text"] for choices in ranked for choice in choices[:2]]
    assert [choice["text"] for choice in best["choices"]] == expected
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert [choice["logprobs"] for choice in best["choices"]] == [None] * 4
    assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"]


def test_prompt_logprobs_are_those_of_an_echo(server: ServerProcess) -> None:
    fields: dict[str, Any] = {"prompt": "The sky is blue and", "max_tokens": 1, "logprobs": 3}
    echo = server.complete(**fields, echo=True).json()["choices"][0]["logprobs"]
    choice = server.complete(**fields, prompt_logprobs=3, return_token_ids=True).json()["choices"][0]
    own = [
        some[str(token_id)]
        for token_id, some in zip(choice["prompt_token_ids"][1:], choice["prompt_logprobs"][1:], strict=True)
    ]
    assert [entry["logprob"] for entry in own] == echo["token_logprobs"][1:-1]
    assert [entry["decoded_token"] for entry in own] == echo["tokens"][1:-1]
    for entry, some in zip(own, choice["prompt_logprobs"][1:], strict=True):
        better = [other for other in some.values() if other["logprob"] > entry["logprob"]]
        assert entry["rank"] == len(better) + 1 or entry["rank"] > 3


def test_logprobs_of_named_tokens(server: ServerProcess) -> None:
    fields: dict[str, Any] = {"logprobs": 20, "max_tokens": 3}
    top = complete(server, **fields)["logprobs"]
    ids = complete(server, **fields, return_token_ids=True)["token_ids"]
    named = complete(server, **fields, logprob_token_ids=[*ids, 5])["logprobs"]
    assert named["token_logprobs"] == top["token_logprobs"]
    for index, (some, before) in enumerate(zip(named["top_logprobs"], top["top_logprobs"], strict=True)):
        assert len(some) == len({*ids, 5})
        assert some[named["tokens"][index]] == named["token_logprobs"][index]
        assert [some[token] for token in some if token in before] == [
            before[token] for token in some if token in before
        ]
