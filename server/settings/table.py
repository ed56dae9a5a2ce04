"""The one table of settings: it feeds flags, environment, configuration file, help and README.

A setting is a field of `Settings`: its name, type and default stand there once, and a `Setting` beside them says how
a value is read and what it means. `--max-num-seqs`, `LIGHTWELL_MAX_NUM_SEQS` and the key `max-num-seqs` of a YAML file
are the same setting; a flag wins over the environment, the environment over the file. `python -m server.settings.table`
prints the table of the README.
"""

import dataclasses
import ipaddress
import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_type_hints

import msgspec

from server.settings.kinds import (
    BOOLEAN,
    ENV_PREFIX,
    INT64,
    Setting,
    SettingsError,
    choice,
    int_choice,
    integer,
    named_paths,
    pattern,
    seconds,
    size,
    text,
    texts,
)

if TYPE_CHECKING:
    from engine.config import EngineConfig

CONFIG_VARIABLE = "LIGHTWELL_CONFIG"

OTHER_VARIABLES = {
    CONFIG_VARIABLE: "The same as `--config`.",
    "LIGHTWELL_CACHE": "Folder for fetched models and compiled kernels. Default: `lightwell` in the user's cache.",
    "LIGHTWELL_TEST_MODEL": "A GGUF file that the tests use instead of fetching one.",
}


ADAPTER_NAME = r"[\w./:@+-]{1,128}"  # no comma and no =, which would end it in lists of adapters

