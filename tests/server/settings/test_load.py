"""Settings from every source: their precedence, those of each model, and which are refused with which message."""

import itertools
import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from engine.config import EngineConfig
from server.cli.main import make_parser
from server.part_table import PARTS, load_module
from server.schemas.sampling import SamplingFields
from server.settings import load, process_configs
from server.settings.load import is_loopback, load_settings, num_values
from server.settings.process_configs import engine_config
from server.settings.sampling import SAMPLING_FIELDS
from server.settings.setting import SettingsError, format_size, parse_size
from server.settings.table import SETTINGS, Settings
from tests.support.settings_cases import CASES, INVALID, KINDS, VALID, settings_from_flags


def write(path: Path, content: str) -> str:
    file = path / "settings.yml"
    file.write_text(content, encoding="utf-8")
    return str(file)


def as_flags(name: str, text: str, value: object) -> list[str]:
    setting = SETTINGS[name]
    if setting.is_switch:
        return [f"--{setting.key}" if value else f"--no-{setting.key}"]
    return [text if setting.positional else f"{setting.flag}={text}"]


def as_yaml(name: str, text: str) -> str:
    return f"{name}: {msgspec.json.encode(text).decode()}\n"


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_means_the_same(tmp_path: Path, kind: str) -> None:
    for name in set(KINDS[kind]) - {"models", "ssl_keyfile"}:  # which have tests of their own
        setting = SETTINGS[name]
        for text, value in VALID[name]:
            plain = f"'{text}'" if text in ("*", "vllm:") else text
            by_file = [as_yaml(setting.key, text), as_yaml(name, text), f"{name}: {plain}\n"]
            every = [load_settings(config=write(tmp_path, line)) for line in by_file]
            every += [
                settings_from_flags(*as_flags(name, text, value)),
                load_settings(environ={setting.variable: text}),
            ]
            assert every == [msgspec.structs.replace(Settings(), **{name: value})] * 5, (name, text)


@pytest.mark.parametrize("kind", KINDS)
def test_flag_before_environment_before_file_before_default(tmp_path: Path, kind: str) -> None:
    for name in set(KINDS[kind]) - {"models", "ssl_keyfile"}:
        setting = SETTINGS[name]
        (first, value), *_, (last, _) = VALID[name]
        config = write(tmp_path, as_yaml(name, last))
        flags = {name: [first] if setting.value_type.is_list else first}
        assert getattr(load_settings(flags, {setting.variable: last}, config), name) == value
        assert getattr(load_settings({}, {setting.variable: first}, config), name) == value
        assert getattr(load_settings(), name) == setting.default == getattr(Settings(), name) != value


@pytest.mark.parametrize("kind", KINDS)
def test_bad_values_are_refused_with_setting_source_and_limit(tmp_path: Path, kind: str) -> None:
    for name, text in [(each, text) for each in KINDS[kind] for text in INVALID[each]]:
        setting = SETTINGS[name]
        expected = re.escape(setting.value_type.expected)
        with pytest.raises(SettingsError, match=f"^{setting.variable}: expected {expected}"):
            load_settings(environ={setting.variable: text})
        config = write(tmp_path, as_yaml(setting.key, text))
        with pytest.raises(SettingsError, match=f"^{re.escape(config)}: {setting.key}: expected {expected}"):
            load_settings(config=config)
        if not setting.is_switch:
            with pytest.raises(SettingsError, match=f"^{re.escape(setting.flag)}: expected {expected}"):
                load_settings({name: [text] if setting.value_type.is_list else text})


def test_settings_that_need_others() -> None:
    load_settings({"host": "0.0.0.0", "uds": "lw.sock"})  # a UNIX socket needs no key
    with pytest.raises(SettingsError, match="--ssl-keyfile: set --ssl-certfile too"):
        load_settings({"ssl_keyfile": "a.key"})


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
WRONG_TYPES = (
    *("port: true", "port: 80.5", "port: [1, 2]", "host: 5", "strict: 3", "seed: 1.0", "drain-timeout: .nan"),
    *("api-key: [sk-secret, '']", "api-key: {a: sk-secret}", "max-body-size: 2001-01-01"),
    *("default-sampling: {m: {1: 2}}", "default-sampling: [temperature]"),
)


