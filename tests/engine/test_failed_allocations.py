"""Any single allocation of the engine may fail: at most one request ends for it, and nothing is left behind.

As SQLite tests it: the same scenario is run again and again, and another allocation fails each time.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import EngineConfig, load_model_config
from engine.core import Engine
from engine.grammar.matcher import GrammarManager
from engine.loading import LoadedModel, load_model
from engine.scheduling.block_pool import BlockPool
from server.constrained.constraints import ConstraintBuilder
from server.text.tokenizer import Tokenizer
from tests.engine.test_api_connections import Connected
from tests.support.answers import Answers, errors_of
from tests.support.examples import drawn
from tests.support.lora_adapters import save_random_adapter
from tests.support.outputs import fingerprint_of
from tests.support.submits import new_submit

COVERED = {"preemptions_total", "prefix_cache_hits_total", "accepted_tokens_total"}
NUM_BLOCKS = 12  # of 16 tokens: too few for all requests
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


class Kind(Enum):
    """What an allocation is for, and the error when it fails."""

    TENSOR = torch.OutOfMemoryError("tensor")
    ARRAY = MemoryError("array")
    BLOCK = MemoryError("block")
    MESSAGE = MemoryError("message")


class Allocations:
    """Counts allocations of each kind, and lets one fail."""

    def __init__(self, kind: Kind | None = None, number: int = 0) -> None:
        self.failing = (kind, number)
        self.counts: Counter[Kind] = Counter()

    def count(self, kind: Kind) -> None:
        self.counts[kind] += 1
        if self.failing == (kind, self.counts[kind]):
            raise kind.value

    def before(self, kind: Kind, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            self.count(kind)
            return function(*args, **settings)

        return call


class Tensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators of torch that return new tensors."""

    def __init__(self, allocations: Allocations) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocations = allocations

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), settings: Any = None) -> Any:
        returns = function._schema.returns
        if any(str(value.type) == "Tensor" and value.alias_info is None for value in returns):
            self.allocations.count(Kind.TENSOR)
        return function(*args, **(settings or {}))


class Arrays:
    """The module numpy, with its functions counted."""

    def __init__(self, allocations: Allocations) -> None:
        self.allocations = allocations

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        is_function = callable(value) and not isinstance(value, type | np.ufunc)
        return self.allocations.before(Kind.ARRAY, value) if is_function else value


@contextmanager
def counted(allocations: Allocations, connected: Connected) -> Iterator[None]:
    encoder = mock.Mock(encode=allocations.before(Kind.MESSAGE, connected.connections.encoder.encode))
    take = allocations.before(Kind.BLOCK, BlockPool._take)
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("engine.") and hasattr(module, "np"):
                stack.enter_context(mock.patch.object(module, "np", Arrays(allocations)))
        stack.enter_context(mock.patch.object(connected.connections, "encoder", encoder))
        stack.enter_context(mock.patch.object(BlockPool, "_take", take))
        stack.enter_context(Tensors(allocations))
        yield


class Scenario:
    """Two tenants' requests: with a grammar, log probabilities, a LoRA adapter, drafts, and a prefix in common."""

    def __init__(self, path: Path, loaded: LoadedModel) -> None:
        self.seen: set[str] = set()
        tokenizer = Tokenizer.from_model(path)
        self.loaded = dataclasses.replace(loaded, memory=dataclasses.replace(loaded.memory, num_blocks=NUM_BLOCKS))
        self.grammars = GrammarManager(loaded.config.eos_token_ids, loaded.config.num_token_ids)
        self.grammars.set_tokenizer(tokenizer.to_json())
        self.grammars.prepare()
        prompt = tokenizer.encode("One two three four. " * 20)[:42]  # the answers reach into another block
        new = partial(new_submit, prompt, max_tokens=12, ignore_eos=True)
        adapter = {"lora_name": "a", "lora_fingerprint": fingerprint_of(loaded, "a")}
        grammar = ConstraintBuilder({}).json_schema(SCHEMA, "schema").grammar
        self.submits = [
            new("grammar", tenant="a", grammar=grammar, ignore_eos=False),
            new("logprobs", tenant="b", n=2, logprobs=3, seed=5),
            new("prompt", tenant="b", prompt_logprobs=1, repetition_penalty=1.2, temperature=0.0),
            new("lora", tenant="a", **adapter, top_p=0.9, temperature=0.7, seed=7),
        ]

    def run(self, allocations: Allocations, *, overlaps: bool) -> Answers:
        config = EngineConfig(
            model_path="", speculative="off" if overlaps else "ngram", long_prefill_token_threshold=24
        )
        engine = Engine(config, self.loaded, overlaps=overlaps)
        engine.grammars = self.grammars
        connected = Connected(engine)
        try:
            with counted(allocations, connected):
                answers = connected.run(self.submits)
        finally:
            connected.close()
        self.seen |= {name for name in COVERED if getattr(engine.scheduler.current_stats(), name)}
        assert not list(engine.scheduler.requests())
        return answers


@pytest.fixture(scope="module")
def scenario(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    folder = tmp_path_factory.mktemp("adapters")
    save_random_adapter(folder / "a", load_model_config(smollm2_path), 1, ranks={"": 4})
    config = EngineConfig(
        model_path=str(smollm2_path),
        max_model_len=128,
        block_size=16,
        max_num_seqs=8,
        max_loras=1,
        lora_modules={"a": str(folder / "a")},
    )
    return Scenario(smollm2_path, load_model(config))


@pytest.mark.drawn
@pytest.mark.checklist("F02", "F03")
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())
def test_an_allocation_fails(scenario: Scenario, kind: Kind, *, overlaps: bool) -> None:
    counting = Allocations()
    expected = scenario.run(counting, overlaps=overlaps)
    assert not errors_of(expected)
    for number in drawn(counting.counts[kind], 3, 10):
        answers = scenario.run(Allocations(kind, number), overlaps=overlaps)
        assert len({name for name, _ in errors_of(answers)}) <= 1, number
        assert answers.keys() == expected.keys()
        for choice, answer in answers.items():
            if answer.error is None:
                assert answer == expected[choice], number
            else:
                assert answer.token_ids == expected[choice].token_ids[: len(answer.token_ids)], number


def test_the_scenario_has_all_that_it_is_for(scenario: Scenario) -> None:
    """Which request comes first is a matter of time, so no single run needs to have all."""
    for _ in range(10):
        if scenario.seen != COVERED:
            scenario.run(Allocations(), overlaps=False)
    assert scenario.seen == COVERED
