"""Damaged model files: each is loaded or refused in one line, in bounded time and memory."""

import json
import lzma
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuzz.mutations import mutate_gguf, mutate_json, mutate_safetensors, numbers_of_gguf
from tests.parity.make_fixtures import write_byte_level_tokenizer
from tests.support.examples import num_examples
from tests.support.family_models import FAMILIES, save_family_model
from tests.support.paths import ROOT

FIXTURES = ROOT / "tests/parity/fixtures"
# Few variables, so that threads and their memory are those of one small process.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
MAX_LINE = 600  # characters of a message

Load = Callable[[Path], dict[str, str]]


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    """A function that loads a model in a process of its own and returns the result."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.loader"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | ENVIRONMENT,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask(path: Path) -> dict[str, str]:
            print(path, file=stdin, flush=True)
            answer: dict[str, str] = json.loads(stdout.readline())
            return answer

        yield ask
        stdin.close()


def check(answer: dict[str, str], what: str) -> bool:
    """Return whether the model was loaded. It fails if it was neither loaded nor refused in one clear line."""
    assert "failed" not in answer, f"{what}: {answer['failed']}"
    if "refused" in answer:
        assert "\n" not in answer["refused"], what
        assert 10 < len(answer["refused"]) < MAX_LINE, (what, answer["refused"])
    return "loaded" in answer


@pytest.mark.drawn
@pytest.mark.checklist("F11")
@pytest.mark.parametrize("part", range(20))
def test_gguf(load: Load, tmp_path: Path, part: int) -> None:
    rng = random.Random(part)
    path = tmp_path / "model.gguf"
    for fixture in rng.choices(sorted(FIXTURES.glob("*.xz")), k=5):
        data = lzma.decompress(fixture.read_bytes())
        path.write_bytes(data)
        assert check(load(path), fixture.name)
        numbers, end = numbers_of_gguf(data)
        for case in range(num_examples(2, 50)):
            path.write_bytes(mutate_gguf(data, numbers, end, rng))
            check(load(path), f"part {part}, {fixture.name}, case {case}")


@pytest.mark.drawn
@pytest.mark.checklist("F11")
@pytest.mark.parametrize("name", ["llama3", "qwen3_moe", "gemma3", "gpt_oss_mxfp4", "deepseek_v2"])
def test_safetensors(load: Load, tmp_path: Path, name: str) -> None:
    assert name in FAMILIES
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    save_family_model(name, whole)
    write_byte_level_tokenizer(whole)
    assert check(load(whole), name)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    rng = random.Random(name)
    for case in range(num_examples(20, 1000)):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        file = folder / rng.choices(files, weights=[4, 4, 2, 1, 1])[0]
        mutate = mutate_safetensors if file.suffix == ".safetensors" else mutate_json
        file.write_bytes(mutate(file.read_bytes(), rng))
        check(load(folder), f"{name}, case {case}, {file.name}")
