"""The configuration of the engine and of the model, as frozen structs. Nothing here imports torch."""

from typing import Any, Literal, TypeAlias

import msgspec

from engine.config.layers import (
    AttentionKind,
    AttentionSpec,
    KVGroup,
    KVShape,
    LayerSpec,
    MixerSpec,
    RopeSpec,
    group_layers,
)

QuantizationMethod: TypeAlias = Literal["awq", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "mxfp4"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to run one model. None means that the value is chosen for the device and the model."""

    model_path: str  # a GGUF file, or a folder with config.json and safetensors
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    tensor_parallel_size: int = 1  # processes that run the model together, each with a part of every layer
    cpu_affinity: str = "none"  # auto: cores of its own for each of these processes; none
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    quantization: str = "auto"  # auto: that of the checkpoint; none: all weights in `dtype`; int8: groups of 32
    kv_cache_dtype: str = "auto"  # auto: `dtype`; int8, fp8: with a scale per token and head
    max_model_len: int | None = None  # tokens of prompt and output; None: that of training, or what memory holds
    max_num_seqs: int = 128  # choices that run at a time
    max_num_batched_tokens: int | None = None  # token budget of a step
    long_prefill_token_threshold: int = 0  # maximum prompt tokens of one request in a step; 0: no limit
    max_step_ms: float | None = None  # bound on the time of a step beside a stream; None: the device's default
    block_size: int = 32  # tokens in a block of the KV cache
    enable_prefix_caching: bool = True
    kv_cache_memory: int | None = None  # bytes; None: what is left of the memory that may be used
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory that may be used
    speculative: str = "auto"  # auto, ngram, off
    enforce_eager: bool = False  # no CUDA graphs
    allow_slow_kernels: bool = False  # run plain torch on a GPU if Triton does not work; False: do not start
    batch_invariant: bool = True  # False: use faster kernels, if there are any, whose results depend on the batch
    lora_modules: dict[str, str] = {}  # LoRA adapters to load at start: name -> folder or GGUF file
    max_loras: int = 0  # LoRA adapters that can be loaded at a time
    max_lora_rank: int | None = None  # None: the largest rank of lora_modules, at least 16
    step_timeout: float = 60.0  # seconds after which a step counts as hung
    keep_token_ids: bool = False  # of the last requests, to tell why a prefix was not cached
    data_parallel_size: int = 1  # engines with the same model on this machine
    data_parallel_rank: int = 0  # which of them this is
    memory_limit: int | None = None  # bytes of host memory that this engine may use; None: all that is free


class EngineProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration that the engine process reads from its standard input, as JSON from the supervisor."""

    address: str  # ZeroMQ address (ipc://...) that the engine binds
    config: EngineConfig
    log_level: str = "info"
    log_format: str = "human"  # human, json


class WeightLayout(msgspec.Struct, frozen=True, kw_only=True):
    """How the tensors of a checkpoint differ from those that the model takes. See `engine.weights.layout`."""

    names: tuple[tuple[str, str], ...] = ()  # (regular expression, replacement) for parts of names, in this order
    is_interleaved: bool = False  # rotated pairs of dimensions are adjacent, not half a head apart
    norm_offset: float = 0.0  # added to the weights of RMS norms
    has_interleaved_experts: bool = False  # stacked experts are [E, inputs, outputs], with gate and up alternating


class QuantizationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the matrices of a safetensors checkpoint are quantised: what the tensors themselves do not tell."""

    method: QuantizationMethod
    zero_point_offset: int = 0  # added to stored zero points: files of GPTQ, version 1, hold one less
    quantizes_activations: bool = False  # the checkpoint is made for it; we do not


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder: its layers, and what is before and after them. Names are those of Hugging Face's config.json."""

    architecture: str  # the family, as `model_type` in config.json
    vocab_size: int  # rows of the embedding
    num_token_ids: int  # ids of the tokenizer; further rows of the embedding are padding and never sampled
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]  # tables of rotary embeddings, which layers refer to
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    norm: Literal["rms", "layer"] = "rms"  # of the residual stream
    tie_word_embeddings: bool = False
    embedding_scale: float = 1.0
    per_layer_input_size: int = 0  # numbers of a token's embedding for each layer (Gemma 4); 0: there is none
    per_layer_vocab_size: int = 0  # rows of that embedding, at least `vocab_size`
    per_layer_activation: str = "gelu_pytorch_tanh"
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    num_ignored_layers: int = 0  # further layers of the checkpoint, which predict later tokens
    weight_layout: WeightLayout = WeightLayout()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantization: QuantizationConfig | None = None  # of a safetensors checkpoint
    # Sampling fields of the API that the model's files recommend, as they are in the file: the server validates them.
    recommended_sampling: dict[str, Any] = {}

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def attentions(self) -> dict[int, AttentionSpec]:
        """The attention of the layers that have it, by their numbers."""
        return {index: layer.attention for index, layer in enumerate(self.layers) if layer.attention is not None}

    @property
    def mixers(self) -> dict[int, MixerSpec]:
        """The mixers of the other layers, by their numbers."""
        return {index: layer.mixer for index, layer in enumerate(self.layers) if layer.mixer is not None}

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """The kinds of attention, in the order of their first use."""
        return tuple(dict.fromkeys(attention.kind for attention in self.attentions.values()))

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        return group_layers(self.layers)

    @property
    def kv_shapes(self) -> list[list[KVShape]]:
        """The shapes of the layers of each KV group."""
        attentions = self.attentions
        return [[attentions[index].kv_shape for index in group.layers] for group in self.kv_groups]
