"""The host launches a step without waiting for the device, whatever the settings of its requests.

On a CPU nothing tells, so what would wait on a GPU is looked for among the calls of torch: what reads a tensor's
numbers, and what copies to a device in the simple way. What the interpreter of Triton does itself does not count.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime.interpreter import InterpretedFunction

from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel
from engine.sampling import logprobs
from engine.shared.messages import ExtraSamplers, Pooling, ReasoningLimit, SamplingParams, Submit
from tests.support.tiny_models import SHAPE, save_random_model
from tests.support.triton_models import SEED, load, prompt_of

pytestmark = pytest.mark.long

READS = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.nonzero, Tensor.equal, Tensor.unique}
READS |= {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.masked_select}
READS |= {torch.nonzero, torch.equal, torch.unique, torch.masked_select, torch.multinomial}
COPIES = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
INDEXES = {Tensor.__getitem__, Tensor.__setitem__}


class Waits(TorchFunctionMode):
    """Records the operations that would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READS or func in COPIES or (func in INDEXES and reads_index(*args[1:])):
            self._note(func.__name__)
        is_copy = func is Tensor.to and torch.device in map(type, [*args, *kwargs.values()])
        if is_copy and not kwargs.get("non_blocking"):
            self._note("to")
        return func(*args, **kwargs)

    def _note(self, name: str) -> None:
        caller = traceback.extract_stack(limit=3)[0]
        self.found.append(f"{name} in {caller.name}, line {caller.lineno}")


def reads_index(index: Any, value: Any = None) -> bool:
    """Return whether indexing waits for the device.

    Lists, and a number assigned at indices on the device, are copied to the device; of a mask, the host must know how
    many elements it selects.
    """
    parts = index if isinstance(index, tuple) else (index,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    has_mask = any(part.dtype in (torch.bool, torch.uint8) for part in tensors)
    return has_mask or any(isinstance(part, list) for part in parts) or bool(tensors and isinstance(value, int | float))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Return a recorder that ignores Triton's interpreter. Log probabilities are computed as on a GPU."""

    def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                return function(*args, **kwargs)

        return call

    monkeypatch.setattr(InterpretedFunction, "run", unseen(InterpretedFunction.run))
    monkeypatch.setattr(logprobs, "_top_ids", logprobs._top_ids_by_keys)
    return Waits()


@contextmanager
def watched(loaded: LoadedModel, waits: Waits) -> Iterator[None]:
    runner = loaded.runner
    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "sample"):

            def within(method: Callable[..., Any], *args: Any) -> Any:
                with waits:
                    return method(*args)

            patch.setattr(runner, name, partial(within, getattr(runner, name)))
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    return load(save_random_model(model, tmp_path_factory.mktemp("model"), SEED), max_num_seqs=64)


def run(loaded: LoadedModel, all_params: Sequence[SamplingParams]) -> None:
    engine = Engine(EngineConfig(model_path="", speculative="off"), loaded)
    for number, params in enumerate(all_params):
        prompt = prompt_of(2 + number)
        engine.add(Submit(request_id=str(number), prompt_token_ids=prompt, params=params, arrival=0.0))
    while engine.has_work:
        for event in engine.step()[1]:
            assert event.error is None


SOME = partial(SamplingParams, max_tokens=3, ignore_eos=True)
ANY = partial(SOME, temperature=0.8)
ALL_SAMPLERS = ExtraSamplers(
    typical_p=0.9, top_n_sigma=2.0, xtc_probability=0.5, dry_multiplier=0.8, dry_allowed_length=0, repeat_last_n=9
)
EVERY = [
    SOME(temperature=0.0),
    ANY(),
    ANY(top_k=5, top_p=0.9, min_p=0.01),
    ANY(repetition_penalty=1.1, frequency_penalty=0.1, presence_penalty=0.2),
    ANY(logit_bias={3: 2.0, 5: -100.0}, min_tokens=3, stop_token_ids=[7]),
    ANY(logprobs=3),
    ANY(logprobs=3, post_sampling_probs=True),
    ANY(logprobs=0, logprob_token_ids=(1, 2)),
    ANY(reasoning_limit=ReasoningLimit(start_id=1, end_id=2, max_tokens=1, is_open=True)),  # a mask
    SOME(temperature=0.0, prompt_logprobs=2),
    ANY(allowed_token_ids=[3, 4, 5, 6]),
    ANY(bad_words=[(3,), (4, 5)], logit_bias={2: 1.0}, min_tokens=2),
    ANY(extra_samplers=ALL_SAMPLERS, presence_penalty=0.1),
    SOME(temperature=0.0, extra_samplers=ALL_SAMPLERS, top_k=4, top_p=0.9),
]


@pytest.mark.parametrize(
    "chosen",
    [EVERY, EVERY[-2:], EVERY[:1], EVERY[1:2], [SamplingParams(max_tokens=0, pooling=Pooling.MEAN), EVERY[0]]],
    ids=["every", "samplers", "greedy", "any", "embeddings"],
)
def test_nothing_waits(loaded: LoadedModel, waits: Waits, chosen: Sequence[SamplingParams]) -> None:
    with watched(loaded, waits):
        run(loaded, chosen)
    assert not waits.found


def test_mirostat_waits(loaded: LoadedModel, waits: Waits) -> None:
    """The host computes the tokens that it allows next, which depend on the sampled token."""
    with watched(loaded, waits):
        run(loaded, [ANY(extra_samplers=ExtraSamplers(mirostat=2, order=("temperature", "mirostat")))])
    assert {found.split(", ")[0] for found in waits.found} == {"tolist in _mirostat", "tolist in update_mirostat"}
