"""A large language model in plain PyTorch, in the order of a textbook's chapter: text in, tokens out.

    python examples/textbook.py "Once upon a time" --max-tokens 20 --temperature 0

It needs no server, only the default model, SmolLM2-135M. It generates an answer in three ways: computing the whole text
again for each token, with a KV cache, and with flash attention as well. The tokens are the same each time, and those of
`lightwell serve --dtype float32 --quantization none`, also with a temperature and a seed (and `top_p` 1).

Shapes: T tokens, S tokens that they attend to, H query heads, KH heads of keys and values, D size of a head.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import gguf
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from server.model_paths import resolve_model

END_TOKENS = ("<|endoftext|>", "<|im_end|>")  # end an answer
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values -> outputs of the heads, as in `attention`
Choose = Callable[[Tensor, int], int]  # logits, position in the answer -> token id


@dataclass(frozen=True)
class Layer:
    """The weights of a layer, named as in Hugging Face's checkpoints. A matrix has a row for each output."""

    input_layernorm: Tensor  # [hidden_size]
    q_proj: Tensor  # [H * D, hidden_size]
    k_proj: Tensor  # [KH * D, hidden_size]
    v_proj: Tensor  # [KH * D, hidden_size]
    o_proj: Tensor  # [hidden_size, H * D]
    post_attention_layernorm: Tensor  # [hidden_size]
    gate_proj: Tensor  # [intermediate_size, hidden_size]
    up_proj: Tensor  # [intermediate_size, hidden_size]
    down_proj: Tensor  # [hidden_size, intermediate_size]


@dataclass(frozen=True)
class Model:
    """What the model's file holds: a tokenizer, weights and a few numbers."""

    tokenizer: Tokenizer
    embed_tokens: Tensor  # [vocab_size, hidden_size]
    layers: list[Layer]
    norm: Tensor  # [hidden_size]
    head_dim: int
    rope_theta: float
    rms_norm_eps: float


# 1. Text to token ids.
def byte_pair_tokenizer(tokens: list[str], merges: list[str], special: list[str]) -> Tokenizer:
    """Return a tokenizer by byte pair encoding (Sennrich et al. 2016).

    It splits text into words and digits, and these into bytes. Then it merges neighbours into longer and longer tokens,
    in the order of `merges`. The index of a token in `tokens` is its id. Special tokens are found as a whole.
    """
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [(left, right) for left, right in map(str.split, merges)]))
    digits, words = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


# 2. Embedding.
def embed(model: Model, token_ids: list[int]) -> Tensor:
    """Look up the vector of each token: [T, hidden_size]."""
    return model.embed_tokens[token_ids]


# 3. Queries, keys and values of each head.
def project(x: Tensor, weight: Tensor, head_dim: int) -> Tensor:
    """Multiply x [T, hidden_size] by a matrix [heads * D, hidden_size], and divide into heads: [heads, T, D]."""
    return (x @ weight.T).view(len(x), -1, head_dim).transpose(0, 1)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate pairs of dimensions of x [heads, T, D] by the positions [T] (rotary embedding, Su et al. 2021, eq. 34)."""
    # Pair i turns by position * theta^(-2 i / D). So the product of a query and a key depends on their distance alone.
    angles = positions[:, None] * theta ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])  # [T, D / 2]
    a, b = x[..., 0::2], x[..., 1::2]  # in Hugging Face's checkpoints, pairs are D / 2 apart
    rotated = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
    return torch.stack(rotated, dim=-1).flatten(-2)


# 4. Scores, causal mask, softmax, values.
def masked_scores(q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """Return q k^T / sqrt(D), how well queries [H, T, D] fit keys [H, S, D]: [H, T, S]; -infinity for later keys."""
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(k_positions > q_positions[:, None], float("-inf"))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v [H, T, D] of the last T of S tokens (Vaswani et al. 2017, eq. 1)."""
    k, v = repeat_kv(k, len(q)), repeat_kv(v, len(q))
    positions = torch.arange(k.shape[1])
    return torch.softmax(masked_scores(q, k, positions[-q.shape[1] :], positions), dim=-1) @ v


