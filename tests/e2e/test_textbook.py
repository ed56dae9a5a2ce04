"""`examples/textbook.py` computes what the server computes, in a file that is short enough to be read."""

import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import StartServer
from tests.support.paths import ROOT

SCRIPT = ROOT / "examples" / "textbook.py"
QUESTION = "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n"


def run(*arguments: object) -> dict[str, str]:
    """Return the lists that the script prints, by the word before them."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"^(\w[\w ]*?) +(\[.*\])$", printed, re.MULTILINE))


@pytest.mark.long
def test_all_ways_give_the_tokens_of_the_server(start_server: StartServer, smollm2_path: Path) -> None:
    """Greedy, and with a temperature up to the end of an answer; no two tokens are nearly as likely."""
    server = start_server("--dtype=float32", "--quantization=none")
    for prompt, temperature in (("Once upon a time", 0), (QUESTION, 1)):
        fields = {"max_tokens": 20, "temperature": temperature, "seed": 3, "return_token_ids": True}
        (choice,) = server.complete(prompt, **fields).json()["choices"]
        ways = dict.fromkeys(("attention", "KV cache", "flash attention"), str(choice["token_ids"]))
        flags = (f"--temperature={temperature}", "--seed=3", f"--model={smollm2_path}")
        assert run(prompt, *flags) == {"prompt": str(choice["prompt_token_ids"])} | ways


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 40), (16, 16), (37, 50)])
def test_all_ways_agree(num_queries: int, num_keys: int) -> None:
    textbook = runpy.run_path(str(SCRIPT))
    shapes = ((6, num_queries, 8), (2, num_keys, 8), (2, num_keys, 8))
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in enumerate(shapes))
    expected = textbook["attention"](q, k, v)
    torch.testing.assert_close(textbook["flash_attention"](q, k, v), expected)
    with_cache = partial(textbook["attention_with_cache"], textbook["attention"], [(k[:, :-1], v[:, :-1])])
    torch.testing.assert_close(with_cache(q[:, -1:], k[:, -1:], v[:, -1:]), expected[:, -1:])


def test_it_is_short() -> None:
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 250
