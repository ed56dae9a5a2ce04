"""Embeddings of each token for each layer (Gemma 4), which a gate in each layer lets into the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.interface import Kernels
from engine.model.linear import Linear
from engine.model.norm import Norm
from engine.model.parameters import Parameters


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
    """Adds a layer's input to the residual stream, gated by the residual stream."""

    def __init__(self, config: ModelConfig, parameters: Parameters, prefix: str, kernels: Kernels) -> None:
        size, hidden_size = config.per_layer_input_size, config.hidden_size
        self.kernels = kernels
        self.activation = config.per_layer_activation
        self.gate = Linear(kernels, parameters, [(f"{prefix}.per_layer_input_gate", size)], hidden_size, has_bias=False)
        projection = [(f"{prefix}.per_layer_projection", hidden_size)]
        self.projection = Linear(kernels, parameters, projection, size, has_bias=False)
        self.norm = Norm(config, parameters, f"{prefix}.post_per_layer_input_norm", kernels)

    def __call__(self, residual: Tensor, layer_input: Tensor, lora_slots: Tensor) -> None:
        gated = self.kernels.act_and_mul(self.gate(residual, lora_slots), layer_input, self.activation)
        self.norm.add(residual, self.projection(gated, lora_slots))