# 5. Grouped-query heads.
def repeat_kv(x: Tensor, num_heads: int) -> Tensor:
    """Repeat keys or values [KH, S, D] to [H, S, D]: each is of H / KH query heads (Ainslie et al. 2023)."""
    return x.repeat_interleave(num_heads // len(x), dim=0)


def self_attention(model: Model, layer: Layer, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Let each token of x [T, hidden_size] gather from itself and earlier ones. Return [T, hidden_size]."""
    q = rotate(project(x, layer.q_proj, model.head_dim), positions, model.rope_theta)
    k = rotate(project(x, layer.k_proj, model.head_dim), positions, model.rope_theta)
    v = project(x, layer.v_proj, model.head_dim)
    return attend(q, k, v).transpose(0, 1).flatten(1) @ layer.o_proj.T


# 6. Feed-forward.
def feed_forward(layer: Layer, x: Tensor) -> Tensor:
    """Return down(silu(gate(x)) * up(x)) of each token of x [T, hidden_size] (SwiGLU, Shazeer 2020)."""
    return (F.silu(x @ layer.gate_proj.T) * (x @ layer.up_proj.T)) @ layer.down_proj.T


# 7. Residuals and norm.
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide rows x [..., hidden_size] by their root mean square (Zhang and Sennrich 2019), and scale dimensions."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def decoder_layer(model: Model, layer: Layer, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Apply attention, then feed-forward, to the normed residual stream x [T, hidden_size], adding each to it."""
    x = x + self_attention(model, layer, rms_norm(x, layer.input_layernorm, model.rms_norm_eps), positions, attend)
    return x + feed_forward(layer, rms_norm(x, layer.post_attention_layernorm, model.rms_norm_eps))


# 8. The whole model: embedding, layers, LM head.
def next_token_logits(model: Model, token_ids: list[int], start: int, attends: list[Attend]) -> Tensor:
    """Return the logits [vocab_size] of the token after `token_ids`, which begin at position `start` of the text."""
    positions = torch.arange(start, start + len(token_ids))
    x = embed(model, token_ids)
    for layer, attend in zip(model.layers, attends, strict=True):
        x = decoder_layer(model, layer, x, positions, attend)
    return model.embed_tokens @ rms_norm(x[-1], model.norm, model.rms_norm_eps)  # the LM head is the same matrix


# 9. Greedy decoding, temperature, sampling.
def choose_token(logits: Tensor, position: int, temperature: float, seed: int) -> int:
    """Return the most likely token, or if there is a temperature, a sample of softmax(logits / temperature)."""
    if temperature > 0:  # Gumbel-max trick: adding this noise makes the largest logit a sample
        logits = logits / temperature + gumbel_noise(len(logits), seed, position)
    return int(logits.argmax())


def gumbel_noise(vocab_size: int, seed: int, position: int) -> Tensor:
    """Return -log(-log(u)) [vocab_size], where u are uniform: hashes of seed, position in the answer and token id."""
    x = seed + (position + 1) * 0x9E3779B97F4A7C15 & 2**64 - 1  # SplitMix64, as in engine/sampling/ops.py
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 2**64 - 1
    x ^= x >> 31
    bits = torch.arange(vocab_size) * 0x9E3779B1 & 2**32 - 1
    for key in (x & 2**32 - 1, x >> 32):  # MurmurHash3
        bits ^= key
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            bits = (bits ^ bits >> shift) * factor & 2**32 - 1
    u = ((bits & 2**31 - 1).float() + 0.5) * 2.0**-31
    return -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))  # 1 - u is uniform, too


