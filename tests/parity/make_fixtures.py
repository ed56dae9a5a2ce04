"""Make the GGUF files of tests/parity/fixtures: small random models, written by llama.cpp's own converter.

    python -m tests.parity.make_fixtures LLAMA_CPP [NAME ...]

LLAMA_CPP is the source tree of llama.cpp (its converter needs sentencepiece), NAMEs are rows of FAMILIES; default: all.
"""

import json
import lzma
import runpy
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.family_models import FAMILIES, VOCAB_SIZE, read_config, save_family_model
from tests.support.trained_tokenizers import sentencepiece_model

FIXTURES = Path(__file__).parent / "fixtures"
SPECIAL_TOKENS = ["<|endoftext|>", "<|user|>", "<|observation|>", "[gMASK]"]


def main(llama_cpp: Path, names: list[str]) -> None:
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    for name in names or [name for name, family in FAMILIES.items() if family.gguf_architecture]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name  # the converter writes the name of the folder into the file
            save_family_model(name, folder)
            write_hub_config(name, folder)
            tokenizer_of(name)(folder)
            data = convert(llama_cpp, folder)
        packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
        (FIXTURES / f"{name}.gguf.xz").write_bytes(packed)
        print(f"{name}: {len(data)} bytes, {len(packed)} packed")


def convert(llama_cpp: Path, folder: Path) -> bytes:
    """Return the GGUF file that the converter makes of a folder, with float32 tensors.

    The converter tells pre-tokenizers apart by a hash that no tokenizer of ours has. It must see config.json as it is,
    where transformers would change it.
    """
    base: Any = import_module("conversion.base")

    output = folder / "model.gguf"
    arguments = ["convert_hf_to_gguf.py", str(folder), "--outtype", "f32", "--outfile", str(output)]
    arguments += ["--no-mtp"] * folder.name.startswith(("qwen3_5", "qwen3_next"))  # there are no later tokens' layers
    with (
        mock.patch.object(base.TextModel, "get_vocab_base_pre", return_value="smollm"),
        mock.patch.object(base.AutoConfig, "from_pretrained", side_effect=ValueError("read config.json")),
        mock.patch.object(sys, "argv", arguments),
    ):
        runpy.run_path(str(llama_cpp / arguments[0]), run_name="__main__")
    return output.read_bytes()


def write_hub_config(name: str, folder: Path) -> None:
    """Give config.json the spelling of the hub where transformers saves another that the converter does not know."""
    values = read_config(folder)
    if name == "granite4":
        values["layer_types"] = ["attention"] * len(values["layer_types"])
    (folder / "config.json").write_text(json.dumps(values))


def tokenizer_of(name: str) -> Callable[[Path], None]:
    """Return the function that writes a tokenizer that the converter accepts for a family."""
    if name.startswith("gemma4"):
        return write_byte_fallback_tokenizer
    return write_sentencepiece_tokenizer if name.startswith(("gemma", "ernie")) else write_byte_level_tokenizer


def write_byte_level_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the 256 bytes, a few merges and special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n")]
    vocab = {token: i for i, token in enumerate(letters + ["".join(pair) for pair in merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    # The converter of Phi 3 reads tokenizer.model unless this class is named.
    save_tokenizer(folder, tokenizer, "GPT2Tokenizer")


def write_byte_fallback_tokenizer(folder: Path) -> None:
    """Write a tokenizer as Gemma's: bytes only for what is not in the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [chr(ord("a") + i) for i in range(VOCAB_SIZE - len(tokens) - 1)] + ["th"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(tokens[:4])
    save_tokenizer(folder, tokenizer, "PreTrainedTokenizerFast")


def write_sentencepiece_tokenizer(folder: Path) -> None:
    """Write `tokenizer.model`, trained on a sentence."""
    options: dict[str, Any] = {"model_type": "bpe", "vocab_size": VOCAB_SIZE, "byte_fallback": True}
    model = sentencepiece_model(["the quick brown fox jumps over the lazy dog"] * 10, **options)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))


def save_tokenizer(folder: Path, tokenizer: Any, tokenizer_class: str) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
