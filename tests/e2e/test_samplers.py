"""Each sampling parameter acts on the real model through the API, and the same request gets the same answer."""

import math
from typing import Any

import pytest

from tests.e2e.server_process import ServerProcess

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
def test_a_sampler_acts_and_its_answers_repeat(server: ServerProcess, fields: dict[str, Any]) -> None:
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


def test_penalties_see_the_last_tokens(server: ServerProcess) -> None:
    penalised: dict[str, Any] = {"prompt": REPEAT, "temperature": 0, "repetition_penalty": 10}
    assert "swims home" not in complete(server, **penalised)["text"]
    assert complete(server, **penalised, repeat_last_n=1)["text"].startswith(" swims home.")


def test_bad_words_do_not_come(server: ServerProcess) -> None:
    prompt = "Q: What is the capital of France?\nA: The capital of France is"
    assert "Paris" in complete(server, prompt, temperature=0)["text"]
    assert "Paris" not in complete(server, prompt, temperature=0, bad_words=["Paris"])["text"]


def test_probabilities_after_sampling(server: ServerProcess) -> None:
    """Of what top_k leaves they add up to 1; the text and the model's own are the same without."""
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
