"""The configurations of the API process and the engine."""

from pathlib import Path

import msgspec

from engine.config import EngineConfig
from server.settings.process_configs import engine_config
from server.settings.table import Settings
from tests.support.settings_cases import VALID, settings_from_flags


def test_settings_cross_the_process_border() -> None:
    settings = settings_from_flags("--api-key", "k", "--seed=-5", "--kv-cache-memory", "1GiB")
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings) == settings


def test_engine_config_has_everything_the_engine_asks_for() -> None:
    """Every field of EngineConfig is set from the setting of the same name."""
    changed = {name: cases[0][1] for name, cases in VALID.items()}
    config = engine_config(Settings(**changed), Path("/m.gguf"), {"sql": Path("/a/sql")})
    assert config.model_path == "/m.gguf"
    assert config.lora_modules == {"sql": "/a/sql"}
    for field in msgspec.structs.fields(EngineConfig):
        if field.name not in ("model_path", "lora_modules"):
            assert getattr(config, field.name) == changed[field.name] != field.default
