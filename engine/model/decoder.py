"""A decoder-only transformer in textbook order: embedding, layers of attention and MLP, final norm, LM head.

The rows (tokens) of all sequences form one flat batch. Parts and parameters have the names of Hugging Face's
checkpoints; the projections q, k and v are computed as one product, and so are gate and up. A row finds its sequence
through `BatchInputs` and the KV cache; there is no global state.

The kernels may run this code for every batch, or run it once with placeholder tensors to record the sequence of
operations. So it may depend on the shapes of tensors but never on their values, and all arithmetic is done by kernels.

Shapes: T rows of the batch, L rows of `hidden_rows`, R rows with logits, H query heads, KH KV heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.config import AttentionKind, AttentionSpec, ExpertsSpec, LayerSpec, MLPSpec, ModelConfig
from engine.kernels.interface import AttentionScores, ExpertLinearOp, HeadNorms, Kernels, LayerCache, Rotations
from engine.model.kv_cache import KVCache
from engine.model.parameters import Parameters
from engine.model.rotary import RotaryEmbedding


class Linear:
    """A linear layer (plus LoRA) that computes several projections of the same input as one matrix product.

    `projections` are pairs of a name in the checkpoint and a number of outputs. The outputs are concatenated.
    """

    def __init__(
        self,
        kernels: Kernels,
        parameters: Parameters,
        projections: list[tuple[str, int]],
        num_inputs: int,
        *,
        has_bias: bool,
    ) -> None:
        weights = [parameters.take_weight(f"{name}.weight", size, num_inputs) for name, size in projections]
        biases = [parameters.take(f"{name}.bias", size) for name, size in projections] if has_bias else []
        self.kernels = kernels
        self.names = [name for name, _ in projections]
        self.product = kernels.linear(kernels.pack(weights), torch.cat(biases) if biases else None)
        self.lora = kernels.new_lora_weights([size for _, size in projections], num_inputs)

    def __call__(self, x: Tensor, lora_slots: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.product(x, residual)
        if self.lora is not None:
            self.kernels.add_lora(x, out, self.lora, lora_slots)
        return out


@dataclass(frozen=True)
class RowInputs:
    """Inputs of each layer besides the hidden states, one per row of the batch."""

    rotations: list[Rotations]  # of the row's position, by each table of rotary embeddings
    slot_mappings: list[Tensor]  # int64 [T] of each KV group, the slot of the KV cache for the row's key and value
    lora_slots: Tensor  # int64 [T], the slot of the row's LoRA adapter; -1: none; empty if no row has one


@dataclass(frozen=True)
class AttentionInputs:
    """What attention reads besides queries, keys and values."""

    plans: dict[AttentionKind, Any]
    block_tables: list[Tensor]  # of each KV group
    lora_slots: Tensor  # of the rows that have queries


class Norm:
    """The norm of what attention or the MLP reads, or of what it returns."""

    def __init__(self, config: ModelConfig, parameters: Parameters, name: str, kernels: Kernels) -> None:
        self.weight = parameters.take(f"{name}.weight", config.hidden_size)
        self.kernels = kernels
        self.is_layer_norm = config.norm == "layer"
        self.eps = config.rms_norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.kernels.layer_norm if self.is_layer_norm else self.kernels.rms_norm
        return norm(x, self.weight, self.eps)

    def add(self, residual: Tensor, x: Tensor) -> None:
        """Add the normed x to the residual stream, in place."""
        self.kernels.rms_norm(x, self.weight, self.eps, residual)


class Attention:
    """Grouped-query self-attention (Ainslie et al. 2023): H query heads, KH key and value heads."""

    def __init__(
        self, config: ModelConfig, spec: AttentionSpec, parameters: Parameters, prefix: str, kernels: Kernels
    ) -> None:
        self.kernels = kernels
        self.spec = spec
        size, hidden_size = spec.head_dim, config.hidden_size
        heads = {"q": spec.num_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
        self.names = "q" if spec.kv_source is not None else "qk" if spec.values_are_keys else "qkv"
        self.sizes = [heads[name] for name in self.names]
        qkv = [(f"{prefix}.{name}_proj", heads[name] * size) for name in self.names]
        self.qkv_proj = Linear(kernels, parameters, qkv, hidden_size, has_bias=spec.qkv_bias)
        o = [(f"{prefix}.o_proj", hidden_size)]
        self.o_proj = Linear(kernels, parameters, o, spec.num_heads * size, has_bias=spec.output_bias)
        self.norms = self._take_norms(parameters, prefix, heads, config.rms_norm_eps)
        sinks = parameters.take(f"{prefix}.sinks.weight", spec.num_heads).float() if spec.has_sinks else None
        self.scores = AttentionScores(spec.scale, spec.softcap, sinks)

    def _take_norms(
        self, parameters: Parameters, prefix: str, heads: dict[str, int], eps: float
    ) -> HeadNorms | None:
        spec = self.spec
        if spec.qk_norm == "none":
            return None
        q, k = (
            parameters.take(f"{prefix}.{name}_norm.weight", spec.head_dim * (heads[name] if spec.qk_norm == "all" else 1))
            if name in self.names
            else None
            for name in "qk"
        )
        return HeadNorms(q, k, torch.ones_like(q[: spec.head_dim]) if spec.v_norm and q is not None else None, eps)

    def project(self, x: Tensor, rows: RowInputs, group: int, cache: LayerCache) -> Tensor:
        """Return the queries [T, H * D] of hidden states [T, hidden_size]; store their keys and values in the cache."""
        heads = self.qkv_proj(x, rows.lora_slots).view(len(x), -1, self.spec.head_dim)
        q, k, v, *_ = *torch.split(heads, self.sizes, dim=1), None, None
        if self.spec.values_are_keys:
            v = k
        rotations, slots = rows.rotations[self.spec.rope], rows.slot_mappings[group]
        return self.kernels.rope_and_store_kv(q, k, v, rotations, slots, cache, self.norms).flatten(1)

    def __call__(
        self, q: Tensor, group: int, cache: LayerCache, inputs: AttentionInputs, residual: Tensor | None
    ) -> Tensor:
        """Return the output, or add it to `residual` in place."""
        q = q.view(len(q), self.spec.num_heads, self.spec.head_dim)
        plan, table = inputs.plans[self.spec.kind], inputs.block_tables[group]
        out = self.kernels.paged_attention(q, cache, plan, table, self.scores)
        return self.o_proj(out.flatten(1), inputs.lora_slots, residual)


class MLP:
    """Gated feed-forward network: down(act(gate(x)) * up(x))."""

    def __init__(
        self, hidden_size: int, spec: MLPSpec, parameters: Parameters, prefix: str, kernels: Kernels
    ) -> None:
        size = spec.intermediate_size
        gate_up = [(f"{prefix}.{name}_proj", size) for name in ("gate", "up")]
        self.gate_up_proj = Linear(kernels, parameters, gate_up, hidden_size, has_bias=spec.bias)
        down = [(f"{prefix}.down_proj", hidden_size)]
        self.down_proj = Linear(kernels, parameters, down, size, has_bias=spec.bias)
        self.kernels = kernels
        self.spec = spec

    def __call__(self, x: Tensor, lora_slots: Tensor, residual: Tensor | None) -> Tensor:
        gate, up = self.gate_up_proj(x, lora_slots).split(self.spec.intermediate_size, dim=1)
        hidden = self.kernels.act_and_mul(gate, up, self.spec.activation)
        return self.down_proj(hidden, lora_slots, residual)


class Experts:
    """A mixture of experts (Shazeer et al. 2017): each row passes through the MLPs that the router chooses for it."""

    def __init__(
        self, hidden_size: int, spec: ExpertsSpec, parameters: Parameters, prefix: str, kernels: Kernels
    ) -> None:
        self.kernels = kernels
        self.spec = spec
        num_experts, size = spec.router.num_experts, spec.intermediate_size
        router = parameters.take_weight(f"{prefix}.gate.weight", num_experts, hidden_size)
        bias = parameters.take(f"{prefix}.gate.bias", num_experts) if spec.router_bias else None
        self.router = kernels.linear(kernels.pack([router], dtype=torch.float32), bias, is_float32=True)
        self.correction_bias = None
        if spec.correction_bias:
            self.correction_bias = parameters.take(f"{prefix}.gate.e_score_correction_bias", num_experts).float()
        experts = f"{prefix}.experts"

        def linear(names: tuple[str, ...], num_outputs: int, num_inputs: int) -> ExpertLinearOp:
            weights = [
                [parameters.take_weight(f"{experts}.{index}.{name}.weight", num_outputs, num_inputs) for name in names]
                for index in range(num_experts)
            ]
            biases = [parameters.take(f"{experts}.{name}.bias", num_experts, num_outputs) for name in names if spec.bias]
            return kernels.expert_linear(kernels.pack_experts(weights), torch.cat(biases, dim=1) if biases else None)

        self.gate_up_proj = linear(("gate_proj", "up_proj"), size, hidden_size)
        self.down_proj = linear(("down_proj",), hidden_size, size)
        self.shared = None
        if spec.shared is not None:
            self.shared = MLP(hidden_size, spec.shared, parameters, f"{prefix}.shared_experts", kernels)

    def __call__(self, x: Tensor, lora_slots: Tensor, out: Tensor) -> None:
        """Add the result to `out`, in place."""
        kernels, spec = self.kernels, self.spec
        routing = kernels.route(self.router(x), spec.router, self.correction_bias)
        gate, up = self.gate_up_proj(x, routing).split(spec.intermediate_size, dim=1)
        hidden = kernels.act_and_mul(gate, up, spec.activation)
        kernels.combine_experts(self.down_proj(hidden, routing), routing, out)
        if self.shared is not None:
            self.shared(x, lora_slots, out)


class DecoderLayer:
    """Attention, then MLP or experts, each applied to the normed residual stream [rows, hidden_size] and added to it."""

    def __init__(
        self, config: ModelConfig, spec: LayerSpec, parameters: Parameters, prefix: str, kernels: Kernels
    ) -> None:
        self.kernels = kernels
        self.spec = spec

        def norm(name: str) -> Norm | None:
            return Norm(config, parameters, f"{prefix}.{name}", kernels) if getattr(spec, name) else None

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = Attention(config, spec.attention, parameters, f"{prefix}.self_attn", kernels)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm")
        self.mlp = self.experts = None
        if spec.mlp is not None:
            self.mlp = MLP(config.hidden_size, spec.mlp, parameters, f"{prefix}.mlp", kernels)
        if spec.experts is not None:
            self.experts = Experts(config.hidden_size, spec.experts, parameters, f"{prefix}.mlp", kernels)
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm")

    def project(self, residual: Tensor, rows: RowInputs, group: int, cache: LayerCache) -> list[Tensor]:
        """Compute what precedes attention, and store keys and values.

        Return the queries [T, H * D], and if the MLP also reads the input of attention, this.
        """
        x = self.input_layernorm(residual) if self.input_layernorm else residual
        q = self.self_attn.project(x, rows, group, cache)
        return [q, x] if self.spec.is_parallel else [q]

    def __call__(
        self, residual: Tensor, projected: list[Tensor], group: int, cache: LayerCache, inputs: AttentionInputs
    ) -> None:
        """Update the residual stream, given the result of `project`."""
        q, *attention_input = projected
        self._add(
            lambda out: self.self_attn(q, group, cache, inputs, out), residual, self.post_attention_layernorm
        )
        x = attention_input[0] if self.spec.is_parallel else residual
        if self.pre_feedforward_layernorm is not None:
            x = self.pre_feedforward_layernorm(residual)
        if self.mlp is not None:
            mlp = self.mlp
            self._add(lambda out: mlp(x, inputs.lora_slots, out), residual, self.post_feedforward_layernorm)
        if self.experts is not None:
            self.experts(x, inputs.lora_slots, residual)

    def _add(self, compute: Callable[[Tensor | None], Tensor], residual: Tensor, norm: Norm | None) -> None:
        """Add a result to the residual stream: normed, scaled, or as it is, which needs no memory of its own."""
        if norm is not None:
            norm.add(residual, compute(None))
        elif self.spec.residual_scale != 1.0:
            self.kernels.add(residual, compute(None), self.spec.residual_scale)
        else:
            compute(residual)

    @property
    def linears(self) -> list[Linear]:
        """The linear layers, in the order of their use. Those of experts take no adapters."""
        mlps = [mlp for mlp in (self.mlp, self.experts and self.experts.shared) if mlp is not None]
        of_mlps = [linear for mlp in mlps for linear in (mlp.gate_up_proj, mlp.down_proj)]
        return [self.self_attn.qkv_proj, self.self_attn.o_proj, *of_mlps]


class CausalLM:
    """The whole model: token ids in, logits out."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        kernels: Kernels,
        *,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.kernels = kernels
        self.rotary = [RotaryEmbedding(rope, max_model_len, device) for rope in config.ropes]
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = kernels.pack([parameters.take_weight("model.embed_tokens.weight", *shape)])
        self.layers = [
            DecoderLayer(config, spec, parameters, f"model.layers.{index}", kernels)
            for index, spec in enumerate(config.layers)
        ]
        self.norm = Norm(config, parameters, "model.norm", kernels)
        head = self.embed_tokens
        if not config.tie_word_embeddings:
            head = kernels.pack([parameters.take_weight("lm_head.weight", *shape)])
        self.lm_head = kernels.linear(head, is_float32=True)
        parameters.finish()

    def forward(self, batch: BatchInputs, kv_cache: KVCache) -> Tensor:
        """Return the last hidden states [L, hidden_size] of `hidden_rows`; store the keys and values of every row."""
        kernels = self.kernels
        x = kernels.embed(batch.token_ids, self.embed_tokens, self.config.embedding_scale)
        rows = RowInputs(
            rotations=[rotary.gather(kernels, batch.positions) for rotary in self.rotary],
            slot_mappings=batch.slot_mappings,
            lora_slots=batch.lora_slots,
        )
        *layers, (last, last_group, last_cache) = zip(self.layers, kv_cache.groups, kv_cache.layers, strict=True)
        kinds = [layer.self_attn.spec.kind for layer, _, _ in layers]
        inputs = self._plan(batch, batch.query_lens, kinds, batch.lora_slots)
        for layer, group, cache in layers:
            with kernels.temporaries():
                layer(x, layer.project(x, rows, group, cache), group, cache, inputs)
        # Once the last layer has stored keys and values, only `hidden_rows` are still needed.
        hidden = kernels.gather(x, batch.hidden_rows)
        inputs = self._plan(batch, batch.hidden_lens, [last.self_attn.spec.kind], batch.hidden_lora_slots)
        with kernels.temporaries():
            projected = last.project(x, rows, last_group, last_cache)
            last(hidden, [kernels.gather(y, batch.hidden_rows) for y in projected], last_group, last_cache, inputs)
        return hidden

    def _plan(
        self, batch: BatchInputs, query_lens: Lengths, kinds: list[AttentionKind], lora_slots: Tensor
    ) -> AttentionInputs:
        """Plan the attention of the last `query_lens` rows of each sequence, for each kind of layer."""
        numbers = {kind: index for index, kind in enumerate(self.config.attention_kinds)}
        plans = {
            kind: self.kernels.plan_attention(batch, query_lens, kind, numbers[kind]) for kind in dict.fromkeys(kinds)
        }
        return AttentionInputs(plans, batch.block_tables, lora_slots)

    @property
    def linears(self) -> list[Linear]:
        """The linear layers of all decoder layers."""
        return [linear for layer in self.layers for linear in layer.linears]

    def compute_hidden(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the rows (int64 [R]) of the hidden states after the final norm, [R, hidden_size]."""
        return self.norm(self.kernels.gather(hidden, rows))

    def compute_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the logits [R, num_token_ids] of rows (int64 [R]) of the hidden states: final norm and LM head."""
        config = self.config
        logits = self.lm_head(self.compute_hidden(hidden, rows))[:, : config.num_token_ids]
        if config.logits_scale == 1.0 and config.logits_softcap is None:
            return logits
        return self.kernels.scale_logits(logits, config.logits_scale, config.logits_softcap)
