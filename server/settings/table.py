"""The table of settings. Flags, environment variables, config file keys, help and documentation are made from it.

A setting is a field of `Settings` with its name, type and default, annotated with a `Setting`: the type of its values
and its help text. There is a class for each group. For a setting of a part, that stands in the part's module
`settings`. The flag `--max-num-seqs`, the variable `LIGHTWELL_MAX_NUM_SEQS` and the key `max-num-seqs` of a YAML file
are the same setting; a flag overrides the environment, and the environment the file.
"""

import dataclasses
from collections.abc import Mapping
from inspect import get_annotations
from typing import Annotated, Any, ClassVar

import msgspec

from engine.shared.parts import MissingPartError
from server.part_table import PARTS, load_module, why_missing
from server.settings.sampling import SAMPLING
from server.settings.setting import (
    ACCESS,
    API,
    BOOLEAN,
    ENGINE,
    GROUPS,
    HEADER_KEY,
    INT64,
    LIMITS,
    LOGS,
    MEMORY,
    MODELS,
    ExplainedError,
    Setting,
    ValueType,
    choice,
    integer,
    many,
    networks,
    non_empty_text,
    nothing,
    number,
    pattern,
    seconds,
    size,
    text,
)

CONFIG_VARIABLE = "LIGHTWELL_CONFIG"

OTHER_VARIABLES = {
    CONFIG_VARIABLE: "Same as `--config`.",
    "LIGHTWELL_CACHE": "Folder for downloaded models and compiled kernels. Default: `lightwell` in the user's cache "
    "folder.",
    "LIGHTWELL_TEST_MODEL": "GGUF file that the tests use instead of downloading one.",
}

REPEAT_LORA_MODULES = "repeat --lora-modules for each adapter"


def _models(value: object) -> tuple[dict[str, Any], ...]:
    """Return an entry for each model: a part reads those that are mappings of `model` and settings of its own."""
    entries = value if isinstance(value, list | tuple) else [value]
    if not any(isinstance(entry, dict) for entry in entries):
        return tuple({"model": non_empty_text(entry)} for entry in entries)
    try:
        found: tuple[dict[str, Any], ...] = load_module("models", "entries").parse(entries)
    except MissingPartError as error:
        raise ExplainedError(str(error)) from None
    return found