_ORIGIN = r"\*|[a-z][a-z0-9+.-]*://[^/\s]+"
_API, _LIMITS, _ENGINE, _MEMORY, _LOGS = "API", "Limits", "Engine", "Memory and scheduling", "Logs and metrics"
_LORA = "LoRA adapters"
REPEAT_LORA_MODULES = "each adapter has a --lora-modules of its own"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `lightwell serve` can be told. None means: chosen by model and device."""

    model: Annotated[
        str,
        Setting(
            _ENGINE,
            text("MODEL"),
            "An alias (smollm2-135m), a GGUF file, a folder with config.json and safetensors, or a Hugging Face id "
            "(org/name, org/name@revision, org/name:file.gguf).",
            positional=True,
        ),
    ] = "smollm2-135m"
    device: Annotated[
        str,
        Setting(
            _ENGINE,
            pattern("auto, cpu, cuda or cuda:N", r"auto|cpu|cuda(:\d+)?", "DEVICE"),
            "Where to run: auto, cpu, cuda, cuda:N.",
        ),
    ] = "auto"
    dtype: Annotated[
        str,
        Setting(
            _ENGINE, choice("DTYPE", "auto", "float32", "bfloat16", "float16"), "Number format of the computation."
        ),
    ] = "auto"
    quantization: Annotated[
        str,
        Setting(
            _ENGINE,
            choice("QUANTIZATION", "auto", "none", "int8"),
            "How weights are kept: as the model's file has them, unpacked to dtype, or in 8 bits with a scale for 32.",
        ),
    ] = "auto"
    pooling: Annotated[
        str,
        Setting(
            _ENGINE,
            choice("HOW", "mean", "last"),
            "What /v1/embeddings makes of a text's last hidden states: their mean, or that of the last token.",
        ),
    ] = "mean"
    seed: Annotated[
        int | None,
        Setting(_ENGINE, INT64, "Seed of requests that bring none. Unset: a random one for each."),
    ] = None

    host: Annotated[str, Setting(_API, text("HOST"), "Address to listen on. Beyond loopback an API key is needed.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Setting(_API, integer(0, 65535), "Port to listen on; 0 takes a free one.")] = 8000
    api_key: Annotated[
        tuple[str, ...],
        Setting(
            _API,
            texts("KEY", "a key that is not empty"),
            "Key that clients must send. May be given again. Other users of the machine can read flags: prefer the "
            "environment or a file.",
            secret=True,
        ),
    ] = ()
    allow_unauthenticated: Annotated[bool, Setting(_API, BOOLEAN, "Listen beyond loopback without an API key.")] = False
    allowed_origins: Annotated[
        tuple[str, ...],
        Setting(
            _API,
            pattern("an origin such as https://example.org, or *", _ORIGIN, "ORIGIN", is_list=True),
            "Origin whose web pages may call the API (CORS); * is any. May be given again.",
        ),
    ] = ()
    served_model_name: Annotated[
        tuple[str, ...],
        Setting(
            _API, texts("NAME"), "Name of the model in the API. May be given again. Unset: alias or last part of MODEL."
        ),
    ] = ()
    chat_template: Annotated[
        str | None,
        Setting(_API, text("FILE"), "Jinja template of chat prompts, in the place of the model's own."),
    ] = None
    enable_docs: Annotated[
        bool,
        Setting(_API, BOOLEAN, "Serve /openapi.json, and at /docs a page of it that loads its scripts from a CDN."),
    ] = False
    strict: Annotated[bool, Setting(_API, BOOLEAN, "Refuse request fields that are unknown.")] = False

    max_queued_requests: Annotated[
        int, Setting(_LIMITS, integer(1), "Requests that may wait; more are answered 429.")
    ] = 256
    max_body_size: Annotated[int, Setting(_LIMITS, size(1024), "Size of a request's body at most.")] = 10 << 20
    max_stored_responses: Annotated[
        int,
        Setting(_LIMITS, integer(0), "Answers of /v1/responses that are kept in memory to be asked for; 0 keeps none."),
    ] = 1000
    stored_responses_memory: Annotated[
        int,
        Setting(
            _LIMITS,
            size(0),
            "Size of them, their conversations and their events at most; those unused for longest are dropped.",
        ),
    ] = 64 << 20
    record_requests: Annotated[
        int,
        Setting(
            _LIMITS,
            integer(0),
            "Ended requests that are kept in memory for /v1/requests/{id}/replay; 0 keeps none. Else all requests "
            "compute log probabilities, asked for or not.",
        ),
    ] = 0
    max_logprobs: Annotated[
        int, Setting(_LIMITS, integer(-1), "Alternatives of a token in log probabilities at most; -1: all tokens.")
    ] = 20
    drain_timeout: Annotated[
        float, Setting(_LIMITS, seconds(0), "Seconds that running requests get to finish at shutdown.")
    ] = 30.0
    step_timeout: Annotated[
        float, Setting(_LIMITS, seconds(0.1), "Seconds after which a step of the engine counts as hung.")
    ] = 60.0

    max_model_len: Annotated[
        int | None, Setting(_MEMORY, integer(1), "Tokens of prompt and output at most. Unset: what the model can.")
    ] = None
    max_num_seqs: Annotated[int, Setting(_MEMORY, integer(1, 65536), "Sequences in one step at most.")] = 128
    max_num_batched_tokens: Annotated[
        int | None, Setting(_MEMORY, integer(1), "Tokens computed in one step at most. Unset: by device.")
    ] = None
    long_prefill_token_threshold: Annotated[
        int, Setting(_MEMORY, integer(0), "Prompt tokens of one request in one step at most; 0 is no limit.")
    ] = 0
    block_size: Annotated[
        int, Setting(_MEMORY, int_choice(16, 32, 64, 128), "Tokens in one block of the KV cache.")
    ] = 32
    enable_prefix_caching: Annotated[
        bool, Setting(_MEMORY, BOOLEAN, "Keep the KV cache of prompts for later prompts that begin alike.")
    ] = True
    kv_cache_dtype: Annotated[
        str,
        Setting(
            _MEMORY,
            choice("DTYPE", "auto", "int8"),
            "Number format of the KV cache: that of the computation, or 8 bits with a scale for each token and head.",
        ),
    ] = "auto"
    kv_cache_memory: Annotated[
        int | None, Setting(_MEMORY, size(1 << 20), "Memory for the KV cache. Unset: by device and model.")
    ] = None
    speculative: Annotated[
        str,
        Setting(
            _MEMORY,
            choice("MODE", "auto", "ngram", "off"),
            "Guess tokens from the text so far and check several in one step, which changes no answer; "
            "auto does it where it pays.",
        ),
    ] = "auto"
    enforce_eager: Annotated[
        bool, Setting(_MEMORY, BOOLEAN, "Launch a GPU's kernels one by one rather than as CUDA graphs.")
    ] = False
    batch_invariant: Annotated[
        bool,
        Setting(
            _MEMORY,
            BOOLEAN,
            "The same request gets the same answer in any batch, bit for bit. Without it, a GPU takes the products of "
            "its vendor's library; a CPU has nothing faster.",
        ),
    ] = True

    lora_modules: Annotated[
        tuple[str, ...],
        Setting(
            _LORA,
            named_paths("NAME=PATH, the name of letters, digits and _./:@+-", ADAPTER_NAME),
            "NAME=PATH (or vLLM's JSON) of a LoRA adapter to load at start: its name in the API, and a folder in "
            "PEFT's format, a GGUF file, or a Hugging Face id of either. May be given again.",
        ),
    ] = ()
    max_loras: Annotated[
        int,
        Setting(
            _LORA,
            integer(1, 1024),
            "Adapters loaded at a time at most. One step may hold all of them (vLLM's counts those of one step, and "
            "keeps more on the CPU).",
        ),
    ] = 8
    max_lora_rank: Annotated[
        int | None,
        Setting(_LORA, integer(1, 4096), "Rank of adapters at most. Unset: that of --lora-modules, at least 16."),
    ] = None
    allow_runtime_lora_updating: Annotated[
        bool,
        Setting(
            _LORA,
            BOOLEAN,
            "Let clients load and unload adapters (/v1/load_lora_adapter, /v1/unload_lora_adapter), from any folder "
            "that the server can read, or from Hugging Face, where the server downloads them.",
        ),
    ] = False

    log_level: Annotated[
        str, Setting(_LOGS, choice("LEVEL", "debug", "info", "warning", "error"), "Least severity that is logged.")
    ] = "info"
    log_format: Annotated[str, Setting(_LOGS, choice("FORMAT", "human", "json"), "How it is logged.")] = "human"
    metrics_prefix: Annotated[
        str,
        Setting(
            _LOGS,
            pattern("letters, digits, _ and :, not a digit first", r"[a-zA-Z_:][a-zA-Z0-9_:]*", "PREFIX"),
            "What names of metrics begin with; vllm: fits dashboards made for vLLM.",
        ),
    ] = "lightwell_"

    @property
    def lora_paths(self) -> dict[str, str]:
        """The adapters to load at start: name -> where it is."""
        return dict(_name_and_path(module) for module in self.lora_modules)

    @property
    def num_lora_places(self) -> int:
        """Adapters that may be loaded at a time: none where nobody could load one."""
        return self.max_loras if self.lora_modules or self.allow_runtime_lora_updating else 0

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        shown["api_key"] = f"<{len(self.api_key)} keys>"
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _name_and_path(module: str) -> tuple[str, str]:
    name, _, path = module.partition("=")
    return name, path


class ApiProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor hands the API process on its standard input, as JSON."""

    settings: Settings
    engine_address: str  # ZeroMQ address (ipc://...) that the engine binds
    model_path: str
    model_names: tuple[str, ...]  # names of the model in the API, at least one
    engine_pid: int | None = None  # lets it notice the end of an engine that was never ready


