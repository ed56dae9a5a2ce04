"""What the engine and the model are set to. Frozen; all reading of model metadata happens here.

`load_model_config` turns the metadata of a GGUF file or of a folder with `config.json` into a `ModelConfig`, under
Hugging Face's names, so that the model never guesses. No torch.
"""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from engine.gguf import GGUFFile


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to run one model. None means: choose by device and model."""

    model_path: str  # a GGUF file, or a folder with config.json and safetensors
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    max_model_len: int | None = None  # tokens; None: what the model was trained for
    max_num_seqs: int = 128
    max_num_batched_tokens: int | None = None  # tokens a step computes at most
    long_prefill_token_threshold: int = 0  # prompt tokens of one request a step computes at most; 0: no limit
    block_size: int = 32  # tokens
    enable_prefix_caching: bool = True
    kv_cache_memory: int | None = None  # bytes
    step_timeout: float = 60.0  # seconds; a step that takes longer is a hang


class EngineProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor hands the engine process on its standard input, as JSON."""

    address: str  # ZeroMQ address (ipc://...) that the engine binds
    config: EngineConfig
    log_level: str = "info"
    log_format: str = "human"  # human, json


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """How rotary frequencies are stretched. `factors` (one per frequency, GGUF) stands for itself."""

    rope_type: str = "default"  # default, linear, llama3, factors
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a decoder, under the names of Hugging Face's config.json."""

    architecture: str  # key of the table of families in engine/model
    vocab_size: int  # rows of the embedding; the tokenizer may know fewer
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    sliding_window: int | None = None  # tokens a query sees, itself included
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k and v
    attention_output_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: dict[str, float] = {}  # from generation_config.json: temperature, top_k, top_p, ...


# Reading model metadata.

MAX_INT = 2**31 - 1
MAX_FLOAT = 1e30
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HIDDEN_ACTS = {  # name in config.json -> the name that the model knows
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}
END_OF_TURN_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>")


class _FamilyDefaults(NamedTuple):
    """What Hugging Face's config class of a family assumes where config.json is silent."""

    architecture: str
    max_position_embeddings: int
    num_key_value_heads: int | None  # None: as many as attention heads
    sliding_window: int | None
    has_biases: bool  # whether attention_bias and mlp_bias mean anything


# By the `architectures` of config.json.
FAMILIES = {
    "LlamaForCausalLM": _FamilyDefaults("llama", 2048, None, None, has_biases=True),
    "MistralForCausalLM": _FamilyDefaults("mistral", 131072, 8, 4096, has_biases=False),
}
GGUF_ARCHITECTURES = ("llama",)  # Mistral and SmolLM2 are stored as llama


def load_model_config(path: Path) -> ModelConfig:
    """Read the shape of the model at `path`: a GGUF file, or a folder with config.json.

    Raises:
        ValueError: no model there, an unsupported one, or metadata that is missing, malformed or contradictory. The
            message names the file and the key.
    """
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such model (expected a GGUF file, or a folder with config.json)")
    with GGUFFile(path) as file:
        return _load_gguf(file)


def refuse_pickle(folder: Path) -> None:
    """Raise ValueError if the folder has weights only as pickle files."""
    names = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{folder}: the weights are pickle files ({pickles[0]}). Reading a pickle runs whatever code it contains, "
            "so only safetensors and GGUF are supported"
        )


