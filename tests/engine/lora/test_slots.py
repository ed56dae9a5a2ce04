"""LoRA adapters on the real model: batch invariance in any mix of adapters, cached prefixes, and the state of slots."""

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from engine.config import EngineConfig, ModelConfig, load_model_config
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.lora.checkpoint import LoraCheckpoint, LoraMatrices
from engine.lora.slots import (
    AdapterError,
    AdapterGoneError,
    LoraAdapters,
    check_lora_memory,
    choose_lora_rank,
    read_adapter,
)
from engine.shared.messages import AdapterField, SamplingParams, Submit
from tests.support.answers import Answer, assert_same, make_engine, run
from tests.support.kernel_choice import choose_kernels, code_paths
from tests.support.lora_adapters import save_random_adapter
from tests.support.outputs import fingerprint_of

SEED = 31
NAMES = ["", "strong", "weak"]
LENGTHS = [1, 32, 33, 100, 257]


@pytest.fixture(scope="module")
def folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of three adapters: strong, weak and another."""
    config, folder = load_model_config(smollm2_path), tmp_path_factory.mktemp("adapters")
    save_random_adapter(folder / "strong", config, 1, ranks={"": 16})
    save_random_adapter(folder / "weak", config, 2, ranks={"q_proj": 3, "down_proj": 3}, strength=0.5)
    save_random_adapter(folder / "another", config, 3, ranks={"": 8})
    return folder


@pytest.fixture(scope="module")
def loaded(smollm2_path: Path, folder: Path) -> LoadedModel:
    return load(smollm2_path, folder)


def load(path: Path, folder: Path, kernels: str = "default", num_threads: int | None = None) -> LoadedModel:
    modules = {name: str(folder / name) for name in NAMES if name}
    with choose_kernels(kernels, num_threads):
        config = EngineConfig(model_path=str(path), max_model_len=1024, lora_modules=modules, max_loras=3)
        return load_model(config)


@pytest.fixture(scope="module")
def submits(loaded: LoadedModel) -> list[Submit]:
    """Return a request for each prompt with each adapter, greedy or sampled."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    submits: list[Submit] = []
    for length in LENGTHS:
        prompt = [rng.randrange(1000, 40000) for _ in range(length)]
        for name in NAMES:
            seed, temperature = rng.randrange(2**63), rng.choice([0.0, 0.9])
            params = SamplingParams(max_tokens=12, seed=seed, temperature=temperature, logprobs=3, ignore_eos=True)
            submits.append(submit_of(loaded, f"{length} {name}", prompt, name, params))
    return submits


def submit_of(loaded: LoadedModel, request_id: str, prompt: list[int], name: str, params: SamplingParams) -> Submit:
    submit = Submit(request_id=request_id, prompt_token_ids=prompt, params=params, arrival=0.0)
    return msgspec.structs.replace(submit, lora_name=name, lora_fingerprint=fingerprint_of(loaded, name))


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel, submits: list[Submit]) -> dict[tuple[str, int], Answer]:
    answers: dict[tuple[str, int], Answer] = {}
    for submit in submits:
        answers |= run(make_engine(loaded), [submit])
    return answers


@pytest.mark.parametrize(
    ("chunk", "num_blocks", "speculative"),
    [
        pytest.param(0, None, "off", marks=pytest.mark.long),
        pytest.param(7, None, "off", marks=pytest.mark.long),
        (64, None, "ngram"),
        (0, 40, "off"),
    ],
)
def test_the_same_answer_in_any_mix(
    chunk: int,
    num_blocks: int | None,
    speculative: str,
    loaded: LoadedModel,
    submits: list[Submit],
    alone: dict[tuple[str, int], Answer],
) -> None:
    """All in one batch: with whole prompts, with chunked prompts, with drafts, and with too few blocks."""
    for length in LENGTHS:
        first, *others = (alone[f"{length} {name}", 0][1] for name in NAMES)
        assert all(other != first for other in others)  # adapters make a difference
    engine = make_engine(loaded, chunk=chunk, num_blocks=num_blocks, speculative=speculative)
    shuffled = random.Random(SEED).sample(submits, len(submits))
    assert_same(run(engine, shuffled), alone)
    assert (engine.stats().preemptions_total > 0) == (num_blocks is not None)
    assert_same(run(engine, submits), alone)  # with cached prefixes


def test_slots_for_adapters_change_no_other_answer(
    smollm2_path: Path, submits: list[Submit], alone: dict[tuple[str, int], Answer]
) -> None:
    """A model without slots answers as one with slots answers requests without an adapter."""
    plain = load_model(EngineConfig(model_path=str(smollm2_path), max_model_len=1024))
    without = [submit for submit in submits if not submit.lora_name]
    assert_same(run(make_engine(plain), without), {(s.request_id, 0): alone[s.request_id, 0] for s in without})


@pytest.mark.long
@pytest.mark.parametrize("kernels", [*code_paths()[1:], "torch"])
def test_on_other_kernels(kernels: str, smollm2_path: Path, folder: Path, submits: list[Submit]) -> None:
    loaded = load(smollm2_path, folder, kernels, num_threads=2)
    some = submits[3:9]
    answers: dict[tuple[str, int], Answer] = {}
    for submit in some:
        answers |= run(make_engine(loaded), [submit])
    assert_same(run(make_engine(loaded, chunk=64), some), answers)


