"""Read the configuration of a model from a folder with `config.json`, as Hugging Face's transformers writes it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.fields import Fields, checked, head_dim, shown
from engine.config.structs import ModelConfig, RopeScaling
from engine.config.tokenizer_files import num_token_ids

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HIDDEN_ACTS = {  # name in config.json -> name of the activation in `Kernels.act_and_mul`
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


class _FamilyDefaults(NamedTuple):
    """The defaults of a family's config class in transformers, for keys that config.json leaves out."""

    architecture: str
    max_position_embeddings: int
    num_key_value_heads: int | None  # None: as many as attention heads
    sliding_window: int | None
    has_biases: bool  # whether the family reads attention_bias and mlp_bias


# `architectures` of config.json -> family.
FAMILIES = {
    "LlamaForCausalLM": _FamilyDefaults("llama", 2048, None, None, has_biases=True),
    "MistralForCausalLM": _FamilyDefaults("mistral", 131072, 8, 4096, has_biases=False),
}


def load_folder(folder: Path) -> ModelConfig:
    """Read the configuration of a model. Raises ValueError, as `engine.config.load_model_config` says."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json in this folder")
    refuse_pickle(folder)
    fields = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    empty = Fields(str(generation), {})
    return _load_config_json(folder, fields, read_json(generation) if generation.is_file() else empty)


def read_json(path: Path) -> Fields:
    """Read a JSON file that holds an object. Raises ValueError if it does not."""
    return parse_json(path, path.read_bytes())


def parse_json(path: Path, data: bytes | bytearray) -> Fields:
    """Parse the content of a JSON file that holds an object; `path` is for messages. Raises ValueError."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return Fields(str(path), values)


def _load_config_json(folder: Path, fields: Fields, generation: Fields) -> ModelConfig:
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
        num_token_ids=min(vocab_size, num_token_ids(folder) or vocab_size),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=_num_key_value_heads(fields, family, num_heads),
        head_dim=head_dim(fields, "head_dim", hidden_size, num_heads),
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
        recommended_sampling=_recommended_sampling(generation),
    )
    return checked(config, fields.source)


def _family(fields: Fields) -> _FamilyDefaults:
    if fields.values.get("auto_map"):
        raise fields.error(
            "auto_map",
            "the model comes with its own Python code, which is not run, because it could do anything on this machine; "
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
    problem = f"{shown(names)} is not supported (supported: {', '.join(FAMILIES)})"
    raise fields.error("architectures", problem)


def _num_key_value_heads(fields: Fields, family: _FamilyDefaults, num_heads: int) -> int:
    default = num_heads if "num_key_value_heads" in fields.values else family.num_key_value_heads
    return fields.integer("num_key_value_heads", default or num_heads)


def _sliding_window(fields: Fields, family: _FamilyDefaults) -> int | None:
    """Return the window in tokens; None (null in the file, or a family without windows) is full attention."""
    layer_types = fields.values.get("layer_types") or []
    if not isinstance(layer_types, list) or len({str(kind) for kind in layer_types}) > 1:
        raise fields.error("layer_types", "layers that differ in their attention are not supported")
    if family.sliding_window is None:
        return None
    default = None if "sliding_window" in fields.values else family.sliding_window
    return fields.optional_integer("sliding_window") or default


def _hidden_act(fields: Fields) -> str:
    name = fields.string("hidden_act", "silu")
    if name not in HIDDEN_ACTS:
        raise fields.error("hidden_act", f"{name!r} is not supported (supported: {', '.join(HIDDEN_ACTS)})")
    return HIDDEN_ACTS[name]


def _rope_parameters(fields: Fields, max_positions: int) -> tuple[float, RopeScaling]:
    """Return base and scaling. Newer files have both in `rope_parameters`, older in `rope_theta` and `rope_scaling`."""
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    values = fields.values.get(key) or {}
    if not isinstance(values, dict):
        raise fields.error(key, f"must be an object, not {shown(values)}")
    rope = Fields(f"{fields.source}: {key}", values)
    for source in (fields, rope):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise source.error("partial_rotary_factor", "rotating a part of each head is not supported")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0, zero=False), zero=False)
    return theta, _rope_scaling(rope, max_positions)


def _rope_scaling(rope: Fields, max_positions: int) -> RopeScaling:
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


def _recommended_sampling(generation: Fields) -> dict[str, Any]:
    """Return the sampling fields of generation_config.json.

    With `"do_sample": false`, transformers decodes greedily and ignores all other fields.
    """
    if not generation.boolean("do_sample", default=True):
        return {"temperature": 0.0}
    return {name: generation.values[name] for name in SAMPLING_FIELDS if generation.values.get(name) is not None}


def refuse_pickle(folder: Path) -> None:
    """Raise ValueError if the folder has pickle files of weights and no safetensors."""
    names = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{folder}: the weights are pickle files ({pickles[0]}). Reading a pickle runs whatever code it contains, "
            "so only safetensors and GGUF are supported"
        )