def _table() -> dict[str, Setting]:
    hints = get_type_hints(Settings, include_extras=True)
    defaults = {field.name: field.default for field in msgspec.structs.fields(Settings)}
    return {
        name: dataclasses.replace(hints[name].__metadata__[0], name=name, default=default)
        for name, default in defaults.items()
    }


SETTINGS: Mapping[str, Setting] = _table()


# Sources. Each yields (name, value, where it stands); values are parsed by the table.


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, object, str]]:
    names = {setting.variable: name for name, setting in SETTINGS.items()}
    ours = [variable for variable in environ if variable.startswith(ENV_PREFIX)]
    if unknown := sorted(set(ours) - set(names) - set(OTHER_VARIABLES)):
        raise SettingsError(_unknown_variables(unknown))
    for variable in ours:
        if name := names.get(variable):
            value = environ[variable]
            yield name, value.split(",") if SETTINGS[name].kind.is_list else value, variable


def _unknown_variables(variables: list[str]) -> str:
    message = f"unknown environment variables: {', '.join(variables)}"
    if any(re.search(r"_SERVICE_(HOST|PORT)|_PORT_\d+_", variable) for variable in variables):
        message += " (Kubernetes sets them for a Service called lightwell; enableServiceLinks: false turns that off)"
    return message