class _Fields:
    """Typed, range-checked access to one source of metadata. Null means absent; errors name source and key."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    def error(self, key: str, problem: str) -> ValueError:
        return ValueError(f"{self.source}: {key}: {problem}")

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_INT) -> int:
        value = self.optional_integer(key, minimum=minimum, maximum=maximum)
        if value is not None:
            return value
        if default is None:
            raise self.error(key, "is missing")
        return default

    def optional_integer(self, key: str, *, minimum: int = 1, maximum: int = MAX_INT) -> int | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(key, f"must be an integer from {minimum} to {maximum}, not {reprlib.repr(value)}")
        return value

    def number(self, key: str, default: float, *, zero: bool = True) -> float:
        value = self.optional_number(key, zero=zero)
        return default if value is None else value

    def optional_number(self, key: str, *, maximum: float = MAX_FLOAT, zero: bool = True) -> float | None:
        """A number from 0, or from just above it, to maximum."""
        value = self.values.get(key)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= maximum or (value == 0 and not zero):
            bounds = f"{'from' if zero else 'above'} 0, at most {maximum:g}"
            raise self.error(key, f"must be a number {bounds}, not {reprlib.repr(value)}")
        return float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {reprlib.repr(value)}")
        return value

    def string(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, not {reprlib.repr(value)}")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of them."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
                raise self.error(key, f"must be token ids below {vocab_size}, not {reprlib.repr(value)}")
        return tuple(ids)


def _checked(config: ModelConfig, source: str) -> ModelConfig:
    """What must hold between the fields, whatever they were read from."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"{source}: the number of attention heads ({config.num_attention_heads}) is not a multiple of the number "
            f"of key and value heads ({config.num_key_value_heads})"
        )
    if config.head_dim % 2:
        raise ValueError(f"{source}: head_dim ({config.head_dim}) must be even, for rotary embeddings")
    return config


def _head_dim(fields: _Fields, key: str, hidden_size: int, num_heads: int) -> int:
    if (head_dim := fields.optional_integer(key)) is not None:
        return head_dim
    if hidden_size % num_heads:
        problem = (
            f"is missing, and the hidden size ({hidden_size}) is not a multiple of the {num_heads} attention heads"
        )
        raise fields.error(key, problem)
    return hidden_size // num_heads


# A folder with config.json.


def _load_folder(folder: Path) -> ModelConfig:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json in this folder")
    refuse_pickle(folder)
    fields = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    return _load_config_json(fields, _read_json(generation) if generation.is_file() else _Fields(str(generation), {}))


def _read_json(path: Path) -> _Fields:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return _Fields(str(path), values)


def _load_config_json(fields: _Fields, generation: _Fields) -> ModelConfig:
    family = _family(fields)
    vocab_size, hidden_size = fields.integer("vocab_size"), fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    max_positions = fields.integer("max_position_embeddings", family.max_position_embeddings)
    rope_theta, rope_scaling = _rope_parameters(fields, max_positions)
    attention_bias = family.has_biases and fields.boolean("attention_bias")
    bos_token_ids = fields.token_ids("bos_token_id", vocab_size) or generation.token_ids("bos_token_id", vocab_size)
    end_ids = generation.token_ids("eos_token_id", vocab_size) + fields.token_ids("eos_token_id", vocab_size)
    config = ModelConfig(
        architecture=family.architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=_num_key_value_heads(fields, family, num_heads),
        head_dim=_head_dim(fields, "head_dim", hidden_size, num_heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, zero=False),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=_sliding_window(fields, family),
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=family.has_biases and fields.boolean("mlp_bias"),
        hidden_act=_hidden_act(fields),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=tuple(dict.fromkeys(end_ids)),
        default_sampling=_default_sampling(generation),
    )
    return _checked(config, fields.source)


def _family(fields: _Fields) -> _FamilyDefaults:
    if fields.values.get("auto_map"):
        raise fields.error(
            "auto_map",
            "the model brings its own Python code. It is not run, because it could do anything on this machine; "
            f"supported without it: {', '.join(FAMILIES)}",
        )
    if quantization := fields.values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise fields.error("quantization_config", f"quantised checkpoints ({method}) are not supported; GGUF files are")
    names = fields.values.get("architectures")
    if not names:
        by_model_type = {family.architecture: name for name, family in FAMILIES.items()}
        names = [by_model_type.get(fields.string("model_type", ""), fields.string("model_type", "not named"))]
    for name in names if isinstance(names, list) else [names]:
        if isinstance(name, str) and name in FAMILIES:
            return FAMILIES[name]
    problem = f"{reprlib.repr(names)} is not supported (supported: {', '.join(FAMILIES)})"
    raise fields.error("architectures", problem)


def _num_key_value_heads(fields: _Fields, family: _FamilyDefaults, num_heads: int) -> int:
    default = num_heads if "num_key_value_heads" in fields.values else family.num_key_value_heads
    return fields.integer("num_key_value_heads", default or num_heads)


