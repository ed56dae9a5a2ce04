"""Shapes of Llama and Mistral compared with transformers, on small random models that it saves.

All in float32, with the C++ kernels if they support the shape, and in long runs with the plain torch kernels.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from engine.config import EngineConfig
from engine.loading import load_model
from tests.support.kernel_choice import choose_kernels, code_paths
from tests.support.outputs import all_logits, greedy_outputs
from tests.support.tiny_models import save_random_model

SEED = 7
VOCAB_SIZE = 256
NUM_OUTPUT_TOKENS = 12
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
THREE = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
ODD = {"hidden_size": 36, "intermediate_size": 77, "vocab_size": 131, "num_hidden_layers": 3}
SHAPES: dict[str, dict[str, Any]] = {
    "as many KV heads as heads": {"num_key_value_heads": 4, "attention_bias": True},
    "one KV head": {"num_key_value_heads": 1, "mlp_bias": True},
    "both biases, tied, 3 KV heads": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
    },
    "odd sizes": ODD | {"head_dim": 10},
    "odd sizes, heads of whole vectors": ODD | {"head_dim": 48, "rope_parameters": LINEAR},
    "llama3 scaling, other epsilon": {"rope_parameters": LLAMA3, "rms_norm_eps": 0.1},
    "heads of 256, three to a KV head": THREE | {"head_dim": 256},
    "gelu": {"hidden_act": "gelu"},
    "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "window of 1": {"sliding_window": 1},
    "window of 37, heads of whole vectors": {"sliding_window": 37, "head_dim": 80},
    "window over several key tiles": {"sliding_window": 300, "num_key_value_heads": 1},
    "window larger than the prompt": {"sliding_window": 5000},
}


def prompts_for(vocab_size: int) -> list[list[int]]:
    """Return prompts of one token, a block, more than one tile of keys, and more than several."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = (1, 32, 100, 700)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("kernels", ["default", pytest.param("torch", marks=pytest.mark.long)])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_shapes(changes: dict[str, Any], kernels: str, tmp_path: Path) -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**(SHAPE | changes)))
    if "sliding_window" in changes:
        model = MistralForCausalLM(MistralConfig(**(SHAPE | changes)))
    save_random_model(model, tmp_path, SEED)
    with choose_kernels(kernels):
        loaded = load_model(EngineConfig(model_path=str(tmp_path), dtype="float32"))
    in_cpp = kernels == "default" and bool(code_paths()) and loaded.config.layers[0].attention.head_dim % 16 == 0
    assert loaded.runner.kernels.name == (f"cpu {code_paths()[0]}" if in_cpp else "torch")
    prompts = prompts_for(loaded.config.vocab_size)
    outputs = greedy_outputs(loaded, prompts, NUM_OUTPUT_TOKENS)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt + output])).logits[0]
        torch.testing.assert_close(all_logits(loaded, prompt), expected[: len(prompt)], rtol=0, atol=1e-3)
        # Greedy decoding, step by step: each token is the most likely one after the tokens before it.
        assert output == expected[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