# `$` in a message is its end.
@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((line, f": {line.partition(':')[0]}: expected ") for line in WRONG_TYPES),
        *(
            (f"default-sampling: {{temperature: {wrong}}}", "temperature: expected ")
            for wrong in (".nan", "true", "[0.5]")
        ),
        ("default-sampling: {m: {top_p: 2001-01-01}}", ": default-sampling: top_p: expected "),
        ("prt: 80", "unknown setting 'prt' (did you mean port?)"),
        ("enable_dcs: true", "unknown setting 'enable_dcs' (did you mean enable-docs?)"),
        ("no-enable-docs: true", "unknown setting 'no-enable-docs' (write enable-docs: false)"),
        ("no-port: 1", "unknown setting 'no-port'"),
        ("api-key: 123", "expected a non-empty key of printable ASCII characters: put it in quotes$"),
        ("api-key: [a, 2001-01-01]", "expected a non-empty key of printable ASCII characters: put it in quotes$"),
        ('api-key: "sk-secret\\n"', "expected a non-empty key of printable ASCII characters$"),
        ("api-key: {a: b}", "api-key: expected a non-empty key of printable ASCII characters$"),
        ("served-model-name: yes", "expected non-empty text, got True: put it in quotes$"),
        ("port: 80.5", "port: expected an integer from 0 to 65535, got 80.5$"),
        ("config: other.yml", "unknown setting 'config'"),
        ("1: 80", "unknown setting 1"),
        ("port: 80\nport: 81", "port is set twice"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "max_num_seqs is set twice"),
        ("- port", "expected a mapping"),
        *((f"port: {each}", "invalid YAML") for each in ("[", "!!python/object/apply:os.system [id]", "\x00")),
        ("port: 1\napi-key: sk-secret: [", "invalid YAML: line 2: "),
        # What no operator writes.
        *((5000 * each, "invalid YAML: too many levels$") for each in (b"[", b"{a: ", b"- ")),
        (b"port: " + 100_000 * b"9", "invalid YAML: the file contains invalid characters or values$"),
        (b"port: 0x" + 100_000 * b"f", "invalid YAML: line 1: the number is too large$"),
        (b"seed: 1\nport: " + 4000 * b"9", "invalid YAML: line 2: the number is too large$"),
        (b"port: 2001-99-99", "invalid YAML: the file contains invalid characters or values$"),
        (b"port: \xff", "invalid YAML: the file is not UTF-8$"),
        (b"port: *sk-secret", "invalid YAML: line 1: found undefined alias$"),
        (b"port: &a [*a]", "its aliases make more than 1048576 values$"),
        (BOMB, "its aliases make more than 1048576 values$"),
        (b"port: " + 1000 * b"a", f"port: expected an integer from 0 to 65535, got '{199 * 'a'}...$"),
        ((1 << 20) * b"#" + b"\n", "larger than 1048576 bytes$"),
        # --default-sampling.
        ("default-sampling: temprature=1", ": default-sampling: unknown field 'temprature' (did you mean temperature?"),
        ("default-sampling: {m: {topk: 4}}", ": default-sampling: unknown field 'topk' (did you mean top_k?)"),
        ("default-sampling: {m: temprature=1}", "unknown field 'temprature' (did you mean temperature?)"),
        ("default-sampling: {m: {n: {top_k: 4}}}", "unknown field 'n' (fields: temperature, min_p, "),
        ("default-sampling: {max_tokens: 5}", "unknown field 'max_tokens' (fields: temperature, min_p, "),
        ("default-sampling: temperature=5", ": default-sampling: temperature: expected a number from 0 to 2, got 5"),
        ("default-sampling: {temperature: '1'}", "temperature: expected a number from 0 to 2, got '1'"),
        ("default-sampling: {m: {top_k: 1.5}}", "top_k: expected an integer from -1 to 9223372036854775807, got 1.5"),
        ("default-sampling: {samplers: top_k}", "samplers: expected a list, got 'top_k'"),
        ("default-sampling: {typical_p: 0}", "typical_p: expected a number above 0 and up to 1, got 0"),
        # Models.
        ("models: [{model: x, seed: 3}, b]", "models: entry 0: seed: applies to all models"),
        ("models: [a, {model: x, max-modl-len: 3}]", "models: entry 1: max-modl-len: unknown setting (did you"),
        ("models: [{mdel: x}]", "models: expected a model, or a mapping with the key model and settings of its own"),
        ("models: [{model: x, load: never}, y]", "models: entry 0: load: expected one of at-start, on-first-use"),
        ("models: [a, b]\nserved-model-name: x", "--served-model-name: there are several models; set served-model-"),
        ("models: [a, b]\napi-server-count: 2", "--api-server-count: not with several models, --load on-first-use or"),
        ("model: a\nload: on-first-use\ndata-parallel-size: 2", "--data-parallel-size: not with several models, --l"),
        ("models: [a, b]\nlora-modules: x=/y", "--lora-modules: there are several models; set lora-modules of its"),
        ("models: [a, {model: b, max-loras: 1, lora-modules: [x=/y, z=/y]}]", "names 2 adapters, but --max-loras is 1"),
    ],
    ids=itertools.count(),
)
def test_bad_files(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "settings.yml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError) as caught:
        load_settings(config=str(file))
    assert message in f"{caught.value}$"
    assert str(caught.value).startswith((str(file), "--"))
    assert "\n" not in str(caught.value)
    assert "sk-secret" not in str(caught.value)


def test_default_sampling_is_a_mapping_with_one_for_each_model(tmp_path: Path) -> None:
    content = """
default-sampling:
  temperature: 0.7
  top_k: 40
  min_p: null
  smollm2-135m: {top_p: 0.9}
  org/name: none
  /models/x.gguf: temperature=0.1 samplers=["top_k"]
"""
    of_models = {"smollm2-135m": {"top_p": 0.9}, "org/name": "none"}
    of_models["/models/x.gguf"] = {"temperature": 0.1, "samplers": ["top_k"]}
    assert (
        load_settings(config=write(tmp_path, content)).default_sampling == {"temperature": 0.7, "top_k": 40} | of_models
    )
    assert load_settings(config=write(tmp_path, "default-sampling: none")).default_sampling == "none"


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no\.yml: cannot be read: No such file"):
        load_settings(config=str(tmp_path / "no.yml"))
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        load_settings(config=str(tmp_path))
    assert load_settings(config=write(tmp_path, "# nothing\n")) == Settings()
    assert load_settings(config=write(tmp_path, "port:\nseed: null\n")) == Settings()
    assert load_settings(environ={"LIGHTWELL_CONFIG": write(tmp_path, "port: 81\n")}).port == 81


def test_lists() -> None:
    settings = load_settings(environ={"LIGHTWELL_API_KEY": "one, two", "LIGHTWELL_SERVED_MODEL_NAME": "a"})
    assert settings.api_key == ("one", "two")
    assert settings.served_model_name == ("a",)
    assert load_settings(environ={"LIGHTWELL_SERVED_MODEL_NAME": "a , b"}).served_model_name == ("a", "b")
    assert settings_from_flags("--api-key", "x,y", "--api-key", "z").api_key == ("x,y", "z")
    with pytest.raises(SettingsError, match="LIGHTWELL_API_KEY"):
        load_settings(environ={"LIGHTWELL_API_KEY": "one,"})


def test_switches_can_be_turned_either_way() -> None:
    flags = vars(make_parser().parse_args(["serve", "--no-strict"]))
    assert load_settings(flags, {"LIGHTWELL_STRICT": "true"}).strict is False


def test_unknown_variables_are_named() -> None:
    environ = {"LIGHTWELL_PRT": "1", "LIGHTWELL_CACHE": "/x", "LIGHTWELL_TEST_MODEL": "/y", "OTHER": "1"}
    with pytest.raises(
        SettingsError, match=r"^unknown environment variables: LIGHTWELL_PRT \(did you mean LIGHT.*PORT\?\)$"
    ):
        load_settings(environ=environ)
    with pytest.raises(SettingsError, match=r"^unknown environment variables: LIGHTWELL_ZZZZZZ$"):
        load_settings(environ={"LIGHTWELL_ZZZZZZ": "1"})


@pytest.mark.parametrize(("name", "value"), [("PORT", "tcp://10.0.0.1:8000"), ("PORT_8000_TCP_ADDR", "10.0.0.1")])
def test_service_links_of_kubernetes_are_explained(name: str, value: str) -> None:
    environ = {"LIGHTWELL_SERVICE_HOST": "10.0.0.1", f"LIGHTWELL_{name}": value}
    with pytest.raises(SettingsError, match=r"Kubernetes .* Service named lightwell.*enableServiceLinks: false"):
        load_settings(environ=environ)


@pytest.mark.checklist("B05")
def test_beyond_loopback_needs_a_key() -> None:
    local = ["127.0.0.1", "127.9.9.9", "::1", "localhost"]
    for host in [*local, "0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org"]:
        assert is_loopback(host) is (host in local)
        assert settings_from_flags("--host", host, "--api-key", "k").host == host
        assert settings_from_flags("--host", host, "--allow-unauthenticated").host == host
        if host in local:
            assert settings_from_flags("--host", host).host == host
        else:
            with pytest.raises(SettingsError, match=f"--host {host} .*--api-key.*--allow-unauthenticated"):
                settings_from_flags("--host", host)


def test_adapters_have_names_of_their_own() -> None:
    settings = settings_from_flags("--lora-modules", "a=/x,y=z", "--lora-modules", "b=org/name")
    assert settings.lora_modules == ("a=/x,y=z", "b=org/name")
    assert load_settings(environ={"LIGHTWELL_LORA_MODULES": "a=/x,b=/y"}).lora_modules == ("a=/x", "b=/y")
    with pytest.raises(SettingsError, match="--lora-modules: two adapters are named a"):
        settings_from_flags("--lora-modules", "a=/x", "--lora-modules", "a=/y")
    with pytest.raises(SettingsError, match="--lora-modules: gpt is the name of the model"):
        settings_from_flags("--lora-modules", "gpt=/x", "--served-model-name", "other", "--served-model-name", "gpt")


def test_vllms_json_of_an_adapter(tmp_path: Path) -> None:
    module = {"name": "org/sql", "path": "/a/x=y,z"}
    for given in (module, module | {"base_model_name": "gpt"}, module | {"base_model_name": None}):
        text = msgspec.json.encode(given).decode()
        for settings in (
            settings_from_flags("--lora-modules", text),
            load_settings(config=write(tmp_path, f"lora-modules: {text}\n")),
            load_settings(config=write(tmp_path, f"lora-modules: [{text}]\n")),
        ):
            assert settings.lora_modules == ("org/sql=/a/x=y,z",)
    both = settings_from_flags("--lora-modules", '{"name":"a","path":"b"}', "--lora-modules", "c=d")
    assert both.lora_modules == ("a=b", "c=d")


A, B = {"model": "a"}, {"model": "b"}


def in_file(tmp_path: Path, content: str) -> Settings:
    return load_settings(config=write(tmp_path, content))


def test_one_and_several_models_can_be_named_in_each_way(tmp_path: Path) -> None:
    one, two = Settings(model="a"), Settings(model="a", models=(A, B))
    for expected, settings in (
        (one, settings_from_flags("a")),
        (one, settings_from_flags("--model", "a")),
        *((one, load_settings(environ={name: "a"})) for name in ("LIGHTWELL_MODEL", "LIGHTWELL_MODELS")),
        *((one, in_file(tmp_path, file)) for file in ("model: a", "models: a", "models: [a]", "models: [{model: a}]")),
        (two, settings_from_flags("a", "--model", "b")),
        (two, settings_from_flags("--model", "a", "--model", "b")),
        (two, load_settings(environ={"LIGHTWELL_MODELS": "a,b"})),
        (two, load_settings(environ={"LIGHTWELL_MODEL": "a", "LIGHTWELL_MODELS": "b"})),
        *((two, in_file(tmp_path, f"models: [a, {b}]")) for b in ("b", "{model: b}")),
        (two, in_file(tmp_path, "{model: a, models: [b]}")),
    ):
        assert settings == expected
        assert settings.unloads_models == (expected is two)


def test_a_source_says_all_that_is_served(tmp_path: Path) -> None:
    file = write(tmp_path, "models: [a, b]\nseed: 3")
    assert load_settings({"model": "c"}, config=file) == Settings(model="c", seed=3)
    assert load_settings({}, {"LIGHTWELL_MODELS": "c,d"}, config=file).models == ({"model": "c"}, {"model": "d"})


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
    own: dict[str, Any] = {"max_model_len": 200, "served_model_name": ("x", "y"), "lora_modules": ("sql=/sql",)}
    assert second == Settings(model="b", seed=3, load="on-first-use", kv_cache_memory=1 << 30, **own)
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings).each_model == [first, second]


