"""Accepted and rejected values of every setting, as text, and settings as the command line reads them."""

import math
from typing import Any

from server.cli.main import make_parser
from server.settings.load import load_settings
from server.settings.table import Settings

TextAndValue = tuple[str, Any]

# The least and the greatest value that is accepted.
LIMITS: dict[str, tuple[float, float]] = {
    **{name: (0, 2**31 - 1) for name in ("max_stored_responses", "record_requests", "long_prefill_token_threshold")},
    **{name: (1, 2**31 - 1) for name in ("max_queued_requests", "default_max_tokens", "max_model_len")},
    **{name: (1, 64) for name in ("api_server_count", "data_parallel_size", "tensor_parallel_size")},
    **{name: (0.1, 86_400.0) for name in ("queue_timeout", "request_timeout", "step_timeout")},
    "drain_timeout": (0.0, 86_400.0),
    "gpu_memory_utilization": (0.01, 1.0),
    "idle_unload": (1.0, 30 * 86_400.0),
    "max_logprobs": (-1, 2**31 - 1),
    "max_lora_rank": (1, 4096),
    "max_loras": (1, 1024),
    "max_num_batched_tokens": (1, 2**31 - 1),
    "max_num_seqs": (1, 65_536),
    "max_step_ms": (1.0, 60_000.0),
    "port": (0, 65_535),
    "seed": (-(2**63), 2**63 - 1),
}
LEAST_SIZES = {"max_body_size": 1024, "max_buffered_bytes": 1024, "stored_responses_memory": 0}
LEAST_SIZES["kv_cache_memory"] = 1 << 20
CHOICES = {  # the default is not the first
    "load": ("on-first-use", "at-start"),
    "dtype": ("bfloat16", "float32", "float16", "auto"),
    "quantization": ("int8", "none", "auto"),
    "pooling": ("last", "mean"),
    "on_engine_death": ("exit", "restart"),
    "cpu_affinity": ("auto", "none"),
    "kv_cache_dtype": ("int8", "fp8", "auto"),
    "speculative": ("off", "ngram", "auto"),
    "log_level": ("debug", "error", "warning", "info"),
    "log_format": ("json", "human"),
    "device": ("cpu", "cuda:1", "cuda", "auto"),
}
SWITCHES = {  # and their defaults
    **dict.fromkeys(("isolate_keys", "inspect", "enable_docs", "enable_prefix_caching", "batch_invariant"), True),
    **dict.fromkeys(("public_metrics", "one_tenant", "inspect_public", "allow_unauthenticated", "strict"), False),
    **dict.fromkeys(("allow_additional_properties", "enforce_eager", "allow_slow_kernels"), False),
    "allow_runtime_lora_updating": False,
}
TEXTS = ("model", "uds", "ssl_certfile", "ssl_keyfile", "api_keys_file", "chat_template")
# Others: accepted texts with their values, and rejected texts.
OTHERS: dict[str, tuple[list[TextAndValue], list[str]]] = {
    "models": ([("org/name", ({"model": "org/name"},)), ("x.gguf", ({"model": "x.gguf"},))], ["", " ", "a\nb"]),
    "host": ([("localhost", "localhost"), ("::1", "::1")], ["", "\t"]),
    "served_model_name": ([("gpt-4", ("gpt-4",)), ("a/b", ("a/b",))], ["", " "]),
    "score_tokens": ([("yes,no", "yes,no"), ("1,0", "1,0")], ["yes", "yes,no,maybe", "yes, no"]),
    "default_sampling": (
        [
            ("temperature=0.2,top_p=0.9", {"temperature": 0.2, "top_p": 0.9}),
            ('{"temperature": 0.2, "samplers": ["top_k"]}', {"temperature": 0.2, "samplers": ["top_k"]}),
        ],
        ["", "temperature", "temperature=", "temperature=x", "top_p=1,top_p=1", "{", "[1]", "NONE"],
    ),
    "block_size": ([("16", 16), ("128", 128), ("64", 64)], ["17", "8", "", "256"]),
    "root_path": ([("/llm", "/llm"), ("/a/b-c", "/a/b-c")], ["llm", "/", "/llm/", "/a b", "/a?b"]),
    "forwarded_allow_ips": (
        [("10.1.2.3/8", ("10.0.0.0/8",)), ("*", ("*",))],
        ["proxy", "10.0.0.256", "10.0.0.0/33", ""],
    ),
    "api_key": ([("sk-one", ("sk-one",)), (" sk two ", ("sk two",))], ["", "  ", "sk-ü", "a\tb"]),
    "admin_key": ([("sk-admin", "sk-admin"), (" sk two ", "sk two")], ["", " ", "a\nb", "sk-ü"]),
    "allowed_origins": (
        [("*", ("*",)), ("https://example.org:8443", ("https://example.org:8443",))],
        ["example.org", "https://example.org/", ""],
    ),
    "lora_modules": (
        [("sql=/a/sql", ("sql=/a/sql",)), ("a/b@1=org/name:x.gguf", ("a/b@1=org/name:x.gguf",))],
        [
            *("", "/a/sql", "=/a/sql", "sql=", "sql= ", "s q=/a", "a=/\0", "a" * 129 + "=/a", "{", "{}"),
            *('{"name": "a"}', '{"path": "/a"}', '{"name": "a", "path": ""}', '{"name": "", "path": "/a"}'),
            *('{"name": "a=b", "path": "/a"}', '{"name": "a", "path": 5}', '{"name": "a", "path": "/a\\u0000"}'),
            *('{"name": "a", "path": "/a", "rank": 8}', '{"name": "a", "path": "/a"', '[{"name": "a", "path": "/a"}]'),
            *("{" * 100_000, '{"a":' * 100_000),
        ],
    ),
    "otlp_endpoint": (
        [(url, url) for url in ("http://localhost:4318", "https://[::1]:4318/a/v1/traces")],
        [
            *("localhost:4318", "grpc://localhost:4317", "http://", "http://a:0", "http://a:65536", "http://a:x", ""),
            *("http://[::1", "http://user:secret@a", "http://a?b=c", "http://a#b", "http://a/b c"),
        ],
    ),
    "metrics_prefix": ([("vllm:", "vllm:"), ("a_1", "a_1")], ["1a", "a-b", ""]),
}


