"""A small model on the Triton kernels, in Triton's interpreter: against transformers, and batch invariance."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from engine.config import EngineConfig, load_model_config
from engine.core import Engine
from engine.kernels.triton import kernels as triton_kernels
from engine.kernels.triton.kernels import TritonKernels
from engine.kernels.triton.tiles import AttentionTiles
from engine.shared.messages import SamplingParams, Submit, TokenLogprobs
from engine.startup import fingerprint
from tests.parity.test_families import SHAPE
from tests.parity.test_lora import logits_of, with_adapters
from tests.support.lora_adapters import save_random_adapter
from tests.support.outputs import all_logits, greedy_outputs
from tests.support.tiny_models import save_random_model
from tests.support.triton_models import SEED, load, prompt_of


def models() -> dict[str, PreTrainedModel]:
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "llama with biases": LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
        "mistral with a window": MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=37)),
    }


@pytest.mark.parametrize(
    "name",
    [
        "llama with biases",
        pytest.param("llama", marks=pytest.mark.long),
        pytest.param("mistral with a window", marks=pytest.mark.long),
    ],
)
def test_same_as_transformers(name: str, tmp_path: Path) -> None:
    model = models()[name]
    loaded = load(save_random_model(model, tmp_path, SEED))
    prompts = [prompt_of(length) for length in (1, 9, 45)]
    outputs = greedy_outputs(loaded, prompts, 4)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt + output])).logits[0]
        torch.testing.assert_close(all_logits(loaded, prompt), expected[: len(prompt)], rtol=0, atol=1e-3)
        assert output == expected[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


@pytest.mark.long
def test_adapters_are_those_of_peft(tmp_path: Path) -> None:
    """Rows with two adapters and without share a batch."""
    model = models()["llama"]
    folder = save_random_model(model, tmp_path / "model", SEED)
    config = load_model_config(folder)
    folders = {
        "all": save_random_adapter(tmp_path / "all", config, 1, ranks={"": 5}),
        "some": save_random_adapter(tmp_path / "some", config, 2, ranks={"k_proj": 16, "down_proj": 16}),
    }
    paths = {name: str(path) for name, path in folders.items()}
    loaded = load(folder, lora_modules=paths, max_loras=2)
    pairs = [(prompt_of(length), name) for length, name in ((1, "some"), (9, "all"), (20, ""), (20, "some"))]
    outputs = greedy_outputs(loaded, [prompt for prompt, _ in pairs], 3, [name for _, name in pairs])
    reference = with_adapters(model, folders)
    for (prompt, name), output in zip(pairs, outputs, strict=True):
        expected = logits_of(reference, name, prompt + output)
        torch.testing.assert_close(all_logits(loaded, prompt, name), expected[: len(prompt)], rtol=0, atol=1e-3)
        assert output == expected[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "kv_cache_dtype"), [("float32", "int8"), ("float16", "auto"), ("float16", "fp8")])
def test_the_same_request_gets_the_same_answer(
    dtype: str, kv_cache_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits are the same alone with split tiles, and in batches, chunks and with a cached prefix with whole ones."""
    loaded = load(save_random_model(models()["llama"], tmp_path, SEED), dtype, kv_cache_dtype=kv_cache_dtype)

    def answers(engine: Engine, lengths: tuple[int, ...]) -> dict[int, tuple[list[int], list[TokenLogprobs]]]:
        for length in lengths:
            params = SamplingParams(max_tokens=4, temperature=1.0, seed=length, logprobs=2, ignore_eos=True)
            engine.add(Submit(request_id=str(length), prompt_token_ids=prompt_of(length), params=params, arrival=0.0))
        found: dict[int, tuple[list[int], list[TokenLogprobs]]] = {length: ([], []) for length in lengths}
        while engine.has_work:
            for event in engine.step()[1]:
                token_ids, logprobs = found[int(event.request_id)]
                token_ids += event.token_ids
                logprobs += event.logprobs or []
        return found

    def engine(chunk: int = 0) -> Engine:
        return Engine(EngineConfig(model_path="", long_prefill_token_threshold=chunk), loaded)

    lengths = (5, 40)
    kernels = loaded.runner.kernels
    assert isinstance(kernels, TritonKernels)
    # Several segments for the longer prompts.
    monkeypatch.setattr(
        kernels, "tiles", dataclasses.replace(kernels.tiles, attention=AttentionTiles(16, 16, 32, 4, 2, programs=4))
    )
    loaded.runner.builder.planners = ()  # they were made for other tiles
    expected = {length: answers(engine(), (length,))[length] for length in lengths}
    monkeypatch.setattr(triton_kernels, "num_multiprocessors", lambda device: 0)  # one program for each KV head
    warm = engine(chunk=17)
    assert answers(warm, lengths) == expected
    assert answers(warm, lengths) == expected
    assert warm.scheduler.stats.prompt_tokens_cached_total > 0


@pytest.mark.long
def test_logits_are_not_rounded_to_the_type_of_the_model(tmp_path: Path) -> None:
    loaded = load(save_random_model(models()["llama"], tmp_path, SEED), "float16")
    logits = all_logits(loaded, prompt_of(20))
    assert logits.dtype == torch.float32
    assert (logits != logits.half().float()).float().mean() > 0.5


@pytest.mark.long
def test_without_the_promise(tmp_path: Path) -> None:
    """Products are torch's, and the fingerprint says that answers may vary."""
    folder = save_random_model(models()["llama with biases"], tmp_path, SEED)
    invariant, varying = load(folder), load(folder, batch_invariant=False)
    prompt = prompt_of(50)
    torch.testing.assert_close(all_logits(varying, prompt), all_logits(invariant, prompt), rtol=0, atol=1e-3)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(SEED))
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(SEED + 1))
    assert torch.equal(varying.runner.kernels.linear([weight])(x), torch.nn.functional.linear(x, weight))
    names = [fingerprint(str(folder), loaded) for loaded in (invariant, varying)]
    assert ["-invariant-" in name for name in names] == [True, False]
    assert ["-varying-" in name for name in names] == [False, True]