# 10. The token fed back. With a KV cache (11), only new tokens are computed, otherwise the whole text.
def generate(model: Model, prompt: list[int], attends: list[Attend], has_cache: bool, choose: Choose) -> Iterator[int]:
    """Yield the token ids of an answer, up to a token that ends it."""
    token_ids, start = list(prompt), 0
    while len(token_ids) == len(prompt) or model.tokenizer.id_to_token(token_ids[-1]) not in END_TOKENS:
        logits = next_token_logits(model, token_ids[start:], start, attends)
        start = len(token_ids) if has_cache else 0
        token_ids.append(choose(logits, len(token_ids) - len(prompt)))
        yield token_ids[-1]


# 11. KV cache: the keys and values [KH, T, D] of a layer, from each step so far.
def attention_with_cache(attend: Attend, cache: list[tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Store the keys and values of new tokens, and let their queries attend to all that are stored."""
    cache.append((k, v))
    k, v = (torch.cat(parts, dim=1) for parts in zip(*cache, strict=True))
    return attend(q, k, v)


# 12. Flash attention: tile by tile with a running softmax.
def flash_attention(q: Tensor, k: Tensor, v: Tensor, tile: int = 16) -> Tensor:
    """Return what `attention` does, but never have all scores [H, T, S] in memory (Dao et al. 2022, 2023)."""
    k, v = repeat_kv(k, len(q)), repeat_kv(v, len(q))
    first, outputs = k.shape[1] - q.shape[1], []  # the position of the first query
    for rows in torch.split(torch.arange(q.shape[1]), tile):
        largest, total, output = torch.tensor(float("-inf")), torch.tensor(0.0), torch.tensor(0.0)
        for keys in torch.split(torch.arange(k.shape[1]), tile):
            scores = masked_scores(q[:, rows], k[:, keys], first + rows, keys)
            before, largest = largest, torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
            weights, shrink = torch.exp(scores - largest), torch.exp(before - largest)  # not above 1, so no overflow
            total = total * shrink + weights.sum(dim=-1, keepdim=True)
            output = output * shrink + weights @ v[:, keys]
        outputs.append(output / total)
    return torch.cat(outputs, dim=1)


def read_model(path: Path) -> Model:
    """Read a GGUF file of SmolLM2, and unpack its weights to float32."""
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    if (values.get("general.architecture"), values.get("tokenizer.ggml.pre")) != ("llama", "smollm"):
        raise SystemExit(f"{path} is not a SmolLM2")
    weights = {each.name: torch.tensor(gguf.dequantize(each.data, each.tensor_type)) for each in reader.tensors}
    names = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
    blocks = [f"blk.{index}" for index in range(values["llama.block_count"])]
    layers = [Layer(*(weights[f"{block}.{name}.weight"] for name in names)) for block in blocks]
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer = byte_pair_tokenizer(tokens, values["tokenizer.ggml.merges"], special)
    keys = ("rope.dimension_count", "rope.freq_base", "attention.layer_norm_rms_epsilon")
    numbers = [values[f"llama.{key}"] for key in keys]
    return Model(tokenizer, weights["token_embd.weight"], layers, weights["output_norm.weight"], *numbers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="Once upon a time", help="the text to continue (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=20, help="length of the answer in tokens (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers of sampling (%(default)s)")
    parser.add_argument("--model", default="smollm2-135m", help="SmolLM2, name or GGUF file (%(default)s)")
    arguments = parser.parse_args()
    model = read_model(resolve_model(arguments.model).path)
    prompt = model.tokenizer.encode(arguments.prompt).ids
    print(f"{'prompt':16} {prompt}")
    choose = partial(choose_token, temperature=arguments.temperature, seed=arguments.seed)
    ways = [("attention", attention, False), ("KV cache", attention, True), ("flash attention", flash_attention, True)]
    for name, attend, has_cache in ways:
        attends: list[Attend] = [
            partial(attention_with_cache, attend, []) if has_cache else attend for _ in model.layers
        ]
        answer = list(islice(generate(model, prompt, attends, has_cache, choose), arguments.max_tokens))
        print(f"{name:16} {answer}")
    print(arguments.prompt + model.tokenizer.decode(answer))
