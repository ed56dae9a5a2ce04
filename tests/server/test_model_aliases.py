"""Aliases in the spellings of Ollama."""

import re

import pytest

from server.hub.errors import HubError
from server.hub.files import NUMBER_FORMAT
from server.hub.names import HubName
from server.model_aliases import MODEL_ALIASES, families, find_alias
from server.package_aliases import PACKAGE_ALIASES
from server.settings.sampling import SAMPLING

QWEN3_8B = HubName("Qwen/Qwen3-8B-GGUF", tag="Q4_K_M")
LLAMA_1B = HubName("bartowski/Llama-3.2-1B-Instruct-GGUF")
GEMMA3_1B = HubName("ggml-org/gemma-3-1b-it-GGUF", tag="Q4_K_M")


@pytest.mark.parametrize(
    ("text", "name", "model"),
    [
        *(
            (text, "qwen3:8b", QWEN3_8B)
            for text in (
                *("qwen3:8b", "qwen3", "qwen3:latest", "Qwen3:8B", "library/qwen3", "ollama.com/library/qwen3:8b"),
                *("https://ollama.com/library/qwen3:8b", "registry.ollama.ai/library/qwen3:8b", "ollama://qwen3:8b"),
            )
        ),
        ("gemma3:1b-it", "gemma3:1b", GEMMA3_1B),
        ("gemma3:1b-it-q4_K_M", "gemma3:1b-q4_k_m", GEMMA3_1B),
        ("gemma3:1b-it-q8_0", "gemma3:1b-q8_0", GEMMA3_1B._replace(tag="Q8_0")),
        ("gemma3:1b-it-fp16", "gemma3:1b-fp16", GEMMA3_1B._replace(tag="FP16")),
        ("gemma3:1b-it-qat", "gemma3:1b-it-qat", HubName("ggml-org/gemma-3-1b-it-qat-GGUF", tag="Q4_0")),
        ("llama3.2:1b-instruct-q5_K_S", "llama3.2:1b-q5_k_s", LLAMA_1B._replace(tag="Q5_K_S")),
        ("qwen3:4b-instruct", "qwen3:4b-instruct", HubName("unsloth/Qwen3-4B-Instruct-2507-GGUF", tag="Q4_K_M")),
        ("qwen3:q8_0", "qwen3:8b-q8_0", QWEN3_8B._replace(tag="Q8_0")),
    ],
)
def test_spellings(text: str, name: str, model: HubName) -> None:
    alias = find_alias(text)
    assert alias is not None
    assert (alias.name, alias.model) == (name, model)


@pytest.mark.parametrize("text", ["", "qwen", "qwen33:4b", "org/qwen3", "./qwen3", "smollm2-135m"])
def test_other_names(text: str) -> None:
    assert find_alias(text) is None


@pytest.mark.parametrize("text", ["gemma3:2b", "gemma3:1b-base", "gemma3:1b:q4_0"])
def test_an_unknown_tag(text: str) -> None:
    with pytest.raises(HubError, match=r"there is no .*; gemma3 comes as 1b, 1b-it-qat, 4b, 4b-it-qat, 12b, 27b$"):
        find_alias(text)


def test_the_table() -> None:
    """Names are families with tags, models are repositories with number formats, and sampling fields are valid."""
    assert len(MODEL_ALIASES) >= 24
    for name, alias in MODEL_ALIASES.items():
        assert re.fullmatch(r"[a-z][a-z0-9.-]*:[a-z0-9][a-z0-9.-]*", name)
        assert find_alias(name) == alias
        assert alias.model.tag is not None
        assert re.fullmatch(NUMBER_FORMAT, alias.model.tag)
        assert alias.model.file is alias.model.revision is None
        assert alias.card_sampling == {} or SAMPLING.parse(dict(alias.card_sampling)) == alias.card_sampling
    assert not MODEL_ALIASES.keys() & PACKAGE_ALIASES.keys()
    assert all(tags for tags in families().values())
