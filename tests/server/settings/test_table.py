"""The properties of `Settings`."""

from pathlib import Path

import pytest

from server.settings.process_configs import engine_config
from server.settings.setting import SettingsError
from server.settings.table import SETTINGS, Settings
from tests.support.settings_cases import INVALID, VALID, settings_from_flags


def test_the_cases_cover_the_table() -> None:
    assert sorted(VALID) == sorted(INVALID) == sorted(SETTINGS) == sorted(Settings.__struct_fields__)


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