def _numbers(name: str, low: float, high: float) -> tuple[list[TextAndValue], list[str]]:
    if name == "seed" or isinstance(low, int):
        return [(str(high), high), (str(low), low)], [str(low - 1), str(high + 1), "1.5", "x", "", "٣"]
    outside = [repr(math.nextafter(low, -1.0)), repr(math.nextafter(high, math.inf))]
    return [(str(high), high), (str(low), low)], [*outside, "nan", "inf", "2m", "-1"]


def _sizes(least: int) -> tuple[list[TextAndValue], list[str]]:
    accepted = [("1.5GiB", 3 << 29), ("3MB", 3_000_000), (str(least), least), ("2k", 2048), ("9 MiB", 9 << 20)]
    accepted = [case for case in accepted if case[1] >= least]
    return accepted, [str(least - 1), "10 apples", "1e9", "9999999TiB", "1GG", "-1MiB", ""]


def _switch(default: bool) -> tuple[list[TextAndValue], list[str]]:
    words = {True: ("true", "on", "yes", "1", "True"), False: ("false", "off", "no", "0", "False")}
    accepted = [(word, value) for value in (not default, default) for word in words[value]]
    return accepted, ["maybe", "", "2", "none"]


CASES = {
    **{name: _numbers(name, *limits) for name, limits in LIMITS.items()},
    **{name: _sizes(least) for name, least in LEAST_SIZES.items()},
    **{name: ([(each, each) for each in all_], ["", all_[0].upper(), "x", "none "]) for name, all_ in CHOICES.items()},
    **{name: _switch(default) for name, default in SWITCHES.items()},
    **{name: ([("/a/b.x", "/a/b.x"), ("::1", "::1")], ["", " ", "a\nb"]) for name in TEXTS},
    **OTHERS,
}
# For each setting: texts that are accepted, and their values. The first is neither the default nor the last.
VALID = {name: accepted for name, (accepted, _) in CASES.items()}
INVALID = {name: rejected for name, (_, rejected) in CASES.items()}
# The settings in a few groups, by how their cases are made.
KINDS = {"numbers": list(LIMITS), "sizes": list(LEAST_SIZES), "choices": list(CHOICES), "switches": list(SWITCHES)}
KINDS |= {"texts": list(TEXTS), "others": list(OTHERS)}


def settings_from_flags(*argv: str) -> Settings:
    """Return the settings that `lightwell serve` reads from its flags alone."""
    return load_settings(vars(make_parser().parse_args(["serve", *argv])))
