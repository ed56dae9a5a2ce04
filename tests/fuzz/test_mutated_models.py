"""Damaged model files: each is loaded or refused in one line, in bounded time and memory."""

import lzma
import random
import shutil
from pathlib import Path

import pytest

from tests.fuzz.conftest import Check, quick
from tests.fuzz.hostile_values import GGUFImage
from tests.fuzz.mutations import mutate_gguf, mutate_json, mutate_safetensors
from tests.parity.make_fixtures import FIXTURES, write_byte_level_tokenizer
from tests.support.examples import num_examples
from tests.support.family_models import save_family_model


@pytest.mark.drawn
@pytest.mark.checklist("F11")
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, 20))])
def test_gguf(check: Check, tmp_path: Path, part: int) -> None:
    rng = random.Random(part)
    path = tmp_path / "model.gguf"
    for fixture in rng.choices(sorted(FIXTURES.glob("*.xz")), k=num_examples(2, 5)):
        image = GGUFImage(lzma.decompress(fixture.read_bytes()))
        path.write_bytes(image.data)
        assert check(path, fixture.name)
        for case in range(num_examples(3, 50)):
            path.write_bytes(mutate_gguf(image, rng))
            check(path, f"part {part}, {fixture.name}, case {case}")


@pytest.mark.drawn
@pytest.mark.checklist("F11")
@pytest.mark.parametrize("name", quick("gpt_oss_mxfp4", "llama3", "qwen3_moe", "gemma3", "deepseek_v2"))
def test_safetensors(check: Check, tmp_path: Path, name: str) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    save_family_model(name, whole)
    write_byte_level_tokenizer(whole)
    assert check(whole, name)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    rng = random.Random(name)
    for case in range(num_examples(6, 1000)):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        file = folder / rng.choices(files, weights=[4, 4, 2, 1, 1])[0]
        mutate = mutate_safetensors if file.suffix == ".safetensors" else mutate_json
        file.write_bytes(mutate(file.read_bytes(), rng))
        check(folder, f"{name}, case {case}, {file.name}")
