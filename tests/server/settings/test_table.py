"""The settings table: every setting from every source, who wins, and what is refused how."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig
from server.cli.main import make_parser
from server.settings.kinds import SettingsError, format_size, parse_size
from server.settings.table import (
    SETTINGS,
    Settings,
    engine_config,
    is_loopback,
    load_settings,
    markdown_table,
)
from tests.support.paths import ROOT

# Of each setting: text that is not the default, another one, and what they mean.
VALID: dict[str, tuple[tuple[str, Any], tuple[str, Any]]] = {
    "model": (("org/name", "org/name"), ("/models/x.gguf", "/models/x.gguf")),
    "device": (("cpu", "cpu"), ("cuda:1", "cuda:1")),
    "dtype": (("bfloat16", "bfloat16"), ("float32", "float32")),
    "quantization": (("int8", "int8"), ("none", "none")),
    "pooling": (("last", "last"), ("mean", "mean")),
    "seed": (("-9223372036854775808", -(2**63)), ("7", 7)),
    "host": (("localhost", "localhost"), ("::1", "::1")),
    "port": (("0", 0), ("65535", 65535)),
    "api_key": (("sk-one", ("sk-one",)), ("sk two", ("sk two",))),
    "allow_unauthenticated": (("true", True), ("yes", True)),
    "allowed_origins": (("*", ("*",)), ("https://example.org:8443", ("https://example.org:8443",))),
    "served_model_name": (("gpt-4", ("gpt-4",)), ("a/b", ("a/b",))),
    "chat_template": (("/a/chat.jinja", "/a/chat.jinja"), ("b.jinja", "b.jinja")),
    "enable_docs": (("true", True), ("on", True)),
    "strict": (("on", True), ("True", True)),
    "max_queued_requests": (("1", 1), ("5000", 5000)),
    "max_body_size": (("1KiB", 1024), ("2MB", 2_000_000)),
    "max_stored_responses": (("0", 0), ("5", 5)),
    "stored_responses_memory": (("0", 0), ("1GiB", 1 << 30)),
    "record_requests": (("0", 0), ("100", 100)),
    "max_logprobs": (("-1", -1), ("0", 0)),
    "drain_timeout": (("0", 0.0), ("2.5", 2.5)),
    "step_timeout": (("0.5", 0.5), ("1e3", 1000.0)),
    "max_model_len": (("1", 1), ("4096", 4096)),
    "max_num_seqs": (("1", 1), ("256", 256)),
    "max_num_batched_tokens": (("1", 1), ("8192", 8192)),
    "long_prefill_token_threshold": (("512", 512), ("1", 1)),
    "block_size": (("16", 16), ("128", 128)),
    "enable_prefix_caching": (("false", False), ("off", False)),
    "kv_cache_dtype": (("int8", "int8"), ("int8", "int8")),
    "kv_cache_memory": (("1.5GiB", 3 << 29), ("1048576", 1 << 20)),
    "speculative": (("off", "off"), ("ngram", "ngram")),
    "enforce_eager": (("true", True), ("on", True)),
    "batch_invariant": (("false", False), ("off", False)),
    "lora_modules": (("sql=/a/sql", ("sql=/a/sql",)), ("a/b@1=org/name:x.gguf", ("a/b@1=org/name:x.gguf",))),
    "max_loras": (("3", 3), ("1", 1)),
    "max_lora_rank": (("64", 64), ("1", 1)),
    "allow_runtime_lora_updating": (("true", True), ("on", True)),
    "log_level": (("debug", "debug"), ("error", "error")),
    "log_format": (("json", "json"), ("json", "json")),
    "metrics_prefix": (("vllm:", "vllm:"), ("a_1", "a_1")),
}
INVALID: dict[str, list[str]] = {
    "model": ["", " ", "a\nb"],
    "device": ["gpu", "cuda:", "CPU"],
    "dtype": ["fp16", ""],
    "quantization": ["INT8", "int4", ""],
    "pooling": ["cls", "", "MEAN"],
    "seed": ["9223372036854775808", "1.5", "x", ""],
    "host": ["", "\t"],
    "port": ["-1", "65536", "8000.0", "http", "", "٣"],
    "api_key": ["", "  "],
    "allow_unauthenticated": ["maybe", "", "2"],
    "allowed_origins": ["example.org", "https://example.org/", ""],
    "served_model_name": ["", " "],
    "chat_template": ["", " "],
    "enable_docs": ["maybe", "2"],
    "strict": ["strict"],
    "max_queued_requests": ["0", "-1"],
    "max_body_size": ["1023", "10 apples", "-1MiB", "1e9", "9999999TiB"],
    "max_stored_responses": ["-1", "many"],
    "stored_responses_memory": ["-1", "1GB/s"],
    "record_requests": ["-1", "all"],
    "max_logprobs": ["-2", "all"],
    "drain_timeout": ["-1", "nan", "inf", "1e6", "30s"],
    "step_timeout": ["0", "nan"],
    "max_model_len": ["0", "2147483648"],
    "max_num_seqs": ["0", "65537"],
    "max_num_batched_tokens": ["0"],
    "long_prefill_token_threshold": ["-1"],
    "block_size": ["17", "8", "", "256"],
    "enable_prefix_caching": ["none"],
    "kv_cache_dtype": ["fp8", "bfloat16", ""],
    "kv_cache_memory": ["1KiB", "1GG", ""],
    "speculative": ["on", "false", "", "OFF"],
    "enforce_eager": ["none"],
    "batch_invariant": ["none"],
    "lora_modules": ["", "/a/sql", "=/a/sql", "sql=", "sql= ", "s q=/a", "a=/\0", "a" * 129 + "=/a", "{", "{}"],
    "max_loras": ["0", "1025", "all"],
    "max_lora_rank": ["0", "4097"],
    "allow_runtime_lora_updating": ["maybe", "2"],
    "log_level": ["INFO", "trace"],
    "log_format": ["text"],
    "metrics_prefix": ["1a", "a-b", ""],
}
EVERY_CASE = [(name, text, value) for name, cases in VALID.items() for text, value in cases]
EVERY_BAD_CASE = [(name, text) for name, texts in INVALID.items() for text in texts]


def write(path: Path, content: str) -> str:
    file = path / "settings.yml"
    file.write_text(content, encoding="utf-8")
    return str(file)


def from_flags(*argv: str) -> Settings:
    """As the command line does it, without an environment."""
    return load_settings(vars(make_parser().parse_args(["serve", *argv])))


def as_flags(name: str, text: str) -> list[str]:
    setting = SETTINGS[name]
    if setting.positional:
        return [text]
    if setting.is_switch:
        return [setting.flag if VALID[name][0][1] else f"--no-{setting.key}"]
    return [f"{setting.flag}={text}"]


def test_the_cases_cover_the_table() -> None:
    assert list(VALID) == list(INVALID) == list(SETTINGS) == list(Settings.__struct_fields__)


@pytest.mark.parametrize(("name", "text", "value"), EVERY_CASE)
def test_every_source_means_the_same(tmp_path: Path, name: str, text: str, value: Any) -> None:
    setting = SETTINGS[name]
    by_flag = from_flags(*as_flags(name, text))
    by_environment = load_settings(environ={setting.variable: text})
    by_kebab_key = load_settings(config=write(tmp_path, f"{setting.key}: {msgspec.json.encode(text).decode()}\n"))
    by_snake_key = load_settings(config=write(tmp_path, f"{name}: {msgspec.json.encode(text).decode()}\n"))
    for settings in (by_flag, by_environment, by_kebab_key, by_snake_key):
        assert getattr(settings, name) == value
        assert settings == msgspec.structs.replace(Settings(), **{name: value})


@pytest.mark.parametrize(("name", "text", "value"), EVERY_CASE)
def test_yaml_values_need_no_quotes(tmp_path: Path, name: str, text: str, value: Any) -> None:
    plain = f"'{text}'" if text in ("*", "vllm:") else text
    assert getattr(load_settings(config=write(tmp_path, f"{name}: {plain}\n")), name) == value


@pytest.mark.parametrize("name", SETTINGS)
def test_flag_before_environment_before_file_before_default(tmp_path: Path, name: str) -> None:
    setting = SETTINGS[name]
    (first, first_value), (second, _) = VALID[name]
    default = str(setting.default) if setting.is_switch else second
    environ = {setting.variable: second}
    config = write(tmp_path, f"{name}: {msgspec.json.encode(default).decode()}\n")
    flags = {name: [first] if setting.kind.is_list else first}
    assert getattr(load_settings(flags, environ, config), name) == first_value
    assert getattr(load_settings({}, {setting.variable: first}, config), name) == first_value
    assert getattr(load_settings({}, {}, write(tmp_path, f"{name}: {msgspec.json.encode(first).decode()}")), name) == (
        first_value
    )
    assert getattr(load_settings(), name) == setting.default == getattr(Settings(), name)


@pytest.mark.parametrize(("name", "text"), EVERY_BAD_CASE)
def test_bad_values_are_refused_with_setting_source_and_limit(tmp_path: Path, name: str, text: str) -> None:
    setting = SETTINGS[name]
    expected = re.escape(setting.kind.expected)
    with pytest.raises(SettingsError, match=f"^{setting.variable}: expected {expected}"):
        load_settings(environ={setting.variable: text})
    config = write(tmp_path, f"{setting.key}: {msgspec.json.encode(text).decode()}\n")
    with pytest.raises(SettingsError, match=f"^{re.escape(config)}: {setting.key}: expected {expected}"):
        load_settings(config=config)
    if not setting.is_switch:
        with pytest.raises(SettingsError, match=f"^{re.escape(setting.flag)}: expected {expected}"):
            load_settings({name: [text] if setting.kind.is_list else text})


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("port: true", "port"),
        ("port: 80.5", "port"),
        ("port: [1, 2]", "port"),
        ("host: 5", "host"),
        ("strict: 3", "strict"),
        ("api-key: [sk-secret, '']", "api-key"),
        ("api-key: {a: sk-secret}", "api-key"),
        ("seed: 1.0", "seed"),
        ("drain-timeout: .nan", "drain-timeout"),
        ("max-body-size: 2001-01-01", "max-body-size"),
    ],
)
def test_bad_yaml_types(tmp_path: Path, line: str, name: str) -> None:
    with pytest.raises(SettingsError, match=f": {name}: expected ") as caught:
        load_settings(config=write(tmp_path, line))
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prt: 80", "unknown setting 'prt'"),
        ("config: other.yml", "unknown setting 'config'"),
        ("1: 80", "unknown setting 1"),
        ("port: 80\nport: 81", "port stands there twice"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "max_num_seqs stands there twice"),
        ("- port", "expected a mapping"),
        ("port: [", "not YAML"),
        ("port: !!python/object/apply:os.system [id]", "not YAML"),
        ("port: \x00", "not YAML"),
        ("port: 1\napi-key: sk-secret: [", "not YAML: line 2: "),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    config = write(tmp_path, content)
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(config=config)
    assert str(caught.value).startswith(config)
    assert "\n" not in str(caught.value)
    assert "sk-secret" not in str(caught.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no\.yml: cannot be read: No such file"):
        load_settings(config=str(tmp_path / "no.yml"))
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        load_settings(config=str(tmp_path))
    assert load_settings(config=write(tmp_path, "# nothing\n")) == Settings()
    assert load_settings(config=write(tmp_path, "port:\nseed: null\n")) == Settings()


def test_the_file_can_be_named_by_the_environment(tmp_path: Path) -> None:
    config = write(tmp_path, "port: 81\n")
    assert load_settings(environ={"LIGHTWELL_CONFIG": config}).port == 81


def test_lists() -> None:
    environ = {"LIGHTWELL_API_KEY": "one,two", "LIGHTWELL_SERVED_MODEL_NAME": "a"}
    settings = load_settings(environ=environ)
    assert settings.api_key == ("one", "two")
    assert settings.served_model_name == ("a",)
    assert from_flags("--api-key", "x,y", "--api-key", "z").api_key == ("x,y", "z")
    with pytest.raises(SettingsError, match="LIGHTWELL_API_KEY"):
        load_settings(environ={"LIGHTWELL_API_KEY": "one,"})


def test_switches_can_be_turned_either_way() -> None:
    assert from_flags("--no-enable-prefix-caching").enable_prefix_caching is False
    assert from_flags("--enable-prefix-caching").enable_prefix_caching is True
    flags = vars(make_parser().parse_args(["serve", "--no-strict"]))
    assert load_settings(flags, {"LIGHTWELL_STRICT": "true"}).strict is False


def test_unknown_variables_are_named() -> None:
    environ = {"LIGHTWELL_PRT": "1", "LIGHTWELL_CACHE": "/x", "LIGHTWELL_TEST_MODEL": "/y", "OTHER": "1"}
    with pytest.raises(SettingsError, match=r"^unknown environment variables: LIGHTWELL_PRT$"):
        load_settings(environ=environ)
    with pytest.raises(SettingsError, match="enableServiceLinks"):
        load_settings(environ={"LIGHTWELL_SERVICE_HOST": "10.0.0.1", "LIGHTWELL_PORT": "tcp://10.0.0.1:8000"})


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("localhost.example.org", False),
    ],
)
def test_beyond_loopback_needs_a_key(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
    assert from_flags("--host", host, "--api-key", "k").host == host
    assert from_flags("--host", host, "--allow-unauthenticated").host == host
    if expected:
        assert from_flags("--host", host).host == host
    else:
        with pytest.raises(SettingsError, match=f"--host {host} .*--api-key.*--allow-unauthenticated"):
            from_flags("--host", host)


def test_keys_are_not_shown() -> None:
    assert "sk-secret" not in repr(Settings(api_key=("sk-secret",)))
    with pytest.raises(SettingsError) as caught:
        load_settings({"api_key": ["sk-secret", ""]})
    assert "sk-secret" not in str(caught.value)


def test_settings_cross_the_process_border() -> None:
    settings = from_flags("--api-key", "k", "--seed=-5", "--kv-cache-memory", "1GiB")
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings) == settings


def test_engine_config_has_everything_the_engine_asks_for() -> None:
    """Settings of the same name are handed on, and none of the engine's is forgotten."""
    changed = {name: cases[0][1] for name, cases in VALID.items()}
    config = engine_config(Settings(**changed), Path("/m.gguf"), {"sql": Path("/a/sql")})
    assert config.model_path == "/m.gguf"
    assert config.lora_modules == {"sql": "/a/sql"}
    for field in msgspec.structs.fields(EngineConfig):
        if field.name not in ("model_path", "lora_modules"):
            assert getattr(config, field.name) == changed[field.name] != field.default


