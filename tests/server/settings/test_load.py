"""Settings from every source: their precedence, and which values are rejected with which message."""

import re
from pathlib import Path

import msgspec
import pytest

from server.cli.main import make_parser
from server.settings.load import check_certificate, is_loopback, load_settings
from server.settings.setting import SettingsError
from server.settings.table import SETTINGS, Settings
from tests.support.settings_cases import INVALID, KINDS, VALID, settings_from_flags


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
    for name in set(KINDS[kind]) - {"models"}:  # which test_models.py tests
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
    for name in set(KINDS[kind]) - {"models"}:
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
        check_certificate(load_settings({"ssl_keyfile": "a.key"}))


WRONG_TYPES = (
    *("port: true", "port: 80.5", "port: [1, 2]", "host: 5", "strict: 3", "seed: 1.0", "drain-timeout: .nan"),
    *("api-key: [sk-secret, '']", "api-key: {a: sk-secret}", "max-body-size: 2001-01-01"),
    *("default-sampling: {m: {1: 2}}", "default-sampling: [temperature]"),
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((line, f": {line.partition(':')[0]}: expected ") for line in WRONG_TYPES),
        ("default-sampling: {temperature: .nan}", ": default-sampling: temperature: expected "),
        ("default-sampling: {temperature: true}", ": default-sampling: temperature: expected "),
        ("default-sampling: {m: {temperature: [0.5]}}", ": default-sampling: temperature: expected "),
        ("default-sampling: {m: {top_p: 2001-01-01}}", ": default-sampling: top_p: expected "),
        ("prt: 80", r"unknown setting 'prt' \(did you mean port\?\)"),
        ("enable_dcs: true", r"unknown setting 'enable_dcs' \(did you mean enable-docs\?\)"),
        ("no-enable-docs: true", r"unknown setting 'no-enable-docs' \(write enable-docs: false\)"),
        ("no-port: 1", r"unknown setting 'no-port'"),
        ("api-key: 123", "expected a non-empty key of printable ASCII characters: put it in quotes$"),
        ("api-key: [a, 2001-01-01]", "expected a non-empty key of printable ASCII characters: put it in quotes$"),
        ("api-key: {a: b}", "api-key: expected a non-empty key of printable ASCII characters$"),
        ("served-model-name: yes", "expected non-empty text, got True: put it in quotes$"),
        ("port: 80.5", r"port: expected an integer from 0 to 65535, got 80\.5$"),
        ("config: other.yml", "unknown setting 'config'"),
        ("1: 80", "unknown setting 1"),
        ("port: 80\nport: 81", "port is set twice"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "max_num_seqs is set twice"),
        ("- port", "expected a mapping"),
        ("port: [", "invalid YAML"),
        ("port: !!python/object/apply:os.system [id]", "invalid YAML"),
        ("port: \x00", "invalid YAML"),
        ("port: 1\napi-key: sk-secret: [", "invalid YAML: line 2: "),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    config = write(tmp_path, content)
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(config=config)
    assert str(caught.value).startswith(config)
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
    assert load_settings(config=write(tmp_path, content)).default_sampling == {
        "temperature": 0.7,
        "top_k": 40,
        "smollm2-135m": {"top_p": 0.9},
        "org/name": "none",
        "/models/x.gguf": {"temperature": 0.1, "samplers": ["top_k"]},
    }
    assert load_settings(config=write(tmp_path, "default-sampling: none")).default_sampling == "none"


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no\.yml: cannot be read: No such file"):
        load_settings(config=str(tmp_path / "no.yml"))
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        load_settings(config=str(tmp_path))
    assert load_settings(config=write(tmp_path, "# nothing\n")) == Settings()
    assert load_settings(config=write(tmp_path, "port:\nseed: null\n")) == Settings()
    named = {"LIGHTWELL_CONFIG": write(tmp_path, "port: 81\n")}
    assert load_settings(environ=named).port == 81


def test_lists() -> None:
    environ = {"LIGHTWELL_API_KEY": "one, two", "LIGHTWELL_SERVED_MODEL_NAME": "a"}
    settings = load_settings(environ=environ)
    assert settings.api_key == ("one", "two")
    assert settings.served_model_name == ("a",)
    assert load_settings(environ={"LIGHTWELL_SERVED_MODEL_NAME": "a , b"}).served_model_name == ("a", "b")
    assert settings_from_flags("--api-key", "x,y", "--api-key", "z").api_key == ("x,y", "z")
    with pytest.raises(SettingsError, match="LIGHTWELL_API_KEY"):
        load_settings(environ={"LIGHTWELL_API_KEY": "one,"})


def test_switches_can_be_turned_either_way() -> None:
    assert settings_from_flags("--no-enable-prefix-caching").enable_prefix_caching is False
    assert settings_from_flags("--enable-prefix-caching").enable_prefix_caching is True
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
@pytest.mark.parametrize(
    ("expected", "hosts"),
    [
        (True, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]),
        (False, ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org"]),
    ],
)
def test_beyond_loopback_needs_a_key(expected: bool, hosts: list[str]) -> None:
    for host in hosts:
        assert is_loopback(host) is expected
        assert settings_from_flags("--host", host, "--api-key", "k").host == host
        assert settings_from_flags("--host", host, "--allow-unauthenticated").host == host
        if expected:
            assert settings_from_flags("--host", host).host == host
        else:
            with pytest.raises(SettingsError, match=f"--host {host} .*--api-key.*--allow-unauthenticated"):
                settings_from_flags("--host", host)


@pytest.mark.parametrize("key", [["sk-secret", ""], "sk-secret\n"])
def test_errors_do_not_show_keys(key: object) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({"api_key": key})
    assert "sk-secret" not in str(caught.value)


def test_adapters_have_names_of_their_own() -> None:
    settings = settings_from_flags("--lora-modules", "a=/x,y=z", "--lora-modules", "b=org/name")
    assert settings.lora_paths == {"a": "/x,y=z", "b": "org/name"}
    assert load_settings(environ={"LIGHTWELL_LORA_MODULES": "a=/x,b=/y"}).lora_paths == {"a": "/x", "b": "/y"}
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
            assert settings.lora_paths == {"org/sql": "/a/x=y,z"}
    both = settings_from_flags("--lora-modules", '{"name":"a","path":"b"}', "--lora-modules", "c=d")
    assert both.lora_paths == {"a": "b", "c": "d"}


def test_what_is_no_adapter() -> None:
    for text in (
        *('{"name": "a"}', '{"path": "/a"}', '{"name": "a", "path": ""}', '{"name": "", "path": "/a"}'),
        *('{"name": "a=b", "path": "/a"}', '{"name": "a", "path": 5}', '{"name": "a", "path": "/a\\u0000"}'),
        *('{"name": "a", "path": "/a", "rank": 8}', '{"name": "a", "path": "/a"', '[{"name": "a", "path": "/a"}]'),
        *("{" * 100_000, '{"a":' * 100_000),
    ):
        with pytest.raises(SettingsError, match=r"^--lora-modules: expected NAME=PATH with a NAME of letters"):
            settings_from_flags("--lora-modules", text)
