"""What a layer is built of: the textbook's modules, or the variants of few families, as its spec says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.interface import Kernels
from engine.model.attention import Attention
from engine.model.latent_attention import LatentAttention
from engine.model.layer_inputs import LayerInputs
from engine.model.linear import Linear, Parameters
from engine.model.mlp import MLP, Experts
from engine.model.norm import NoNorm, Norm, NormedSum, ScaledSum, Sum
from engine.model.variants import LayerScalar, MLPAndExperts, PerLayerGate
from engine.shared.parts import engine_part

Extra: TypeAlias = Callable[[Tensor, LayerInputs], None]  # changes the residual stream at the end of a layer


class FeedForward(Protocol):
    """An MLP, or a mixture of experts."""

    @property
    def experts(self) -> Experts | None:
        """The experts, if there are any."""

    @property
    def linears(self) -> Sequence[Linear]:
        """The linear layers that take adapters, in the order of their use."""

    def __call__(self, x: Tensor, lora_slots: Tensor, residual: Tensor | None) -> Tensor:
        """Return the result for x [T, hidden_size], or add it to `residual` in place."""

    def router_logits(self, x: Tensor) -> Tensor | None:
        """Return the logits of the experts, float32 [T, E], for the same x; None if there are no experts."""


class Mixer(Protocol):
    """Attention, or another mixer of tokens."""

    o_proj: Linear

    @property
    def linears(self) -> Sequence[Linear]:
        """The linear layers, in the order of their use."""
        ...

    def project(self, x: Tensor, inputs: LayerInputs) -> list[Tensor]:
        """Store what later tokens need; return what `__call__` needs of each row of x [T, hidden_size]."""
        ...

    def __call__(self, projected: list[Tensor], inputs: LayerInputs, residual: Tensor | None) -> Tensor:
        """Return the output for what `project` returned, or add it to `residual` in place."""
        ...


class LayerBuilder:
    """Makes the modules of one layer."""

    def __init__(self, config: ModelConfig, index: int, parameters: Parameters, kernels: Kernels) -> None:
        self.config = config
        self.index = index
        self.spec = config.layers[index]
        self.parameters = parameters
        self.kernels = kernels
        self.prefix = f"model.layers.{index}"

    def attention(self) -> Mixer:
        """Return the attention of the layer, or what it has in its place."""
        if self.spec.attention is None:
            mixer: Mixer = engine_part("hybrid", "mixers").new_mixer(
                self.config, self.index, self.parameters, self.kernels
            )
            return mixer
        attention = Attention if self.spec.attention.latent is None else LatentAttention
        return attention(self.config, self.index, self.parameters, self.kernels)

    def norm(self, name: str) -> Norm | NoNorm:
        return self._norm(name) if getattr(self.spec, name) else NoNorm()

    def sum(self, norm: str) -> Sum:
        """Return what adds to the residual stream, through the norm of this name if the layer has it."""
        if getattr(self.spec, norm):
            return NormedSum(self._norm(norm))
        return Sum() if self.spec.residual_scale == 1.0 else ScaledSum(self.kernels, self.spec.residual_scale)

    def feed_forward(self) -> FeedForward:
        spec, parameters, kernels = self.spec, self.parameters, self.kernels
        if spec.mlp is not None and spec.experts is not None:
            return MLPAndExperts(self.config, spec.mlp, spec.experts, parameters, self.prefix, kernels)
        if spec.experts is not None:
            return Experts(self.config.hidden_size, spec.experts, parameters, f"{self.prefix}.mlp", kernels)
        assert spec.mlp is not None
        return MLP(self.config.hidden_size, spec.mlp, parameters, f"{self.prefix}.mlp", kernels)

    def extras(self) -> list[Extra]:
        extras: list[Extra] = []
        if self.config.per_layer_input_size:
            extras.append(PerLayerGate(self.config, self.index, self.parameters, self.kernels))
        if self.spec.has_layer_scalar:
            scalar = self.parameters.take(f"{self.prefix}.layer_scalar", 1).item()
            extras += [LayerScalar(self.kernels, scalar)] if scalar != 1.0 else []
        return extras

    def _norm(self, name: str) -> Norm:
        return Norm(self.config, self.parameters, f"{self.prefix}.{name}", self.kernels)