def test_the_settings_of_the_only_entry_are_those_of_the_server(tmp_path: Path) -> None:
    settings = in_file(tmp_path, "models: [{model: a, load: on-first-use}]")
    assert settings == Settings(model="a", load="on-first-use")
    assert settings.unloads_models
    assert Settings(idle_unload=5.0).unloads_models


def test_a_device_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MAX_FILE_BYTES", 1000)
    with pytest.raises(SettingsError, match=r"^/dev/zero: larger than 1000 bytes$"):
        load_settings(config="/dev/zero")


def test_values_count_as_often_as_aliases_repeat_them() -> None:
    root = yaml.compose("{a: &a [1, 2], b: *a, c: {d: *a}}", yaml.SafeLoader)
    assert num_values(root, 100) == 1 + 3 + 3 * 3 + 1 + 1
    assert num_values(yaml.compose("&a [*a]", yaml.SafeLoader), 100) > 100
    assert num_values(None, 100) == 0


@pytest.mark.parametrize("value", [5000 * "[", '{"temperature": ' + 400 * "9" + "}", 5000 * '{"temperature":'])
def test_json_in_a_flag(value: str) -> None:
    with pytest.raises(SettingsError, match=r"^--default-sampling: ") as caught:
        load_settings({"default_sampling": value})
    assert len(str(caught.value)) < 600


