"""The LoRA adapters of a model (Hu et al. 2021): which are loaded, and in which of its places their matrices lie.

Requests with different adapters run in one step: each row of a batch says which place is its own, and each product of
the model adds B (A x) with the matrices that lie there. A request names the weights that it was promised, by their
fingerprint; they can be found after their name is gone, or has become another's, until the place is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.batch.transfer import send, to_device
from engine.config import EngineConfig, ModelConfig
from engine.kernels.interface import LoraWeights
from engine.lora.reader import LoraCheckpoint, load_lora, module_shapes
from engine.model.kv_cache import MIB
from engine.scheduling.request import NO_PLACE
from engine.shared.messages import AdapterField, LoraAdapter

if TYPE_CHECKING:
    from engine.model.decoder import Linear

DEFAULT_MAX_RANK = 16
NOTHING = ""  # the fingerprint of what lies in an empty place


class AdapterError(ValueError):
    """An adapter that cannot be loaded, or not now. The message is fit for the client that asked."""

    def __init__(self, message: str, field: AdapterField | None = None, *, is_temporary: bool = False) -> None:
        super().__init__(message)
        self.field = field
        self.is_temporary = is_temporary


class AdapterGoneError(LookupError):
    """The weights that a request was promised lie nowhere any more."""


@dataclass(frozen=True)
class Loaded:
    place: int
    adapter: LoraAdapter


class LoraAdapters:
    """Adapters by name, and what lies in each place.

    There is a place more than adapters can be loaded, so that one can be replaced while requests use it.
    """

    def __init__(self, linears: Sequence[Linear], max_loras: int, max_rank: int) -> None:
        self.max_loras = max_loras
        self.max_rank = max_rank
        self._linears = [(linear.names, linear.lora) for linear in linears if linear.lora is not None]
        self._loaded: dict[str, Loaded] = {}
        self._contents = [NOTHING] * num_places(max_loras)  # fingerprints
        self._left = [0] * len(self._contents)  # when its adapter was forgotten
        self._ticks = itertools.count(1)

    def loaded(self) -> list[LoraAdapter]:
        """Those that have a name, in the order in which they got it."""
        return [loaded.adapter for loaded in self._loaded.values()]

    @property
    def num_bytes(self) -> int:
        """Of all places, whether they are taken or not."""
        return sum(weights.a.nbytes + weights.b.nbytes for _, weights in self._linears)

    def find(self, fingerprint: str) -> int:
        """Where those weights lie; none lie nowhere. Raises AdapterGoneError."""
        if not fingerprint:
            return NO_PLACE
        for loaded in self._loaded.values():  # first, so that the others come free
            if loaded.adapter.fingerprint == fingerprint:
                return loaded.place
        if fingerprint not in self._contents:
            raise AdapterGoneError(fingerprint)
        return self._contents.index(fingerprint)

    def check(self, name: str, *, replaces: bool) -> None:
        """Raise AdapterError where an adapter of that name cannot be loaded, whatever it is."""
        if name in self._loaded and not replaces:
            raise AdapterError(f"a LoRA adapter called {name} is loaded already", AdapterField.NAME)
        if name not in self._loaded and len(self._loaded) >= self.max_loras:
            raise AdapterError(
                f"LoRA adapter {name}: {self.max_loras} adapters are loaded, as many as --max-loras allows"
            )

    def reserve(self, in_use: Collection[int]) -> int | None:
        """A place that is no adapter's and that no request has `in_use`; None where there is none now.

        Of several, that whose adapter was forgotten first. From now on it holds nothing.
        """
        taken = {loaded.place for loaded in self._loaded.values()}.union(in_use)
        free = [place for place in range(len(self._contents)) if place not in taken]
        if not free:
            return None
        place = min(free, key=lambda place: self._left[place])
        self._contents[place] = NOTHING
        return place

    def write(self, place: int, checkpoint: LoraCheckpoint) -> Iterator[None]:
        """Write the matrices into a reserved place, one product at a time."""
        for names, weights in self._linears:
            _write(weights, place, names, checkpoint)
            yield

    def publish(self, name: str, path: str, place: int, checkpoint: LoraCheckpoint) -> None:
        """Give the name to what has been written to a place."""
        self._forget(name)
        self._contents[place] = checkpoint.fingerprint
        adapter = LoraAdapter(name=name, path=path, rank=checkpoint.rank, fingerprint=checkpoint.fingerprint)
        self._loaded[name] = Loaded(place, adapter)

    def load(self, name: str, path: str, checkpoint: LoraCheckpoint) -> None:
        """All of it at once, where no request runs. Raises AdapterError."""
        self.check(name, replaces=False)
        place = self.reserve(in_use=())
        assert place is not None
        for _ in self.write(place, checkpoint):
            pass
        self.publish(name, path, place, checkpoint)

    def unload(self, name: str) -> None:
        """Take the name away. Raises AdapterError for an unknown one."""
        if name not in self._loaded:
            raise AdapterError(f"no LoRA adapter called {name} is loaded", AdapterField.NAME)
        self._forget(name)

    def _forget(self, name: str) -> None:
        if (loaded := self._loaded.pop(name, None)) is not None:
            self._left[loaded.place] = next(self._ticks)


@torch.inference_mode()
def _write(weights: LoraWeights, place: int, names: Sequence[str], checkpoint: LoraCheckpoint) -> None:
    """The matrices of one product's parts. What an adapter leaves out has rank 0."""
    device = weights.ranks.device
    first = 0
    ranks = [0] * len(names)
    for part, (name, size) in enumerate(zip(names, weights.sizes, strict=True)):
        if (matrices := checkpoint.modules.get(name)) is not None:
            rank = ranks[part] = len(matrices.a)
            weights.a[place, part, :rank] = send(matrices.a, device)
            weights.b[place, :rank, first : first + size] = send(matrices.b, device).T
        first += size
    weights.ranks[place] = to_device(ranks, np.int64, device)


def num_places(max_loras: int) -> int:
    return max_loras + 1 if max_loras else 0


def prefix_salt(fingerprint: str) -> bytes:
    """What sets the keys and values apart that are computed with an adapter. It begins with a byte that no text has."""
    return b"\xff" + bytes.fromhex(fingerprint) if fingerprint else b""


def read_adapter(name: str, path: str, config: ModelConfig, max_rank: int | None) -> LoraCheckpoint:
    """Read an adapter's matrices, of at most that rank. Raises AdapterError, which names the adapter."""
    try:
        return load_lora(Path(path), config, max_rank)
    except ValueError as error:
        raise AdapterError(f"LoRA adapter {name}: {error}", AdapterField.PATH) from error


def check_lora_memory(config: ModelConfig, max_loras: int, rank: int, itemsize: int, free: int) -> None:
    """ValueError where places take more memory than there is. `itemsize` and `free` are bytes."""
    numbers = sum(num_inputs + num_outputs for num_outputs, num_inputs in module_shapes(config).values())
    wanted = num_places(max_loras) * rank * numbers * config.num_hidden_layers * itemsize
    if wanted > free:
        raise ValueError(
            f"--max-loras {max_loras} of --max-lora-rank {rank} take {wanted / MIB:.0f} MiB, but only "
            f"{free / MIB:.0f} MiB are free"
        )


def choose_lora_rank(config: EngineConfig, checkpoints: Mapping[str, LoraCheckpoint]) -> int:
    """What places have room for."""
    largest = max((checkpoint.rank for checkpoint in checkpoints.values()), default=0)
    return config.max_lora_rank or max(DEFAULT_MAX_RANK, largest)
