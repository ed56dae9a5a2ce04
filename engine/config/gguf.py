"""Read the configuration of a model from the metadata of a GGUF file."""

from typing import Any

from engine.config.fields import Fields, checked, head_dim
from engine.config.structs import ModelConfig, RopeScaling
from engine.shared.gguf import GGUFFile

GGUF_ARCHITECTURES = ("llama",)  # Mistral and SmolLM2 are stored as llama
SAMPLING_FIELDS = {  # `general.sampling.*` -> sampling field of the API
    "sequence": "samplers",
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "penalty_last_n": "repeat_last_n",
    "penalty_repeat": "repetition_penalty",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}
END_OF_TURN_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>")


def load_gguf(file: GGUFFile) -> ModelConfig:
    """Read the configuration of a model. Raises ValueError, as `engine.config.load_model_config` says."""
    fields = Fields(str(file.path), file.metadata)
    arch = _architecture(fields)
    vocab_size, hidden_size = _embedding_shape(fields, file, arch)
    num_heads = fields.integer(f"{arch}.attention.head_count")
    size = _head_dim(fields, arch, hidden_size, num_heads)
    bos_token_ids = fields.token_ids("tokenizer.ggml.bos_token_id", vocab_size)
    config = ModelConfig(
        architecture=arch,
        vocab_size=vocab_size,
        num_token_ids=len(_tokens(fields)) or vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer(f"{arch}.feed_forward_length"),
        num_hidden_layers=fields.integer(f"{arch}.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=fields.integer(f"{arch}.attention.head_count_kv", num_heads),
        head_dim=size,
        max_position_embeddings=fields.integer(f"{arch}.context_length"),
        rms_norm_eps=fields.number(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5, zero=False),
        rope_theta=fields.number(f"{arch}.rope.freq_base", 10000.0, zero=False),
        rope_scaling=_rope_scaling(fields, file, arch, size),
        sliding_window=fields.optional_integer(f"{arch}.attention.sliding_window", minimum=0) or None,
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=_eos_token_ids(fields, vocab_size),
        recommended_sampling=_recommended_sampling(fields),
    )
    return checked(config, fields.source)


def _architecture(fields: Fields) -> str:
    arch = fields.string("general.architecture", "not named")
    if arch not in GGUF_ARCHITECTURES:
        supported = ", ".join(GGUF_ARCHITECTURES)
        raise fields.error("general.architecture", f"{arch!r} is not supported (supported: {supported})")
    if fields.integer(f"{arch}.expert_count", 0, minimum=0):
        raise fields.error(f"{arch}.expert_count", "mixtures of experts are not supported")
    return arch


def _embedding_shape(fields: Fields, file: GGUFFile, arch: str) -> tuple[int, int]:
    """Return (vocab_size, hidden_size) from the embedding, which may have more rows than the vocabulary has tokens."""
    hidden_size = fields.integer(f"{arch}.embedding_length")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise fields.error("token_embd.weight", "the tensor is missing")
    if len(embedding.shape) != 2 or embedding.shape[1] != hidden_size:
        raise fields.error("token_embd.weight", f"shape {embedding.shape} does not fit hidden size {hidden_size}")
    num_tokens = len(_tokens(fields))
    if num_tokens > embedding.shape[0]:
        problem = f"has {num_tokens} tokens, but the embedding has {embedding.shape[0]} rows"
        raise fields.error("tokenizer.ggml.tokens", problem)
    return embedding.shape[0], hidden_size


def _head_dim(fields: Fields, arch: str, hidden_size: int, num_heads: int) -> int:
    size = head_dim(fields, f"{arch}.attention.key_length", hidden_size, num_heads)
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if (value := fields.integer(key, size)) != size:
            raise fields.error(key, f"{value} differs from the head dimension {size}, which is not supported")
    return size


def _rope_scaling(fields: Fields, file: GGUFFile, arch: str, head_dim: int) -> RopeScaling:
    """Return the scaling. As in llama.cpp, a factor without a type is linear; Llama 3's is a tensor of factors."""
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


def _recommended_sampling(fields: Fields) -> dict[str, Any]:
    """Return the sampling fields of the metadata. Numbers are stored in 32 bits: 0.95 reads as 0.949999988."""
    recommended: dict[str, Any] = {}
    for key, name in SAMPLING_FIELDS.items():
        value = fields.values.get(f"general.sampling.{key}")
        if value is not None:
            recommended[name] = float(f"{value:.6g}") if isinstance(value, float) else value
    if isinstance(names := recommended.get("samplers"), str):
        recommended["samplers"] = names.split(";")
    return recommended


def _tokens(fields: Fields) -> list[str]:
    tokens = fields.values.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise fields.error("tokenizer.ggml.tokens", "must be an array of strings")
    return tokens


def _eos_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """Return the ids of the end tokens: those of the metadata, and those with the usual name of an end of turn.

    Files name one end token, but chat models may end their turn with another.
    """
    stored = [
        token_id
        for name in ("eos_token_id", "eot_token_id", "eom_token_id")
        for token_id in fields.token_ids(f"tokenizer.ggml.{name}", vocab_size)
    ]
    named = [token_id for token_id, token in enumerate(_tokens(fields)) if token in END_OF_TURN_TOKENS]
    return tuple(dict.fromkeys(stored + named))
