"""Feed-forward networks: the gated MLP, and the mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import ExpertsSpec, MLPSpec
from engine.kernels.interface import ExpertLinearOp, Kernels
from engine.model.linear import Linear, Parameters


class MLP:
    """Gated feed-forward network: down(act(gate(x)) * up(x))."""

    experts = None

    def __init__(self, hidden_size: int, spec: MLPSpec, parameters: Parameters, prefix: str, kernels: Kernels) -> None:
        size = spec.intermediate_size
        gate_up = [(f"{prefix}.{name}_proj", size) for name in ("gate", "up")]
        self.gate_up_proj = Linear(kernels, parameters, gate_up, hidden_size, has_bias=spec.bias)
        down = [(f"{prefix}.down_proj", hidden_size)]
        self.down_proj = Linear(kernels, parameters, down, size, has_bias=spec.bias)
        self.kernels = kernels
        self.spec = spec

    def __call__(self, x: Tensor, lora_slots: Tensor, residual: Tensor | None) -> Tensor:
        gate, up = torch.split(self.gate_up_proj(x, lora_slots), self.spec.intermediate_size, dim=1)
        hidden = self.kernels.act_and_mul(gate, up, self.spec.activation)
        del gate, up  # which take as much memory as all the rest
        return self.down_proj(hidden, lora_slots, residual)

    @property
    def linears(self) -> list[Linear]:
        return [self.gate_up_proj, self.down_proj]

    def router_logits(self, x: Tensor) -> None:
        return None


class Experts:
    """A mixture of experts (Shazeer et al. 2017): each row passes through the MLPs that the router chooses for it."""

    linears: Sequence[Linear] = ()  # that take adapters

    def __init__(
        self, hidden_size: int, spec: ExpertsSpec, parameters: Parameters, prefix: str, kernels: Kernels
    ) -> None:
        self.kernels = kernels
        self.spec = spec
        num_experts, size = spec.router.num_experts, spec.intermediate_size
        router = parameters.take_weight(f"{prefix}.gate.weight", num_experts, hidden_size)
        bias = parameters.take(f"{prefix}.gate.bias", num_experts) if spec.router_bias else None
        self.router = kernels.linear(kernels.pack([router], dtype=torch.float32), bias, is_float32=True)
        self.correction_bias = self.expert_scales = None
        if spec.correction_bias:
            self.correction_bias = parameters.take(f"{prefix}.gate.e_score_correction_bias", num_experts).float()
        if spec.expert_scales:
            self.expert_scales = parameters.take(f"{prefix}.gate.expert_scales", num_experts).float()

        def linear(names: tuple[str, ...], num_outputs: int, num_inputs: int) -> ExpertLinearOp:
            experts = f"{prefix}.experts"
            weights = [
                [parameters.take_weight(f"{experts}.{index}.{name}.weight", num_outputs, num_inputs) for name in names]
                for index in range(num_experts)
            ]
            biases = [
                parameters.take(f"{experts}.{name}.bias", num_experts, num_outputs) for name in names if spec.bias
            ]
            return kernels.expert_linear(kernels.pack_experts(weights), torch.cat(biases, dim=1) if biases else None)

        self.gate_up_proj = linear(("gate_proj", "up_proj"), size, hidden_size)
        self.down_proj = linear(("down_proj",), hidden_size, size)
        self.shared = self.shared_gate = None
        if spec.shared is not None:
            self.shared = MLP(hidden_size, spec.shared, parameters, f"{prefix}.shared_experts", kernels)
        if spec.shared_gate:
            gate = parameters.take_weight(f"{prefix}.shared_expert_gate.weight", 1, hidden_size)
            self.shared_gate = kernels.linear(kernels.pack([gate], dtype=torch.float32), is_float32=True)

    @property
    def experts(self) -> Experts:
        return self

    def __call__(self, x: Tensor, lora_slots: Tensor, residual: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """Return the result for x [T, hidden_size], or add it to `residual` in place. `logits`: None: those for x."""
        kernels, spec = self.kernels, self.spec
        logits = self.router_logits(x) if logits is None else logits
        routing = kernels.route(logits, spec.router, self.correction_bias, self.expert_scales)
        gate, up = torch.split(self.gate_up_proj(x, routing), spec.intermediate_size, dim=1)
        hidden = kernels.act_and_mul(gate, up, spec.activation)
        del gate, up
        out = kernels.combine_experts(self.down_proj(hidden, routing), routing, residual)
        if self.shared is None or self.shared_gate is None:
            return out if self.shared is None else self.shared(x, lora_slots, out)
        kernels.add(out, kernels.gate_rows(self.shared(x, lora_slots, None), self.shared_gate(x)), 1.0)
        return out

    def router_logits(self, x: Tensor) -> Tensor:
        return self.router(x)
