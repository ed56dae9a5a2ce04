"""LoRA adapters on the real model: promise 1 in any mix of adapters, what the cache shares, and loading meanwhile."""

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from engine.config import EngineConfig, load_model_config
from engine.core import Engine
from engine.lora import LoraAdapters, choose_lora_rank, read_adapter
from engine.messages import SamplingParams, Submit
from engine.runner import LoadedModel, load_model
from engine.weights.lora import LoraCheckpoint, LoraMatrices, load_lora
from tests.choice import choose_kernels, code_paths
from tests.engine.test_promise import Answer, assert_same, make_engine, run
from tests.lora_adapters import save_random_adapter

SEED = 31
NAMES = ["", "strong", "weak"]
LENGTHS = [1, 5, 31, 32, 33, 64, 100, 200, 257]


@pytest.fixture(scope="module")
def folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of adapters: strong, weak and another."""
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
def submits() -> list[Submit]:
    """Each prompt with each adapter, greedy or sampled."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    submits: list[Submit] = []
    for length in LENGTHS:
        prompt = [rng.randrange(1000, 40000) for _ in range(length)]
        for name in NAMES:
            seed, temperature = rng.randrange(2**63), rng.choice([0.0, 0.9])
            params = SamplingParams(max_tokens=12, seed=seed, temperature=temperature, logprobs=3, ignore_eos=True)
            submits.append(submit_of(f"{length} {name}", prompt, name, params))
    return submits


def submit_of(request_id: str, prompt: list[int], name: str, params: SamplingParams) -> Submit:
    return Submit(request_id=request_id, prompt_token_ids=prompt, params=params, arrival=0.0, lora_name=name, n=1)


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel, submits: list[Submit]) -> dict[tuple[str, int], Answer]:
    answers: dict[tuple[str, int], Answer] = {}
    for submit in submits:
        answers |= run(make_engine(loaded), [submit])
    return answers


def test_adapters_make_a_difference(alone: dict[tuple[str, int], Answer]) -> None:
    for length in LENGTHS:
        first, *others = (alone[f"{length} {name}", 0][1] for name in NAMES)
        assert all(other != first for other in others)


@pytest.mark.parametrize(
    ("chunk", "num_blocks", "speculative"), [(0, None, "off"), (7, None, "off"), (64, None, "ngram"), (0, 40, "off")]
)
def test_the_same_answer_in_any_mix(
    chunk: int,
    num_blocks: int | None,
    speculative: str,
    loaded: LoadedModel,
    submits: list[Submit],
    alone: dict[tuple[str, int], Answer],
) -> None:
    """In one batch, in chunks of prompts, with guesses, and where blocks run out."""
    engine = make_engine(loaded, chunk=chunk, num_blocks=num_blocks, speculative=speculative)
    shuffled = random.Random(SEED).sample(submits, len(submits))
    assert_same(run(engine, shuffled), alone)
    assert (engine.stats().preemptions_total > 0) == (num_blocks is not None)
    assert_same(run(engine, submits), alone)  # with what the cache has kept


@pytest.mark.parametrize("kernels", [*code_paths()[1:], "torch"])
def test_on_other_kernels(kernels: str, smollm2_path: Path, folder: Path, submits: list[Submit]) -> None:
    loaded = load(smollm2_path, folder, kernels, num_threads=2)
    some = submits[6:12]
    answers: dict[tuple[str, int], Answer] = {}
    for submit in some:
        answers |= run(make_engine(loaded), [submit])
    assert_same(run(make_engine(loaded, chunk=64), some), answers)


def test_prefixes_are_shared_by_requests_of_one_adapter_only(loaded: LoadedModel) -> None:
    engine = make_engine(loaded)
    prompt, params = list(range(1000, 1100)), SamplingParams(max_tokens=1)
    for expected in (0, 96):
        submits = [submit_of(name, prompt, name, params) for name in NAMES]
        assert num_cached_tokens(engine, submits) == {name: expected for name in NAMES}
    # No salt leads into an adapter's blocks.
    fingerprint = loaded.adapters.loaded()[0].fingerprint
    salts = (fingerprint, "\xff" + fingerprint, bytes.fromhex(fingerprint).decode("latin-1"))
    submits = [msgspec.structs.replace(submit_of(salt, prompt, "", params), cache_salt=salt) for salt in salts]
    assert num_cached_tokens(engine, submits) == {salt: 0 for salt in salts}


def num_cached_tokens(engine: Engine, submits: Sequence[Submit]) -> dict[str, int]:
    """Of each request, all at once."""
    for submit in submits:
        engine.add(submit)
    found: dict[str, int] = {}
    while engine.has_work:
        for event in engine.step()[1]:
            assert event.times is not None
            found[event.request_id] = event.times.num_cached_tokens
    return found


# Loading while requests run.