def _sliding_window(fields: _Fields, family: _FamilyDefaults) -> int | None:
    """Only families that have one look at the key; null switches it off."""
    layer_types = fields.values.get("layer_types") or []
    if not isinstance(layer_types, list) or len({str(kind) for kind in layer_types}) > 1:
        raise fields.error("layer_types", "layers that differ in their attention are not supported")
    if family.sliding_window is None:
        return None
    default = None if "sliding_window" in fields.values else family.sliding_window
    return fields.optional_integer("sliding_window") or default


def _hidden_act(fields: _Fields) -> str:
    name = fields.string("hidden_act", "silu")
    if name not in HIDDEN_ACTS:
        raise fields.error("hidden_act", f"{name!r} is not supported (supported: {', '.join(HIDDEN_ACTS)})")
    return HIDDEN_ACTS[name]


def _rope_parameters(fields: _Fields, max_positions: int) -> tuple[float, RopeScaling]:
    """Base and scaling. Newer files keep both in `rope_parameters`, older ones have `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    values = fields.values.get(key) or {}
    if not isinstance(values, dict):
        raise fields.error(key, f"must be an object, not {reprlib.repr(values)}")
    rope = _Fields(f"{fields.source}: {key}", values)
    for source in (fields, rope):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise source.error("partial_rotary_factor", "rotating a part of each head is not supported")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0, zero=False), zero=False)
    return theta, _rope_scaling(rope, max_positions)


def _rope_scaling(rope: _Fields, max_positions: int) -> RopeScaling:
    rope_type = rope.string("rope_type", rope.string("type", "default"))
    if rope_type == "default":
        return RopeScaling()
    if rope_type not in ("linear", "llama3"):
        raise rope.error("rope_type", f"{rope_type!r} is not supported (supported: default, linear, llama3)")
    if rope.values.get("factor") is None:
        raise rope.error("factor", "is missing")
    if rope_type == "linear":
        return RopeScaling(rope_type="linear", factor=rope.number("factor", 1.0, zero=False))
    scaling = RopeScaling(
        rope_type="llama3",
        factor=rope.number("factor", 1.0, zero=False),
        low_freq_factor=rope.number("low_freq_factor", 1.0, zero=False),
        high_freq_factor=rope.number("high_freq_factor", 4.0, zero=False),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", max_positions),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise rope.error("high_freq_factor", f"must be greater than low_freq_factor ({scaling.low_freq_factor})")
    return scaling


def _default_sampling(generation: _Fields) -> dict[str, float]:
    """The model's own sampling settings, under the API's names. Left out: those that the file does not set, and all of
    them where it asks for greedy decoding (`do_sample` false), because they are leftovers then."""
    if not generation.boolean("do_sample", default=True):
        return {}
    settings = {
        "temperature": generation.optional_number("temperature"),
        "top_k": generation.optional_integer("top_k", minimum=0),
        "top_p": generation.optional_number("top_p", maximum=1.0, zero=False),
        "min_p": generation.optional_number("min_p", maximum=1.0),
        "repetition_penalty": generation.optional_number("repetition_penalty", zero=False),
    }
    return {name: value for name, value in settings.items() if value is not None}


# A GGUF file.


def _load_gguf(file: GGUFFile) -> ModelConfig:
    fields = _Fields(str(file.path), file.metadata)
    arch = _gguf_architecture(fields)
    vocab_size, hidden_size = _embedding_shape(fields, file, arch)
    num_heads = fields.integer(f"{arch}.attention.head_count")
    head_dim = _gguf_head_dim(fields, arch, hidden_size, num_heads)
    bos_token_ids = fields.token_ids("tokenizer.ggml.bos_token_id", vocab_size)
    config = ModelConfig(
        architecture=arch,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer(f"{arch}.feed_forward_length"),
        num_hidden_layers=fields.integer(f"{arch}.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=fields.integer(f"{arch}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position_embeddings=fields.integer(f"{arch}.context_length"),
        rms_norm_eps=fields.number(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5, zero=False),
        rope_theta=fields.number(f"{arch}.rope.freq_base", 10000.0, zero=False),
        rope_scaling=_gguf_rope_scaling(fields, file, arch, head_dim),
        sliding_window=fields.optional_integer(f"{arch}.attention.sliding_window", minimum=0) or None,
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=_gguf_eos_token_ids(fields, vocab_size),
    )
    return _checked(config, fields.source)


def _gguf_architecture(fields: _Fields) -> str:
    arch = fields.string("general.architecture", "not named")
    if arch not in GGUF_ARCHITECTURES:
        supported = ", ".join(GGUF_ARCHITECTURES)
        raise fields.error("general.architecture", f"{arch!r} is not supported (supported: {supported})")
    if fields.integer("split.count", 1, minimum=0) > 1:
        raise fields.error("split.count", "the model is split over several files; join them with llama-gguf-split")
    if fields.integer(f"{arch}.expert_count", 0, minimum=0):
        raise fields.error(f"{arch}.expert_count", "mixtures of experts are not supported")
    return arch


def _embedding_shape(fields: _Fields, file: GGUFFile, arch: str) -> tuple[int, int]:
    """(vocab_size, hidden_size). The rows of the embedding count, which may be padded beyond the vocabulary."""
    hidden_size = fields.integer(f"{arch}.embedding_length")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise fields.error("token_embd.weight", "the tensor is missing")
    if len(embedding.shape) != 2 or embedding.shape[1] != hidden_size:
        raise fields.error("token_embd.weight", f"shape {embedding.shape} does not fit hidden size {hidden_size}")
    num_tokens = len(_gguf_tokens(fields))
    if num_tokens > embedding.shape[0]:
        problem = f"has {num_tokens} tokens, but the embedding has {embedding.shape[0]} rows"
        raise fields.error("tokenizer.ggml.tokens", problem)
    return embedding.shape[0], hidden_size


def _gguf_head_dim(fields: _Fields, arch: str, hidden_size: int, num_heads: int) -> int:
    head_dim = _head_dim(fields, f"{arch}.attention.key_length", hidden_size, num_heads)
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if (value := fields.integer(key, head_dim)) != head_dim:
            raise fields.error(key, f"{value} differs from the head dimension {head_dim}, which is not supported")
    return head_dim


def _gguf_rope_scaling(fields: _Fields, file: GGUFFile, arch: str, head_dim: int) -> RopeScaling:
    """A factor without a type means linear, as in llama.cpp. Llama 3's scaling is a tensor of factors."""
    rope_type = fields.string(f"{arch}.rope.scaling.type", "linear")
    if rope_type not in ("none", "linear"):
        supported = "none, linear, or a tensor rope_freqs.weight"
        raise fields.error(f"{arch}.rope.scaling.type", f"{rope_type!r} is not supported (supported: {supported})")
    old_key = f"{arch}.rope.scale_linear"
    factor = fields.number(f"{arch}.rope.scaling.factor", fields.number(old_key, 1.0)) or 1.0
    is_linear = rope_type == "linear" and factor != 1.0
    factors = file.tensors.get("rope_freqs.weight")
    if factors is None:
        return RopeScaling(rope_type="linear", factor=factor) if is_linear else RopeScaling()
    if is_linear or factors.shape != (head_dim // 2,):
        problem = (
            f"shape {factors.shape} with linear factor {factor} is not supported; expected ({head_dim // 2},) alone"
        )
        raise fields.error("rope_freqs.weight", problem)
    return RopeScaling(rope_type="factors")


def _gguf_tokens(fields: _Fields) -> list[str]:
    tokens = fields.values.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise fields.error("tokenizer.ggml.tokens", "must be an array of strings")
    return tokens


def _gguf_eos_token_ids(fields: _Fields, vocab_size: int) -> tuple[int, ...]:
    """The file stores one end token, but chat models end their turn with others too: those are found by name."""
    stored = [
        token_id
        for name in ("eos_token_id", "eot_token_id", "eom_token_id")
        for token_id in fields.token_ids(f"tokenizer.ggml.{name}", vocab_size)
    ]
    named = [token_id for token_id, token in enumerate(_gguf_tokens(fields)) if token in END_OF_TURN_TOKENS]
    return tuple(dict.fromkeys(stored + named))