def _from_file(path: Path) -> Iterator[tuple[str, object, str]]:
    """Keys in kebab or snake case, each once; null leaves a setting as it is."""
    seen = set()
    for key, value in _load_yaml(path):
        name = key.replace("-", "_") if isinstance(key, str) else ""
        if name not in SETTINGS:
            raise SettingsError(f"{path}: unknown setting {key!r}")
        if name in seen:
            raise SettingsError(f"{path}: {key} stands there twice")
        seen.add(name)
        if value is not None:
            yield name, value, f"{path}: {key}"


def _load_yaml(path: Path) -> list[tuple[object, object]]:
    """The pairs of the file's one mapping, repeated keys included."""
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise SettingsError(f"{path}: expected a mapping of settings to values")
        return [
            (loader.construct_object(key, deep=True), loader.construct_object(value, deep=True))
            for key, value in root.value
        ]
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:  # its own text would quote the line, and a key with it
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise SettingsError(f"{path}: not YAML: line {line}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise SettingsError(f"{path}: not YAML: characters that cannot be") from None


def _from_flags(flags: Mapping[str, object]) -> Iterator[tuple[str, object, str]]:
    for name, value in flags.items():
        if name in SETTINGS:
            yield name, value, SETTINGS[name].flag


def load_settings(
    flags: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None, config: str | None = None
) -> Settings:
    """Read all sources; flags win over the environment, that over the file `config`, that over the defaults.

    `flags` holds text (or bools for switches) by name of setting. Raises SettingsError.
    """
    environ = environ or {}
    config = config or environ.get(CONFIG_VARIABLE)
    values = {}
    sources = (_from_file(Path(config)) if config else (), _from_environment(environ), _from_flags(flags or {}))
    for name, value, source in itertools.chain(*sources):
        values[name] = SETTINGS[name].read(value, source)
    settings = Settings(**values)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    if not (is_loopback(settings.host) or settings.api_key or settings.allow_unauthenticated):
        raise SettingsError(
            f"--host {settings.host} is reachable from other machines: "
            "set --api-key, or --allow-unauthenticated if everyone may use this server"
        )
    check_adapter_names(settings, settings.served_model_name)
    if len(settings.lora_modules) > settings.max_loras:
        raise SettingsError(
            f"--lora-modules names {len(settings.lora_modules)} adapters, but --max-loras is {settings.max_loras}"
        )


def check_adapter_names(settings: Settings, model_names: Collection[str]) -> None:
    """Raises SettingsError for an adapter that is called what another one or the model is called."""
    names = [_name_and_path(module)[0] for module in settings.lora_modules]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise SettingsError(f"--lora-modules: two adapters are called {name}")
        if name in model_names:
            raise SettingsError(f"--lora-modules: {name} is the name of the model; call the adapter something else")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. Names other than localhost count as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def engine_config(settings: Settings, model_path: Path, lora_paths: Mapping[str, Path]) -> "EngineConfig":
    """What the engine needs to know of the settings. `lora_paths` is where the adapters of --lora-modules are."""
    from engine.config import EngineConfig

    return EngineConfig(
        model_path=str(model_path),
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        kv_cache_dtype=settings.kv_cache_dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        block_size=settings.block_size,
        enable_prefix_caching=settings.enable_prefix_caching,
        kv_cache_memory=settings.kv_cache_memory,
        speculative=settings.speculative,
        batch_invariant=settings.batch_invariant,
        enforce_eager=settings.enforce_eager,
        lora_modules={name: str(path) for name, path in lora_paths.items()},
        max_loras=settings.num_lora_places,
        max_lora_rank=settings.max_lora_rank,
        step_timeout=settings.step_timeout,
    )


# The README's table.


def _row(setting: Setting) -> str:
    flag = f"`{setting.flag}`" + (f", `--no-{setting.key}`" if setting.default is True else "")
    default = f"`{setting.default_text}`" if setting.default_text else ""
    return f"| {flag} | {default} | {setting.text} |".replace("*", "\\*")


def markdown_table() -> str:
    """All settings by group, and the other variables that are read."""
    lines = []
    for group in dict.fromkeys(setting.group for setting in SETTINGS.values()):
        lines += [f"| {group} | default | |", "|---|---|---|"]
        lines += [_row(setting) for setting in SETTINGS.values() if setting.group == group]
        lines.append("")
    lines += ["| Other variables | |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in OTHER_VARIABLES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown_table(), end="")