@pytest.mark.checklist("E14")
def test_prefixes_are_shared_by_requests_of_one_adapter_only(loaded: LoadedModel) -> None:
    engine = make_engine(loaded)
    prompt, params = list(range(1000, 1100)), SamplingParams(max_tokens=1)
    for expected in (0, 96):
        submits = [submit_of(loaded, name, prompt, name, params) for name in NAMES]
        assert num_cached_tokens(engine, submits) == {name: expected for name in NAMES}
    # No salt of a client matches an adapter's blocks.
    fingerprint = loaded.adapters.loaded()[0].fingerprint
    salts = (fingerprint, "\xff" + fingerprint, bytes.fromhex(fingerprint).decode("latin-1"))
    submits = [msgspec.structs.replace(submit_of(loaded, salt, prompt, "", params), cache_salt=salt) for salt in salts]
    assert num_cached_tokens(engine, submits) == {salt: 0 for salt in salts}


def num_cached_tokens(engine: Engine, submits: Sequence[Submit]) -> dict[str, int]:
    """Run all requests at once and return the number of cached prompt tokens of each."""
    for submit in submits:
        engine.add(submit)
    found: dict[str, int] = {}
    while engine.has_work:
        for event in engine.step()[1]:
            assert event.times is not None
            found[event.request_id] = event.times.num_cached_tokens
    return found


# The state of slots.


@pytest.fixture(scope="module")
def shape(smollm2_path: Path) -> ModelConfig:
    return load_model_config(smollm2_path)


def test_a_slot_is_free_if_neither_an_adapter_nor_a_request_uses_it() -> None:
    adapters = LoraAdapters([], 2, 16)
    for name in "ab":
        adapters.load(name, "path", checkpoint_of(name))
    with pytest.raises(AdapterError, match="2 adapters are loaded, as many as --max-loras allows"):
        adapters.check_name("c", replaces=False)
    a, b = (adapters.find(fingerprint_of_name(name)) for name in "ab")
    (spare,) = {0, 1, 2} - {a, b}
    adapters.unload("a")
    assert adapters.find(fingerprint_of_name("a")) == a  # for requests that were admitted for it
    assert [adapter.name for adapter in adapters.loaded()] == ["b"]
    assert adapters.reserve(in_use={spare, a}) is None
    assert adapters.reserve(in_use={spare}) == a
    with pytest.raises(AdapterGoneError):
        adapters.find(fingerprint_of_name("a"))
    assert adapters.reserve(in_use=()) == spare  # it has been empty for longer
    adapters.publish("b", "path", spare, checkpoint_of("c"))
    assert adapters.find(fingerprint_of_name("c")) == spare
    assert adapters.find(fingerprint_of_name("b")) == b
    assert adapters.reserve(in_use={a}) == b


def test_weights_in_two_slots_are_found_in_the_one_of_a_loaded_adapter() -> None:
    """So the other slot gets free once the requests that use it have ended."""
    adapters = LoraAdapters([], 2, 16)
    for name in "ab":
        adapters.load(name, "path", checkpoint_of("same"))
    first, second = (slot for slot in range(3) if slot != adapters.reserve(in_use=()))
    assert adapters.find(fingerprint_of_name("same")) == first
    adapters.unload("a")
    assert adapters.find(fingerprint_of_name("same")) == second


def test_what_cannot_be_loaded(folder: Path, shape: ModelConfig) -> None:
    adapters = LoraAdapters([], 2, 16)
    adapters.load("a", "path", checkpoint_of("a"))
    adapters.check_name("a", replaces=True)
    with pytest.raises(AdapterError, match="a LoRA adapter called a is loaded already") as error:
        adapters.check_name("a", replaces=False)
    assert error.value.field is AdapterField.NAME
    with pytest.raises(AdapterError, match="no LoRA adapter called b is loaded"):
        adapters.unload("b")
    with pytest.raises(AdapterError, match=r"LoRA adapter absent: .*absent") as error:
        read_adapter("absent", str(folder / "absent"), shape, 16)
    assert error.value.field is AdapterField.PATH
    with pytest.raises(AdapterError, match=r"LoRA adapter strong: .*rank 16 is more than the 15 of --max-lora-rank"):
        read_adapter("strong", str(folder / "strong"), shape, 15)


def fingerprint_of_name(name: str) -> str:
    return name.encode().hex()


def checkpoint_of(name: str, rank: int = 1) -> LoraCheckpoint:
    matrices = LoraMatrices(torch.zeros(rank, 4), torch.zeros(4, rank))
    return LoraCheckpoint({"x": matrices}, fingerprint_of_name(name))


@pytest.mark.parametrize(("ranks", "max_rank", "expected"), [((), None, 16), ((3, 64), None, 64), ((3, 64), 8, 8)])
def test_the_rank_that_slots_have_room_for(ranks: Sequence[int], max_rank: int | None, expected: int) -> None:
    config = EngineConfig(model_path="", max_lora_rank=max_rank)
    assert choose_lora_rank(config, {str(rank): checkpoint_of("x", rank) for rank in ranks}) == expected


def test_memory_of_slots(loaded: LoadedModel, smollm2_path: Path) -> None:
    config, adapters = loaded.config, loaded.adapters
    itemsize = loaded.dtype.itemsize
    check_lora_memory(config, 3, 16, itemsize, adapters.num_bytes)
    with pytest.raises(
        ValueError, match=r"--max-loras 3 of --max-lora-rank 16 take \d+ MiB, but only \d+ MiB are free"
    ):
        check_lora_memory(config, 3, 16, itemsize, adapters.num_bytes - 2**20)
    with pytest.raises(ValueError, match=r"--max-loras 65536 of --max-lora-rank 4096 take"):
        load_model(EngineConfig(model_path=str(smollm2_path), max_loras=65536, max_lora_rank=4096))


def test_without_slots() -> None:
    adapters = LoraAdapters([], 0, 16)
    assert adapters.find("") == -1
    assert adapters.num_bytes == 0
    assert adapters.reserve(in_use=()) is None
    with pytest.raises(AdapterError, match="0 adapters are loaded"):
        adapters.check_name("a", replaces=False)
