"""A model folder without weights, whose tokenizer has the 256 bytes and three special tokens."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from server.text.gguf_tokenizer import byte_alphabet

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
END_OF_TEXT_ID, IM_START_ID, IM_END_ID = 256, 257, 258
VOCAB_SIZE = 259
MAX_MODEL_LEN = 2048

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_model(folder: Path, *more_special: str, template: str = CHAT_TEMPLATE) -> Path:
    """Write the folder. Token id i < 256 is byte i; there is no BOS, and the EOS token is <|endoftext|>."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = (END_OF_TEXT, IM_START, IM_END, *more_special)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": END_OF_TEXT, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    return folder


TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": END_OF_TEXT_ID,
}


def chatml(*turns: tuple[str, str], opened: bool = True) -> list[int]:
    """Return the tokens that the ChatML template renders."""
    token_ids: list[int] = []
    for role, content in turns:
        token_ids += [IM_START_ID, *f"{role}\n{content}".encode(), IM_END_ID, ord("\n")]
    return token_ids + ([IM_START_ID, *b"assistant\n"] if opened else [])
