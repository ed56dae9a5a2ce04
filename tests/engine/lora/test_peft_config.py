"""Settings in adapter_config.json: which have an effect, which are refused, and how long patterns may take to match."""

import dataclasses
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from engine.lora import peft_config
from engine.lora.peft_config import read_lora_scales
from engine.lora.reader import load_lora
from tests.support.lora_files import CONFIG, PEFT_WARNINGS, SETTINGS, refusal_of, save_adapter, write_folder

pytestmark = PEFT_WARNINGS


@pytest.mark.parametrize(
    "changes",
    [
        {"r": ...},
        {"r": None, "rank_pattern": None, "alpha_pattern": None, "use_rslora": None, "bias": "none"},
        {"r": 7, "rank_pattern": {"k_proj": 2}},
        {"lora_alpha": 4.0, "use_dora": False, "modules_to_save": [], "layer_replication": None, "arrow_config": None},
        {"lora_alpha": 1, "alpha_pattern": {"q_proj": 9, "layers.1.self_attn.k_proj": 4, "k_proj": 7}},
        {"megatron_config": {"a": 1}, "exclude_modules": ["x"], "eva_config": {}, "velora_config": {}, "unknown": [1]},
        {"init_lora_weights": True, "loftq_config": {}, "corda_config": {"a": 1}, "lora_dropout": 0.5},
    ],
)
def test_settings_that_change_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    plain = load_lora(write_folder(tmp_path / "plain"), CONFIG)
    assert load_lora(write_folder(tmp_path / "changed", **changes), CONFIG).fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": ...}, "peft_type: 'not named' is not supported"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not supported, only 'LORA'"),
        ({"peft_type": 3}, "peft_type: must be a string, not 3"),
        ({"lora_alpha": ...}, "lora_alpha: is missing"),
        ({"lora_alpha": 0}, "lora_alpha: must be a number above 0"),
        ({"lora_alpha": -1}, "lora_alpha: must be a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha: must be a number above 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha: must be a number above 0"),
        ({"lora_alpha": "16"}, "lora_alpha: must be a number above 0, .*not '16'"),
        ({"lora_alpha": True}, "lora_alpha: must be a number above 0"),
        ({"r": 0}, "r: must be an integer from 1"),
        ({"r": 2.5}, "r: must be an integer from 1"),
        ({"r": float("nan")}, "r: must be an integer from 1"),
        ({"r": 3}, r"r: is 3 for model\.layers\.1\.self_attn\.k_proj, whose matrices have rank 2"),
        ({"rank_pattern": {"k_proj": 5}}, "r: is 5 for model.*, whose matrices have rank 2"),
        ({"rank_pattern": [1]}, r"rank_pattern: must be an object, not \[1\]"),
        ({"alpha_pattern": "x"}, "alpha_pattern: must be an object, not 'x'"),
        ({"alpha_pattern": {"x": "y"}}, "alpha_pattern: x: must be a number above 0"),
        ({"alpha_pattern": {"x": None}}, "alpha_pattern: x: must be a number above 0, not None"),
        ({"alpha_pattern": {"x": 0}}, "alpha_pattern: x: must be a number above 0"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(': is neither a module's name nor a simple regular expr"),
        ({"alpha_pattern": {"a)|(b": 1}}, "alpha_pattern: .*: is neither a module's name"),
        ({"alpha_pattern": {r"(.)\2": 1}}, "alpha_pattern: .*: is neither a module's name"),
        ({"alpha_pattern": {"[z-a]": 1}}, r"alpha_pattern: '\[z-a\]': is not a regular expression \(bad character"),
        ({"use_rslora": "yes"}, "use_rslora: must be true or false"),
        ({"use_dora": 1}, "use_dora: must be true or false"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: adapters of transposed weights"),
        ({"use_qalora": True}, "use_qalora: QA-LoRA"),
        ({"bias": "lora_only"}, "bias: 'lora_only' is not supported"),
        ({"bias": False}, "bias: must be a string"),
        ({"target_parameters": ["x"]}, "target_parameters: only adapters of modules"),
        ({"arrow_config": {}}, "arrow_config: Arrow"),
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config: MonteCLoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: BD-LoRA"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: 'loftq' changes the model's own weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights: 'corda' changes"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights: 'lora_ga' changes"),
        ({"init_lora_weights": {"a": 1}}, "init_lora_weights: {'a': 1} changes"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        load_lora(folder, CONFIG)


def test_patterns_that_would_take_forever(tmp_path: Path) -> None:
    start = time.monotonic()
    patterns = [
        "(.+)+X",
        "(.*)*X",
        "(.|.)*X",
        "(((.+)+)+)+X",
        ".*" * 30 + "X",
        "(.|.)" * 30 + "X",
        "(" + "|" * 100 + ")X",
        "(.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.)" * 4 + "X",
        "a" * 10**6,
    ]
    for pattern in patterns:
        folder = write_folder(tmp_path, alpha_pattern={pattern: 3})
        if (refusal := refusal_of(folder)) is not None:
            assert "is neither a module's name nor a simple regular expression" in refusal
            assert len(refusal) < 500
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("content", ["", "[]", "3", "null", "{", '"a"', "[" * 100_000, b"\xff\xfe{}", "{}"])
def test_malformed_settings(content: str | bytes, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "adapter_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"adapter_config\.json: (not valid JSON|must hold|peft_type: 'not named')"):
        load_lora(folder, CONFIG)


# The tables of settings.


def test_all_settings_of_peft_are_known() -> None:
    """After an upgrade of PEFT, look up what a new setting does and add it to one of the tables."""
    assert {field.name for field in dataclasses.fields(LoraConfig)} == peft_config.KNOWN_KEYS
    tables = (
        peft_config.READ_KEYS,
        peft_config.HARMLESS_KEYS,
        peft_config.REFUSED_SWITCHES,
        peft_config.REFUSED_LISTS,
        peft_config.REFUSED_CONFIGS,
    )
    assert sum(len(table) for table in tables) == len(peft_config.KNOWN_KEYS)


def test_no_other_kind_of_lora_is_called_harmless() -> None:
    """PEFT marks the settings of LoRA variants. Of these, only VeLoRA is harmless: it differs in training alone."""
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert "use_dora" in variants
    assert variants & peft_config.HARMLESS_KEYS <= {"velora_config"}


def warnings_about(caplog: pytest.LogCaptureFixture, folder: Path) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_lora(folder, CONFIG)
    return [record.getMessage() for record in caplog.records if record.name == "engine.lora.peft_config"]


def test_unknown_settings_are_named_in_one_warning(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    unset: dict[str, Any] = {"new_null": None, "new_false": False, "new_list": [], "new_object": {}, "new_text": ""}
    assert warnings_about(caplog, write_folder(tmp_path, **unset)) == []
    (warning,) = warnings_about(caplog, write_folder(tmp_path, use_next_method=True, a_config={"x": 1}, **unset))
    assert "adapter_config.json: " in warning
    assert warning.endswith("['a_config', 'use_next_method']")
    names: dict[str, Any] = {"x" * 10**5: 1, "\ud800\n": 1}
    (warning,) = warnings_about(caplog, write_folder(tmp_path, **names))
    assert len(warning.encode()) < 500
    save_adapter(tmp_path, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
    assert warnings_about(caplog, tmp_path) == []


# Limits of patterns.

LARGE_MODEL = {f"model.layers.{layer}.self_attn.{part}_proj": 2 for layer in range(140) for part in "qkvo"}
BRANCHING = [f"{'.*' * (index % 4 + 1)}x{index}" for index in range(32)] + ["a|b"]
PLAIN = [f"model.layers.{index}.self_attn.z_proj" for index in range(4097)]


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_how_many_patterns(key: str, tmp_path: Path) -> None:
    def refusal(patterns: list[str]) -> str | None:
        changes: dict[str, Any] = {key: dict.fromkeys(patterns, 2)}
        return refusal_of(write_folder(tmp_path, **changes))

    assert refusal(BRANCHING[:32] + PLAIN[:4064]) is None
    assert f"{key}: has 4097 patterns, more than 4096" in str(refusal(PLAIN))
    assert f"{key}: has more than 32 patterns with repetitions or alternatives" in str(refusal(BRANCHING))
    assert f"{key}: has more than 32 patterns with" in str(refusal([f"layers.{index}+" for index in range(33)]))


def test_names_of_all_modules_as_patterns(tmp_path: Path) -> None:
    """EVA writes a pattern for each module; even for a large model they are matched in time."""
    alphas = {name: index + 1 for index, name in enumerate(LARGE_MODEL)}
    ranks = {name: index % 5 + 1 for index, name in enumerate(LARGE_MODEL)}
    folder = write_folder(tmp_path, rank_pattern=ranks, alpha_pattern=alphas)
    scales = read_lora_scales(folder / "adapter_config.json").scales(ranks)
    assert scales == {name: alphas[name] / ranks[name] for name in LARGE_MODEL}


def test_patterns_that_match_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused after the time limit; other threads run meanwhile. The worst would take ten times as long."""
    monkeypatch.setattr(peft_config, "MAX_MATCH_SECONDS", 0.2)
    group = f"({'|'.join('.' * 33)})"
    patterns = {f".*{group * 3}x{index}": 2 for index in range(32)}
    write_folder(tmp_path, rank_pattern=patterns, alpha_pattern=patterns)
    scales = read_lora_scales(tmp_path / "adapter_config.json")
    ticks: list[float] = []
    is_done = threading.Event()

    def tick() -> None:
        while not is_done.wait(0.001):
            ticks.append(time.monotonic())

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.thread_time()
    with pytest.raises(
        ValueError, match=r"adapter_config\.json: rank_pattern and alpha_pattern take too long to match"
    ):
        scales.scales(LARGE_MODEL)
    seconds = time.thread_time() - start
    is_done.set()
    ticker.join()
    assert seconds < 1
    assert len(ticks) >= 4


# Limits of the file.


@pytest.mark.parametrize("depth", [100, 900, 990, 5000])
@pytest.mark.parametrize("key", ["bias", "init_lora_weights", "lora_alpha", "rank_pattern", "next_method"])
def test_settings_of_many_levels(key: str, depth: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    settings = json.dumps({**SETTINGS, key: "here"}).replace('"here"', "[" * depth + "]" * depth)
    (folder / "adapter_config.json").write_text(settings)
    assert key == "next_method" or refusal_of(folder) is not None


def test_texts_that_no_message_can_hold(tmp_path: Path) -> None:
    """JSON can escape half of a surrogate pair, which UTF-8 cannot encode."""
    for changes in ({"alpha_pattern": {"\ud800": None}}, {"bias": "\ud800"}, {"peft_type": "\ud800"}):
        refusal = refusal_of(write_folder(tmp_path, **changes))
        assert refusal is not None
        assert "ud800" in refusal.encode().decode()


def test_a_long_file_of_settings(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    path = folder / "adapter_config.json"
    text = path.read_text()
    path.write_text(text + " " * (2**20 - len(text)))
    assert refusal_of(folder) is None
    path.write_text(text + " " * (2**20 - len(text) + 1))
    assert "adapter_config.json: has 1048577 bytes, more than the 1048576" in str(refusal_of(folder))
