"""The settings that say which models are served."""

from pathlib import Path

import msgspec
import pytest

from server.settings.load import check_model_names, load_settings
from server.settings.setting import SettingsError
from server.settings.table import Settings
from tests.support.settings_cases import settings_from_flags

A, B = {"model": "a"}, {"model": "b"}


def in_file(tmp_path: Path, content: str) -> Settings:
    file = tmp_path / "settings.yml"
    file.write_text(content)
    return load_settings(config=str(file))


def test_one_model_can_be_named_in_each_way(tmp_path: Path) -> None:
    for settings in (
        settings_from_flags("a"),
        settings_from_flags("--model", "a"),
        load_settings(environ={"LIGHTWELL_MODEL": "a"}),
        load_settings(environ={"LIGHTWELL_MODELS": "a"}),
        in_file(tmp_path, "model: a"),
        in_file(tmp_path, "models: a"),
        in_file(tmp_path, "models: [a]"),
        in_file(tmp_path, "models: [{model: a}]"),
    ):
        assert settings == Settings(model="a")
        assert not settings.unloads_models


def test_several_models_can_be_named_in_each_way(tmp_path: Path) -> None:
    for settings in (
        settings_from_flags("a", "--model", "b"),
        settings_from_flags("--model", "a", "--model", "b"),
        load_settings(environ={"LIGHTWELL_MODELS": "a,b"}),
        load_settings(environ={"LIGHTWELL_MODEL": "a", "LIGHTWELL_MODELS": "b"}),
        in_file(tmp_path, "models: [a, b]"),
        in_file(tmp_path, "models: [a, {model: b}]"),
        in_file(tmp_path, "{model: a, models: [b]}"),
    ):
        assert settings == Settings(model="a", models=(A, B))
        assert settings.unloads_models


def test_a_source_says_all_that_is_served(tmp_path: Path) -> None:
    file = tmp_path / "settings.yml"
    file.write_text("models: [a, b]\nseed: 3")
    assert load_settings({"model": "c"}, config=str(file)) == Settings(model="c", seed=3)
    assert load_settings({}, {"LIGHTWELL_MODELS": "c,d"}, config=str(file)).models == ({"model": "c"}, {"model": "d"})


def test_each_model_has_its_own_settings_and_those_of_all(tmp_path: Path) -> None:
    entry = """
seed: 3
max-model-len: 100
models:
  - a
  - model: b
    served-model-name: [x, y]
    load: on-first-use
    max_model_len: 200
    kv-cache-memory: 1GiB
    dtype: null
    lora-modules: [{name: sql, path: /sql}]
"""
    settings = in_file(tmp_path, entry)
    first, second = settings.each_model
    assert first == Settings(model="a", seed=3, max_model_len=100)
    assert second == Settings(
        model="b",
        seed=3,
        max_model_len=200,
        served_model_name=("x", "y"),
        load="on-first-use",
        kv_cache_memory=1 << 30,
        lora_modules=("sql=/sql",),
    )
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings).each_model == [first, second]


def test_the_settings_of_the_only_entry_are_those_of_the_server(tmp_path: Path) -> None:
    settings = in_file(tmp_path, "models: [{model: a, load: on-first-use}]")
    assert settings == Settings(model="a", load="on-first-use")
    assert settings.unloads_models
    assert Settings(idle_unload=5.0).unloads_models


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("models: [{model: x, seed: 3}, b]", "models[0]: seed: applies to all models"),
        ("models: [a, {model: x, max-modl-len: 3}]", "models[1]: max-modl-len: unknown setting (did you mean max-"),
        ("models: [{mdel: x}]", "models: expected a model, or a mapping with the key model and settings of its own"),
        ("models: [{model: x, load: never}, y]", "models[0]: load: expected one of at-start, on-first-use"),
        ("models: [a, b]\nserved-model-name: x", "--served-model-name: there are several models; set served-model-"),
        ("models: [a, b]\napi-server-count: 2", "--api-server-count: not with several models, --load on-first-use or"),
        ("model: a\nload: on-first-use\ndata-parallel-size: 2", "--data-parallel-size: not with several models, --l"),
        ("models: [a, b]\nlora-modules: x=/y", "--lora-modules: there are several models; set lora-modules of its"),
        ("models: [a, {model: b, max-loras: 1, lora-modules: [x=/y, z=/y]}]", "names 2 adapters, but --max-loras is 1"),
    ],
)
def test_invalid_settings_of_models(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        in_file(tmp_path, content)
    assert message in str(error.value)


def test_names_belong_to_one_model() -> None:
    check_model_names([("a", "b"), ("c",)])
    with pytest.raises(SettingsError, match="two models are named b; set served-model-name of one"):
        check_model_names([("a", "b"), ("b", "c")])
