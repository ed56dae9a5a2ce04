"""The LoRA adapters of a model (Hu et al. 2021): which are loaded, and in which of its places their matrices lie.

Requests with different adapters run in one step: each row of a batch says which place is its own, and each product of
the model adds B (A x) with the matrices that lie there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.config import EngineConfig, ModelConfig
from engine.kernels import LoraWeights
from engine.messages import LoraAdapter
from engine.request import NO_ADAPTER
from engine.weights.lora import LoraCheckpoint, load_lora

if TYPE_CHECKING:
    from engine.model.decoder import Linear

DEFAULT_MAX_RANK = 16


@dataclass(frozen=True)
class Loaded:
    place: int
    adapter: LoraAdapter


class LoraAdapters:
    """Adapters by name. One that is forgotten keeps its place as long as a request uses it."""

    def __init__(self, linears: Sequence[Linear], num_places: int, max_rank: int) -> None:
        self.num_places = num_places
        self.max_rank = max_rank
        self._loaded: dict[str, Loaded] = {}
        self._linears = [(linear.names, linear.lora) for linear in linears if linear.lora is not None]

    def loaded(self) -> list[LoraAdapter]:
        """Those that are loaded, in the order in which they were."""
        return [loaded.adapter for loaded in self._loaded.values()]

    @property
    def num_bytes(self) -> int:
        """Of all places, whether they are taken or not."""
        return sum(weights.a.nbytes + weights.b.nbytes for _, weights in self._linears)

    def __bool__(self) -> bool:
        return self.num_places > 0

    def __contains__(self, name: str) -> bool:
        return not name or name in self._loaded

    def find(self, name: str) -> tuple[int, bytes]:
        """Its place, and what sets the keys and values apart that are computed with it; KeyError for an unknown one.

        No name is no adapter. What is set apart begins with a byte that no text has.
        """
        if not name:
            return NO_ADAPTER, b""
        loaded = self._loaded[name]
        return loaded.place, b"\xff" + bytes.fromhex(loaded.adapter.fingerprint)

    def load(
        self, name: str, path: str, checkpoint: LoraCheckpoint, in_use: Collection[int] = (), *, replaces: bool = False
    ) -> None:
        """Put an adapter into a place that no request has `in_use`.

        Raises:
            ValueError: its rank is too large, its name or all places are taken. The message is fit for a client.
        """
        if name in self._loaded and not replaces:
            raise ValueError(f"a LoRA adapter called {name} is loaded already")
        if checkpoint.rank > self.max_rank:
            raise ValueError(
                f"LoRA adapter {name}: rank {checkpoint.rank} is more than the {self.max_rank} of --max-lora-rank"
            )
        others = {loaded.place for other, loaded in self._loaded.items() if other != name}
        place = next((place for place in range(self.num_places) if place not in others and place not in in_use), None)
        if place is None:
            raise ValueError(f"LoRA adapter {name}: all {self.num_places} places of --max-loras are taken")
        for names, weights in self._linears:
            _fill(weights, place, names, checkpoint)
        adapter = LoraAdapter(name=name, path=path, rank=checkpoint.rank, fingerprint=checkpoint.fingerprint)
        self._loaded[name] = Loaded(place, adapter)

    def unload(self, name: str) -> None:
        """Forget an adapter; ValueError for an unknown one."""
        if self._loaded.pop(name, None) is None:
            raise ValueError(f"no LoRA adapter called {name} is loaded")


@torch.inference_mode()
def _fill(weights: LoraWeights, place: int, names: Sequence[str], checkpoint: LoraCheckpoint) -> None:
    """Write the matrices of one product's parts. What an adapter leaves out has rank 0."""
    first = 0
    for part, (name, size) in enumerate(zip(names, weights.sizes, strict=True)):
        matrices = checkpoint.modules.get(name)
        rank = 0 if matrices is None else len(matrices.a)
        weights.ranks[place, part] = rank
        if matrices is not None:
            weights.a[place, part, :rank] = matrices.a
            weights.b[place, :rank, first : first + size] = matrices.b.T
        first += size


def read_adapter(name: str, path: str, config: ModelConfig) -> LoraCheckpoint:
    """Read an adapter's matrices; ValueError that names it."""
    try:
        return load_lora(Path(path), config)
    except (ValueError, OSError) as error:
        raise ValueError(f"LoRA adapter {name}: {error}") from error


def choose_lora_rank(config: EngineConfig, checkpoints: Mapping[str, LoraCheckpoint]) -> int:
    """What places have room for."""
    largest = max((checkpoint.rank for checkpoint in checkpoints.values()), default=0)
    return config.max_lora_rank or max(DEFAULT_MAX_RANK, largest)