_MODEL = "a model, or a mapping with the key model and settings of its own"
MODEL_ENTRIES = ValueType(_MODEL, _models, "MODEL", is_list=True)
_ORIGIN = r"\*|[a-z][a-z0-9+.-]*://[^/\s]+"


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that say which models are served."""

    group: ClassVar[str] = MODELS

    model: Annotated[
        str,
        Setting(
            text("MODEL"),
            "Alias (smollm2-135m, qwen3:4b), GGUF file, folder with config.json and safetensors files, or Hugging Face "
            "id (org/name, org/name:Q4_K_M, org/name:file.gguf, org/name@revision).",
            positional=True,
        ),
    ] = "smollm2-135m"
    models: Annotated[
        tuple[dict[str, Any], ...],
        Setting(
            MODEL_ENTRIES,
            "Model to serve. Can be repeated: each model has its own engine. In a "
            "config file, the list `models` can give each its own settings (docs/models.md).",
            singular="model",
        ),
    ] = ()
    served_model_name: Annotated[
        tuple[str, ...],
        Setting(
            many(text("NAME")),
            "Name of the model in the API. Can be repeated. Unset: the alias, or the last part of MODEL.",
        ),
    ] = ()
    chat_template: Annotated[
        str | None, Setting(text("FILE"), "Jinja chat template to use instead of the model's own.")
    ] = None
    load: str = "at-start"
    idle_unload: float | None = None


class EngineSettings(ModelSettings, frozen=True, kw_only=True):
    """The settings that say how they run."""

    group: ClassVar[str] = ENGINE

    device: Annotated[
        str,
        Setting(
            pattern("auto, cpu, cuda or cuda:N", r"auto|cpu|cuda(:\d+)?", "DEVICE"),
            "Device to run on: auto, cpu, cuda or cuda:N.",
        ),
    ] = "auto"
    data_parallel_size: int = 1
    tensor_parallel_size: Annotated[
        int, Setting(integer(1, 64), "Number of processes that run the model together, a part of it each.")
    ] = 1
    cpu_affinity: Annotated[
        str, Setting(choice("MODE", "none", "auto"), "auto: each of these processes has cores of its own.")
    ] = "none"
    dtype: Annotated[
        str, Setting(choice("DTYPE", "auto", "float32", "bfloat16", "float16"), "Data type of the computation.")
    ] = "auto"
    quantization: Annotated[
        str,
        Setting(
            choice("QUANTIZATION", "auto", "none", "int8"),
            "Format of the weights in memory. auto: as in the file; none: unpacked to --dtype; int8: 8-bit integers "
            "with one scale per 32 weights.",
        ),
    ] = "auto"
    pooling: str = "mean"
    score_tokens: str | None = None
    seed: Annotated[
        int | None, Setting(INT64, "Seed for requests that do not set one. Unset: a random seed for each request.")
    ] = None
    default_sampling: Annotated[
        dict[str, Any] | str | None,
        Setting(
            SAMPLING,
            "Sampling fields for requests that do not send them, as temperature=0.2,top_p=0.9 or JSON; a config file "
            "can also map model names to fields. none: OpenAI's defaults. Unset: as the model recommends.",
        ),
    ] = None


class ApiSettings(EngineSettings, frozen=True, kw_only=True):
    """The settings that say where the server listens, and what it serves."""

    group: ClassVar[str] = API

    host: Annotated[
        str,
        Setting(
            text("HOST"),
            "Address to listen on, such as 0.0.0.0 for all of IPv4 or :: for all of IPv6 and IPv4. Addresses other "
            "than loopback require an API key or --allow-unauthenticated.",
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Setting(integer(0, 65535), "Port to listen on; 0 selects a free port.")] = 8000
    uds: Annotated[
        str | None,
        Setting(
            text("PATH"),
            "UNIX socket to listen on, instead of --host and --port. The user and the group of the server may connect.",
        ),
    ] = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    api_server_count: int = 1
    root_path: Annotated[
        str,
        Setting(
            pattern("a path such as /llm", r"(/[\w.~-]+)+", "PATH"),
            "Prefix of all paths, as clients see them. A proxy in front may remove it or leave it.",
        ),
    ] = ""
    forwarded_allow_ips: Annotated[
        tuple[str, ...],
        Setting(
            networks("ADDRESS"),
            "Address or network of a proxy whose X-Forwarded-For names the client; * trusts every peer, also on a UNIX "
            "socket. Can be repeated.",
        ),
    ] = ()
    allow_additional_properties: Annotated[
        bool,
        Setting(
            BOOLEAN,
            "Allow properties that a JSON schema does not name in objects for which it has properties, but no "
            "additionalProperties, as JSON Schema specifies. By default such objects are closed.",
        ),
    ] = False
    enable_docs: Annotated[bool, Setting(BOOLEAN, "Serve /openapi.json, and the page /docs that shows it.")] = True
    strict: Annotated[bool, Setting(BOOLEAN, "Reject requests that contain unknown fields.")] = False


class AccessSettings(ApiSettings, frozen=True, kw_only=True):
    """The settings that say who may use it."""

    group: ClassVar[str] = ACCESS

    api_key: Annotated[
        tuple[str, ...],
        Setting(
            many(HEADER_KEY),
            "API key that clients must send. Can be repeated. Other users of the machine can see flags: prefer the "
            "environment or the config file.",
            secret=True,
        ),
    ] = ()
    api_keys_file: str | None = None
    admin_key: Annotated[
        str | None,
        Setting(
            HEADER_KEY,
            "API key that loading of LoRA adapters, /metrics and the usage of all clients require. Unset: a single "
            "--api-key is one, and of several none.",
            secret=True,
        ),
    ] = None
    public_metrics: Annotated[bool, Setting(BOOLEAN, "Serve /metrics without an API key.")] = False
    one_tenant: Annotated[
        bool,
        Setting(
            BOOLEAN,
            "Treat several --api-key as keys of one client, for example while a key is replaced. By default, each is a "
            "client of its own.",
        ),
    ] = False
    isolate_keys: Annotated[
        bool,
        Setting(
            BOOLEAN,
            "Keep cached prefixes of clients with different keys apart, so that no client learns from the times of its "
            "requests what others send.",
        ),
    ] = True
    allow_unauthenticated: Annotated[
        bool, Setting(BOOLEAN, "Allow listening on addresses other than loopback without an API key.")
    ] = False
    allowed_origins: Annotated[
        tuple[str, ...],
        Setting(
            many(pattern("an origin such as https://example.org, or *", _ORIGIN, "ORIGIN")),
            "Origin whose web pages may call the API (CORS); * allows any. Can be repeated.",
        ),
    ] = ()

    inspect: bool = True
    inspect_public: bool = False

    @property
    def needs_key(self) -> bool:
        """True if requests need an API key."""
        return bool(self.api_key) or self.api_keys_file is not None or self.admin_key is not None


class LimitSettings(AccessSettings, frozen=True, kw_only=True):
    """The settings that say how much clients may ask of it."""

    group: ClassVar[str] = LIMITS

    max_queued_requests: Annotated[
        int, Setting(integer(1), "Maximum number of queued requests; further ones get status 429.")
    ] = 256
    max_body_size: Annotated[int, Setting(size(1024), "Maximum size of a request body.")] = 10 << 20
    max_buffered_bytes: Annotated[
        int,
        Setting(
            size(1024),
            "Memory limit for the bodies of all requests together, until their responses begin, and another one for "
            "all answers that are not read yet. When it is exceeded, bodies that have been arriving for the longest "
            "time and the largest answers get status 503. No body and no answer can be larger.",
        ),
    ] = 256 << 20
    max_stored_responses: int = 1000
    stored_responses_memory: int = 64 << 20
    record_requests: int = 0
    default_max_tokens: Annotated[
        int | None,
        Setting(
            integer(1),
            "Maximum number of output tokens for requests that do not set one. Unset: the rest of the context, and 16 "
            "for /v1/completions.",
        ),
    ] = None
    max_logprobs: Annotated[
        int, Setting(integer(-1), "Maximum number of top log probabilities per token; -1: the whole vocabulary.")
    ] = 20
    queue_timeout: Annotated[
        float,
        Setting(
            seconds(0.1),
            "Time that a request may wait until the engine begins with it, in seconds; then it gets status 503. A "
            "request whose predicted wait is longer gets status 429 at once. A request can ask for less.",
        ),
    ] = 120.0
    request_timeout: Annotated[
        float | None,
        Setting(
            seconds(0.1), "Time that a request may take in all, in seconds; then it gets status 503. Unset: no limit."
        ),
    ] = None
    drain_timeout: Annotated[
        float, Setting(seconds(0), "Time that running requests have to finish at shutdown, in seconds.")
    ] = 30.0
    step_timeout: Annotated[
        float,
        Setting(seconds(0.1), "Time after which an engine step, or the API process, is considered hung, in seconds."),
    ] = 60.0
    on_engine_death: Annotated[
        str,
        Setting(
            choice("ACTION", "restart", "exit"),
            "What happens when the engine dies or hangs after it has been ready. restart: it is started again, and "
            "requests without a token wait for it; after five deaths in a minute the server exits. exit: the server "
            "exits with code 1, for a supervisor that starts it elsewhere.",
        ),
    ] = "restart"


class MemorySettings(LimitSettings, frozen=True, kw_only=True):
    """The settings that say how memory is used, and steps are scheduled."""

    group: ClassVar[str] = MEMORY

    max_model_len: Annotated[
        int | None,
        Setting(
            integer(1),
            "Maximum length of prompt and output together, in tokens. Unset: the model's, or what memory holds.",
        ),
    ] = None
    max_num_seqs: Annotated[int, Setting(integer(1, 65536), "Maximum number of sequences per engine step.")] = 128
    max_num_batched_tokens: Annotated[
        int | None,
        Setting(
            integer(1),
            "Maximum number of tokens computed per engine step. Unset: 256 on a CPU, 8192 on a GPU, at least "
            "--max-num-seqs.",
        ),
    ] = None
    long_prefill_token_threshold: Annotated[
        int, Setting(integer(0), "Maximum number of prompt tokens of one request per engine step; 0 means no limit.")
    ] = 0
    max_step_ms: Annotated[
        float | None,
        Setting(
            number(1, 60_000),
            "Time that an engine step should take at most while a stream is decoding, in milliseconds. Prompts are cut "
            "into smaller chunks, of at least 16 tokens, by the measured time of recent steps; with --batch-invariant, "
            "answers do not depend on the chunks. Unset: 100 on a GPU, no limit on a CPU.",
        ),
    ] = None
    block_size: Annotated[int, Setting(choice("N", 16, 32, 64, 128), "Number of tokens per block of the KV cache.")] = (
        32
    )
    enable_prefix_caching: Annotated[
        bool, Setting(BOOLEAN, "Reuse the KV cache of earlier prompts for prompts with the same prefix.")
    ] = True
    kv_cache_dtype: Annotated[
        str,
        Setting(
            choice("DTYPE", "auto", "int8", "fp8"),
            "Data type of the KV cache: that of the computation, or 8 bits with a scale (fp8: on GPUs, less precise).",
        ),
    ] = "auto"
    kv_cache_memory: Annotated[
        int | None,
        Setting(
            size(1 << 20),
            "Memory for the KV caches of all engines, such as 2GiB. Unset: depends on the device and the model.",
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float,
        Setting(
            number(0.01, 1),
            "Share of a GPU's memory that the server may use, for weights, activations and KV cache together; about "
            "500 MB of CUDA's own are not counted. --kv-cache-memory overrides it.",
        ),
    ] = 0.9
    speculative: Annotated[
        str,
        Setting(
            choice("MODE", "auto", "ngram", "off"),
            "Speculative decoding: draft tokens from the text so far and verify several in one step. Answers are the "
            "same with and without it while --batch-invariant is on. auto: only on a CPU; ngram: always.",
        ),
    ] = "auto"
    enforce_eager: Annotated[bool, Setting(BOOLEAN, "Launch GPU kernels one by one instead of as CUDA graphs.")] = False
    allow_slow_kernels: Annotated[
        bool, Setting(BOOLEAN, "Start on a GPU where Triton does not work, with much slower kernels.")
    ] = False
    batch_invariant: Annotated[
        bool,
        Setting(
            BOOLEAN,
            "Give the same request the same answer in any batch, bit for bit. Turning it off lets a GPU use its "
            "vendor's matrix multiplication, and torch's flash attention for prompts; a CPU gains nothing.",
        ),
    ] = True


class Settings(MemorySettings, frozen=True, kw_only=True):
    """All settings of `lightwell serve`. None means that the default depends on the model and the device."""

    group: ClassVar[str] = LOGS

    lora_modules: tuple[str, ...] = ()
    max_loras: int = 8
    max_lora_rank: int | None = None
    allow_runtime_lora_updating: bool = False
    log_level: Annotated[
        str, Setting(choice("LEVEL", "debug", "info", "warning", "error"), "Minimum severity of logged messages.")
    ] = "info"
    log_format: Annotated[str, Setting(choice("FORMAT", "human", "json"), "Format of log messages.")] = "human"
    otlp_endpoint: str | None = None
    metrics_prefix: Annotated[
        str,
        Setting(
            pattern("letters, digits, _ and :, not starting with a digit", r"[a-zA-Z_:][a-zA-Z0-9_:]*", "PREFIX"),
            "Prefix of metric names. Use vllm: for dashboards made for vLLM.",
        ),
    ] = "lightwell_"

    @property
    def each_model(self) -> list["Settings"]:
        """The settings of each model, which its entry in `models` changes."""
        if not self.models:
            return [self]
        shared = msgspec.to_builtins(self) | {"models": ()}
        return [msgspec.convert(shared | entry, Settings) for entry in self.models]

    @property
    def unloads_models(self) -> bool:
        """True if models are loaded and unloaded while the server runs: there are several, or one that is not kept."""
        return bool(self.models) or self.load != "at-start" or self.idle_unload is not None

    @property
    def lora_names(self) -> list[str]:
        """Names of the adapters to load at startup, repeated ones included."""
        return [module.partition("=")[0] for module in self.lora_modules]

    @property
    def max_loaded_adapters(self) -> int:
        """Number of adapters that can be loaded at a time: 0 if LoRA is not enabled."""
        return self.max_loras if self.lora_modules or self.allow_runtime_lora_updating else 0

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        shown["api_key"] = f"<{len(self.api_key)} keys>"
        shown["admin_key"] = None if self.admin_key is None else "<a key>"
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _of_parts() -> dict[str, Setting]:
    """Return the settings of the parts by name. Those of a part that is missing accept no value and are not shown."""
    found: dict[str, Setting] = {}
    for name, part in PARTS.items():
        if part.settings and (error := why_missing(name)) is not None:
            # In a group that the settings of one model have too: the reason is the same there.
            found |= dict.fromkeys(part.settings, Setting(nothing(str(error)), "", group=ENGINE))
        elif part.settings:
            module = load_module(name, "settings")
            found |= {name: dataclasses.replace(row, group=module.GROUP) for name, row in module.SETTINGS.items()}
    return found


def _table() -> dict[str, Setting]:
    found, kinds = _of_parts(), list[Any](Settings.__mro__)
    for kind in kinds[: kinds.index(msgspec.Struct)]:
        for name, hint in get_annotations(kind).items():
            for row in getattr(hint, "__metadata__", ()):
                found[name] = dataclasses.replace(row, group=kind.group)
    defaults = {field.name: field.default for field in msgspec.structs.fields(Settings)}
    settings = [dataclasses.replace(found[name], name=name, default=default) for name, default in defaults.items()]
    return {setting.name: setting for setting in sorted(settings, key=lambda setting: GROUPS.index(setting.group))}


SETTINGS: Mapping[str, Setting] = _table()