@pytest.fixture
def own(smollm2_path: Path, folder: Path) -> LoadedModel:
    """Whose adapters a test may change: strong and weak, and one free place."""
    return load(smollm2_path, folder)


def answer_of(engine: Engine, submit: Submit) -> list[int]:
    ((token_ids, _),) = run(engine, [submit]).values()
    return token_ids


def test_a_request_keeps_its_adapter(own: LoadedModel, folder: Path) -> None:
    """Unloading or replacing it changes no answer that has begun, and its place is taken only after that."""
    config = own.config
    another = read_adapter("another", str(folder / "another"), config)
    greedy = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    prompt = list(range(2000, 2050))
    expected = {name: answer_of(make_engine(own), submit_of("r", prompt, name, greedy)) for name in NAMES}
    engine = make_engine(own)
    engine.load_adapter("another", "path", another)
    expected["another"] = answer_of(engine, submit_of("another", prompt, "another", greedy))
    assert len({tuple(answer) for answer in expected.values()}) == 4
    engine.adapters.unload("another")

    engine.add(submit_of("old", prompt, "strong", greedy))
    outputs: dict[str, list[int]] = {"old": [], "new": []}

    def step(times: int) -> None:
        for _ in range(times):
            for event in engine.step()[1]:
                outputs[event.request_id] += event.token_ids

    step(5)
    engine.load_adapter("strong", "elsewhere", another, replaces=True)  # takes the free place
    engine.add(submit_of("new", prompt, "strong", greedy))
    step(3)
    with pytest.raises(ValueError, match="all 3 places of --max-loras are taken"):
        engine.load_adapter("third", "path", another)
    engine.adapters.unload("strong")
    assert "strong" not in engine.adapters
    with pytest.raises(ValueError, match="all 3 places of --max-loras are taken"):
        engine.load_adapter("third", "path", another)
    while engine.has_work:
        step(1)
    assert outputs == {"old": expected["strong"], "new": expected["another"]}
    engine.load_adapter("third", "path", another)
    assert answer_of(engine, submit_of("r", prompt, "third", greedy)) == expected["another"]
    assert answer_of(engine, submit_of("weak", prompt, "weak", greedy)) == expected["weak"]
    assert [(adapter.name, adapter.path, adapter.rank) for adapter in engine.adapters.loaded()] == [
        ("weak", str(folder / "weak"), 3),
        ("third", "path", 8),
    ]


def test_a_smaller_adapter_leaves_nothing_of_the_one_before(own: LoadedModel, folder: Path) -> None:
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)
    prompt = list(range(3000, 3040))
    expected = run(make_engine(own), [submit_of("r", prompt, "weak", greedy)])
    engine = make_engine(own)
    weak = load_lora(folder / "weak", own.config)
    engine.load_adapter("strong", "path", weak, replaces=True)  # where the strong one was
    engine.load_adapter("strong", "path", weak, replaces=True)
    engine.load_adapter("strong", "path", weak, replaces=True)
    for name in ("weak", "strong"):
        assert run(engine, [submit_of("r", prompt, name, greedy)]) == expected


def test_what_cannot_be_loaded(own: LoadedModel, folder: Path, smollm2_path: Path) -> None:
    strong = load_lora(folder / "strong", own.config)
    adapters = own.adapters
    with pytest.raises(ValueError, match="a LoRA adapter called weak is loaded already"):
        adapters.load("weak", "path", strong)
    with pytest.raises(ValueError, match="no LoRA adapter called none is loaded"):
        adapters.unload("none")
    with pytest.raises(KeyError):
        adapters.find("none")
    high = checkpoint_of(rank=17)
    with pytest.raises(ValueError, match="LoRA adapter high: rank 17 is more than the 16 of --max-lora-rank"):
        adapters.load("high", "path", high)
    with pytest.raises(ValueError, match=r"LoRA adapter absent: .*absent"):
        read_adapter("absent", str(folder / "absent"), load_model_config(smollm2_path))
    assert [adapter.name for adapter in adapters.loaded()] == ["strong", "weak"]


def checkpoint_of(rank: int) -> LoraCheckpoint:
    return LoraCheckpoint({"x": LoraMatrices(torch.zeros(rank, 4), torch.zeros(4, rank))}, "00")


@pytest.mark.parametrize(("ranks", "wanted", "expected"), [((), None, 16), ((3, 64), None, 64), ((3, 64), 8, 8)])
def test_the_rank_that_places_have_room_for(ranks: Sequence[int], wanted: int | None, expected: int) -> None:
    config = EngineConfig(model_path="", max_lora_rank=wanted)
    assert choose_lora_rank(config, {str(rank): checkpoint_of(rank) for rank in ranks}) == expected


def test_without_places() -> None:
    adapters = LoraAdapters([], 0, 16)
    assert not adapters
    assert "" in adapters
    assert "any" not in adapters
    assert adapters.find("") == (-1, b"")
    assert adapters.num_bytes == 0
