"""The configurations of the API process and the engine."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig
from server.settings import process_configs
from server.settings.process_configs import engine_config
from server.settings.table import Settings
from tests.support.settings_cases import VALID, settings_from_flags


def test_settings_cross_the_process_border() -> None:
    settings = settings_from_flags("--api-key", "k", "--seed=-5", "--kv-cache-memory", "1GiB")
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings) == settings


def test_engine_config_has_everything_the_engine_asks_for() -> None:
    """Every field of EngineConfig is set from the setting of the same name, but those that depend on other models."""
    changed = {name: cases[0][1] for name, cases in VALID.items()}
    changed["kv_cache_memory"] *= changed["data_parallel_size"]
    config = engine_config(Settings(**changed), Path("/m.gguf"), {"sql": Path("/a/sql")})
    assert config.model_path == "/m.gguf"
    assert config.lora_modules == {"sql": "/a/sql"}
    for field in msgspec.structs.fields(EngineConfig):
        if field.name == "kv_cache_memory":
            assert config.kv_cache_memory == changed["kv_cache_memory"] // changed["data_parallel_size"]
        elif field.name not in ("model_path", "lora_modules", "keep_token_ids", "data_parallel_rank", "memory_limit"):
            assert getattr(config, field.name) == changed[field.name] != field.default


def test_engines_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_configs, "available_memory", lambda: 900)
    settings = Settings(data_parallel_size=3, kv_cache_memory=100)
    config = engine_config(settings, Path("/m.gguf"), {}, 2)
    assert (config.data_parallel_size, config.data_parallel_rank) == (3, 2)
    assert (config.kv_cache_memory, config.memory_limit) == (33, 300)
    single = engine_config(Settings(kv_cache_memory=100), Path("/m.gguf"), {})
    assert (single.kv_cache_memory, single.memory_limit, single.data_parallel_rank) == (100, None, 0)


def test_token_ids_are_kept_where_they_are_read_and_with_keys_if_requests_are_recorded() -> None:
    recorded, beyond, origins = (
        {"api_key": ("k",), "record_requests": 1},
        {"host": "0.0.0.0"},
        {"allowed_origins": ("*",)},
    )
    kept: list[dict[str, Any]] = [
        *({}, recorded, recorded | beyond, beyond | {"uds": "/tmp/socket"}),
        *(beyond | {"inspect_public": True}, origins | {"inspect_public": True}),
    ]
    forgotten: list[dict[str, Any]] = [
        *({"inspect": False}, {"api_key": ("k",)}, {"admin_key": "k"}, {"api_keys_file": "keys.yaml"}, beyond),
        *(origins, origins | {"record_requests": 1}, recorded | {"inspect": False}),
    ]
    for expected, cases in ((True, kept), (False, forgotten)):
        for settings in cases:
            config = engine_config(Settings(**settings), Path("/m.gguf"), {})
            assert config.keep_token_ids is expected, settings