BOUNDS = (-2.0, -1.0, 0.0, 0.01, 1.0, 2.0, 10.0, 256.0, 1000.0, 2.0**63)
VALUES: list[Any] = [
    *(near for bound in BOUNDS for near in (math.nextafter(bound, -math.inf), bound, math.nextafter(bound, math.inf))),
    *(whole + step for whole in (-2, -1, 0, 1, 2, 10, 256, 1000, 2**63) for step in (-1, 0, 1)),
    *(math.inf, math.nan, True, [], {}),
]


# The fields of --default-sampling have the names and limits of the fields of requests.


def accepted(parse: Callable[[Any], object]) -> str:
    """Return the values that are accepted."""
    values = []
    for value in VALUES:
        with suppress(ValueError):
            parse(value)
            values.append(value)
    assert 0 < len(values) < len(VALUES)
    return repr(values)


def test_limits() -> None:
    """The setting and a request accept the same values."""
    assert SAMPLING_FIELDS.keys() == SamplingFields.model_fields.keys()
    for name, field in SAMPLING_FIELDS.items():
        in_a_request = accepted(lambda value: SamplingFields.model_validate({name: value}))  # noqa: B023
        assert accepted(field.parse) == in_a_request, name


# The table, what is made of it, and the configurations of the engines.


def test_the_cases_cover_the_table() -> None:
    assert sorted(CASES) == sorted(SETTINGS) == sorted(Settings.__struct_fields__)
    of_parts = {name: part.settings for name, part in PARTS.items() if part.settings}
    assert of_parts == {name: [*load_module(name, "settings").SETTINGS] for name in of_parts}


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