def test_adapters_have_names_of_their_own() -> None:
    settings = from_flags("--lora-modules", "a=/x,y=z", "--lora-modules", "b=org/name")
    assert settings.lora_paths == {"a": "/x,y=z", "b": "org/name"}
    assert load_settings(environ={"LIGHTWELL_LORA_MODULES": "a=/x,b=/y"}).lora_paths == {"a": "/x", "b": "/y"}
    with pytest.raises(SettingsError, match="--lora-modules: two adapters are called a"):
        from_flags("--lora-modules", "a=/x", "--lora-modules", "a=/y")
    with pytest.raises(SettingsError, match="--lora-modules: gpt is the name of the model"):
        from_flags("--lora-modules", "gpt=/x", "--served-model-name", "other", "--served-model-name", "gpt")


def test_vllms_json_of_an_adapter(tmp_path: Path) -> None:
    module = {"name": "org/sql", "path": "/a/x=y,z"}
    for given in (module, module | {"base_model_name": "gpt"}, module | {"base_model_name": None}):
        text = msgspec.json.encode(given).decode()
        for settings in (
            from_flags("--lora-modules", text),
            load_settings(config=write(tmp_path, f"lora-modules: {text}\n")),
            load_settings(config=write(tmp_path, f"lora-modules: [{text}]\n")),
        ):
            assert settings.lora_paths == {"org/sql": "/a/x=y,z"}
    assert from_flags("--lora-modules", '{"name":"a","path":"b"}', "--lora-modules", "c=d").lora_paths == {
        "a": "b",
        "c": "d",
    }


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "a"}',
        '{"path": "/a"}',
        '{"name": "a", "path": ""}',
        '{"name": "", "path": "/a"}',
        '{"name": "a=b", "path": "/a"}',
        '{"name": "a", "path": 5}',
        '{"name": "a", "path": "/a\\u0000"}',
        '{"name": "a", "path": "/a", "rank": 8}',
        '{"name": "a", "path": "/a"',
        '[{"name": "a", "path": "/a"}]',
        "{" * 100_000,
        '{"a":' * 100_000,
    ],
)
def test_what_is_no_adapter(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^--lora-modules: expected NAME=PATH, the name of letters"):
        from_flags("--lora-modules", text)


def test_places_for_adapters() -> None:
    two = ("--lora-modules", "a=/x", "--lora-modules", "b=/y")
    for flags, num_places in (
        ((), 0),
        (("--max-loras", "3"), 0),
        (two, 8),
        ((*two, "--max-loras", "2"), 2),
        (("--allow-runtime-lora-updating", "--max-loras", "3"), 3),
    ):
        assert engine_config(from_flags(*flags), Path("/m"), {}).max_loras == num_places
    with pytest.raises(SettingsError, match="--lora-modules names 2 adapters, but --max-loras is 1"):
        from_flags(*two, "--max-loras", "1")


@pytest.mark.parametrize("num_bytes", [0, 1, 1023, 1024, 10 << 20, 3 << 29, 1 << 40])
def test_sizes_are_written_as_they_are_read(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == num_bytes


def test_readme_has_the_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    between = readme.partition("<!-- settings:begin -->")[2].partition("<!-- settings:end -->")[0]
    assert between.strip() == markdown_table().strip(), "put the output of `python -m server.settings.table` there"


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_table_names_every_setting(setting: Any) -> None:
    assert f"`{setting.flag}`" in markdown_table()
