"""What the layers of few families (so far Gemma 4) have: an input of their own, a scalar, experts beside an MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import ExpertsSpec, MLPSpec, ModelConfig
from engine.kernels.interface import Kernels
from engine.model.layer_inputs import LayerInputs
from engine.model.linear import Linear, Parameters
from engine.model.mlp import MLP, Experts
from engine.model.norm import Norm


class PerLayerEmbedding:
    """The inputs of all layers: a second embedding of the token, and a projection of the first, normed."""

    def __init__(self, config: ModelConfig, parameters: Parameters, kernels: Kernels) -> None:
        self.kernels = kernels
        self.size = config.per_layer_input_size
        num_columns, prefix = config.num_hidden_layers * self.size, "model"
        table = parameters.take_weight(
            f"{prefix}.embed_tokens_per_layer.weight", config.per_layer_vocab_size, num_columns
        )
        self.embed_tokens = kernels.pack([table])
        projection = [(f"{prefix}.per_layer_model_projection", num_columns)]
        self.projection = Linear(kernels, parameters, projection, config.hidden_size, has_bias=False)
        # Both summands are divided by the square root of 2. The projection is divided by the square root of its number
        # of inputs before it is normed, which is the same as a larger epsilon.
        self.embedding_scale = (self.size / 2) ** 0.5
        self.norm = parameters.take(f"{prefix}.per_layer_projection_norm.weight", self.size) * 2**-0.5
        self.eps = config.rms_norm_eps * config.hidden_size

    def __call__(self, token_ids: Tensor, x: Tensor, lora_slots: Tensor) -> list[Tensor]:
        """Return the input [T, size] of each layer for the embeddings x [T, hidden_size] of tokens."""
        inputs = torch.split(self.kernels.embed(token_ids, self.embed_tokens, self.embedding_scale), self.size, dim=1)
        projected = torch.split(self.projection(x, lora_slots), self.size, dim=1)
        for total, part in zip(inputs, projected, strict=True):
            self.kernels.rms_norm(part, self.norm, self.eps, total)
        return list(inputs)


class PerLayerGate:
    """Adds a layer's own input to the residual stream, gated by the residual stream."""

    def __init__(self, config: ModelConfig, index: int, parameters: Parameters, kernels: Kernels) -> None:
        size, hidden_size, prefix = config.per_layer_input_size, config.hidden_size, f"model.layers.{index}"
        self.index = index
        self.kernels = kernels
        self.activation = config.per_layer_activation
        self.gate = Linear(kernels, parameters, [(f"{prefix}.per_layer_input_gate", size)], hidden_size, has_bias=False)
        projection = [(f"{prefix}.per_layer_projection", hidden_size)]
        self.projection = Linear(kernels, parameters, projection, size, has_bias=False)
        self.norm = Norm(config, parameters, f"{prefix}.post_per_layer_input_norm", kernels)

    def __call__(self, x: Tensor, inputs: LayerInputs) -> None:
        gate = self.gate(x, inputs.lora_slots)
        gated = self.kernels.act_and_mul(gate, inputs.own[self.index], self.activation)
        self.norm.add(x, self.projection(gated, inputs.lora_slots))


class LayerScalar:
    """Multiplies the residual stream by a number."""

    def __init__(self, kernels: Kernels, scalar: float) -> None:
        self.kernels = kernels
        self.scalar = scalar

    def __call__(self, x: Tensor, inputs: LayerInputs) -> None:
        self.kernels.scale(x, self.scalar)


class MLPAndExperts:
    """The sum of an MLP and of experts, each between norms of its own; x is the residual stream itself."""

    def __init__(
        self,
        config: ModelConfig,
        mlp: MLPSpec,
        experts: ExpertsSpec,
        parameters: Parameters,
        prefix: str,
        kernels: Kernels,
    ) -> None:
        def norm(name: str) -> Norm:
            return Norm(config, parameters, f"{prefix}.{name}", kernels)

        self.kernels = kernels
        self.eps = config.rms_norm_eps
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm")
        self.mlp = MLP(config.hidden_size, mlp, parameters, f"{prefix}.mlp", kernels)
        self.post_feedforward_layernorm_1 = norm("post_feedforward_layernorm_1")
        router_norm = parameters.take(f"{prefix}.mlp.gate.norm.weight", config.hidden_size)
        self.router_norm = router_norm * config.hidden_size**-0.5
        self.pre_feedforward_layernorm_2 = norm("pre_feedforward_layernorm_2")
        self.experts: Experts = Experts(config.hidden_size, experts, parameters, f"{prefix}.mlp", kernels)
        self.post_feedforward_layernorm_2 = norm("post_feedforward_layernorm_2")

    @property
    def linears(self) -> list[Linear]:
        return self.mlp.linears

    def __call__(self, x: Tensor, lora_slots: Tensor, residual: Tensor | None) -> Tensor:
        assert residual is None  # the sum is normed before it is added
        total = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x), lora_slots, None))
        routed = self.experts(self.pre_feedforward_layernorm_2(x), lora_slots, None, self.router_logits(x))
        self.post_feedforward_layernorm_2.add(total, routed)
        return total

    def router_logits(self, x: Tensor) -> Tensor:
        return self.experts.router_logits(self.kernels.rms_norm(x, self.router_norm, self.eps))
