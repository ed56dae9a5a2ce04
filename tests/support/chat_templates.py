"""Chat templates of several styles, a conversation, and a byte-level tokenizer with many special tokens."""

from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.text.templates.chat_template import ChatTemplate
from server.text.templates.sandbox import SandboxedTemplate
from server.text.tokenizer import Tokenizer, TokenizerConfig

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

PARTS = """\
{%- for message in messages %}
    {%- if loop.index > 50 %}{% break %}{% endif %}
    {{- '<|im_start|>' + message.role + ':' }}
    {%- if message.content is string %}{{- message.content }}
    {%- else %}{%- for part in message.content %}{%- if part.type == 'text' %}{{- part.text }}{%- endif %}{%- endfor %}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}"""

PARTS_ONLY = """\
{%- for message in messages %}{{- '<|im_start|>' + message.role + ':' }}
{%- for part in message.content %}{%- if part.type == 'text' %}{{- part.text }}{%- endif %}{%- endfor %}
{%- endfor %}"""

# Some models' templates build a control token around the role.
ROLE_BUILT = (
    "{% for message in messages %}{% generation %}{{ '<|' + message.role + '|>' + message.content + '<|im_end|>' }}"
    "{% endgeneration %}{% endfor %}"
)

# Templates look into what an assistant wrote, and cut its thoughts away.
REASONING = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}
{%- endfor %}"""

USER = {"role": "user", "content": 'Hi <b>there</b>, it\'s 5 > 3 & "ok" \u00fc\u4e2d\n'}
CHAT = [USER, {"role": "assistant", "content": " Hello "}, {"role": "user", "content": "Bye"}]
SYSTEM_CHAT = [{"role": "system", "content": " Be brief. "}, *CHAT]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<a> & 'é'", "parameters": {"type": "object"}}}]


SPECIAL_TOKENS = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[INST]", "[/INST]"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>"),
)


def chat_template(source: str) -> ChatTemplate:
    return ChatTemplate(SandboxedTemplate(source), bos_token="<s>", eos_token="</s>")


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def transformers_oracle() -> PreTrainedTokenizerFast:
    """Return a tokenizer of transformers to compare rendered prompts with."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizers.Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )


def byte_tokenizer(special_tokens: Sequence[str] = SPECIAL_TOKENS, prefix_space: str | None = None) -> Tokenizer:
    """Return a tokenizer of bytes and a few merges. `prefix_space` is sentencepiece's scheme: "first" or "always"."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)] if prefix_space else pre_tokenizers.ByteLevel.alphabet()
    merges = [("h", "i"), ("e", "n"), ("en", "d"), ("|", ">"), ("<", "|"), ("i", "m"), ("▁", "h")]
    chars = ["▁", *map(chr, range(33, 127))] if prefix_space else ["▁"]
    words = [*SPECIAL_TOKENS, *sorted(byte_tokens), *chars, *("".join(merge) for merge in merges)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=prefix_space is not None))
    if prefix_space:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix_space, split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return Tokenizer(backend, TokenizerConfig(None, None, None, backend.get_vocab_size()))


def controls(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    return [tokenizer.token_bytes(token_id).decode() for token_id in token_ids if token_id in tokenizer.special_ids]


def text_of(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """Return the text of token ids, special tokens included."""
    return b"".join(map(tokenizer.token_bytes, token_ids)).decode()
