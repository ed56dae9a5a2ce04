"""The table of settings: what is made of it, and the configurations of the processes."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig
from server.settings import process_configs
from server.settings.access import ACCESS, AccessSettings
from server.settings.markdown import markdown_table
from server.settings.process_configs import engine_config
from server.settings.setting import SettingsError
from server.settings.table import SETTINGS, Settings
from server.settings.value_types import format_size, parse_size
from tests.support.paths import ROOT
from tests.support.settings_cases import CASES, VALID, settings_from_flags


def test_the_cases_cover_the_table() -> None:
    assert sorted(CASES) == sorted(SETTINGS) == sorted(Settings.__struct_fields__)


def test_access_is_one_group_of_the_table() -> None:
    fields = {field.name for field in msgspec.structs.fields(AccessSettings)}
    assert {name for name, setting in SETTINGS.items() if setting.group == ACCESS} == fields


def test_the_documentation_has_the_table() -> None:
    document = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    between = document.partition("<!-- settings:begin -->")[2].partition("<!-- settings:end -->")[0]
    assert between.strip() == markdown_table().strip(), "run `python -m tests.docs.generate`"
    assert [name for name, setting in SETTINGS.items() if f"`{setting.flag}`" not in between] == []


def test_repr_does_not_show_keys() -> None:
    assert "sk-secret" not in repr(Settings(api_key=("sk-secret",), admin_key="sk-secret"))


def test_number_of_lora_slots() -> None:
    two = ("--lora-modules", "a=/x", "--lora-modules", "b=/y")
    for flags, max_loaded_adapters in (
        ((), 0),
        (("--max-loras", "3"), 0),
        (two, 8),
        ((*two, "--max-loras", "2"), 2),
        (("--allow-runtime-lora-updating", "--max-loras", "3"), 3),
    ):
        assert engine_config(settings_from_flags(*flags), Path("/m"), {}).max_loras == max_loaded_adapters
    with pytest.raises(SettingsError, match="--lora-modules names 2 adapters, but --max-loras is 1"):
        settings_from_flags(*two, "--max-loras", "1")


@pytest.mark.parametrize("num_bytes", [0, 1, 1023, 1024, 10 << 20, 3 << 29, 1 << 40])
def test_sizes_are_written_as_they_are_read(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == num_bytes


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
    config = engine_config(Settings(data_parallel_size=3, kv_cache_memory=100), Path("/m.gguf"), {}, 2)
    assert (config.data_parallel_size, config.data_parallel_rank) == (3, 2)
    assert (config.kv_cache_memory, config.memory_limit) == (33, 300)
    single = engine_config(Settings(kv_cache_memory=100), Path("/m.gguf"), {})
    assert (single.kv_cache_memory, single.memory_limit, single.data_parallel_rank) == (100, None, 0)


def test_token_ids_are_kept_where_they_are_read_and_with_keys_if_requests_are_recorded() -> None:
    recorded, beyond = {"api_key": ("k",), "record_requests": 1}, {"host": "0.0.0.0"}
    origins = {"allowed_origins": ("*",)}
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
            assert engine_config(Settings(**settings), Path("/m.gguf"), {}).keep_token_ids is expected, settings
