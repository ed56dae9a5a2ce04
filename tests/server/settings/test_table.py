"""The table of settings: what is made of it, and properties of `Settings`."""

from pathlib import Path

import msgspec
import pytest

from server.settings.access import ACCESS, AccessSettings
from server.settings.markdown import markdown_table
from server.settings.process_configs import engine_config
from server.settings.setting import SettingsError
from server.settings.suggestions import did_you_mean
from server.settings.table import SETTINGS, Settings
from server.settings.value_types import format_size, parse_size
from tests.support.paths import ROOT
from tests.support.settings_cases import CASES, settings_from_flags


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


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("--prot", "--port"),
        ("--max-num-seq", "--max-num-seqs"),
        ("--max-batched-tokens", "--max-num-batched-tokens"),
        ("--frobnicate", None),
        ("", None),
    ],
)
def test_the_nearest_name(name: str, suggestion: str | None) -> None:
    known = ["--port", "--host", "--max-num-seqs", "--max-num-batched-tokens"]
    assert did_you_mean(name, known) == (f" (did you mean {suggestion}?)" if suggestion else "")
