"""OpenAI's reference of the harmony format, and the chat template of gpt-oss."""

import base64
import functools
import os
import struct
import tempfile
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import openai_harmony

from tests.support.tiny_tokenizer_model import write_tiny_model

TEMPLATE = Path(__file__).with_name("gpt_oss.jinja")  # of openai/gpt-oss-120b, Apache-2.0
MARKERS = tuple(f"<|{name}|>" for name in ("start", "channel", "constrain", "message", "end", "call", "return"))
VOCABULARY = "o200k_base.tiktoken"


@functools.cache
def harmony_encoding() -> openai_harmony.HarmonyEncoding:
    """Return the encoding of gpt-oss. If quicktok is installed, its vocabulary spares a download.

    openai-harmony checks the hash of the vocabulary.
    """
    if "TIKTOKEN_ENCODINGS_BASE" in os.environ or find_spec("quicktok") is None:
        return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / VOCABULARY).write_text(_o200k_base())
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = folder
        try:
            return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
        finally:
            del os.environ["TIKTOKEN_ENCODINGS_BASE"]


def _o200k_base() -> str:
    """Return the vocabulary in tiktoken's format: a line for each token, with its bytes in base64 and its rank."""
    data = Path(str(distribution("quicktok-v1").locate_file("quicktok/data/o200k.vocab"))).read_bytes()
    (num_tokens,) = struct.unpack_from("<I", data)
    position, lines = 4, []
    for _ in range(num_tokens):
        (length,) = struct.unpack_from("<H", data, position)
        token = data[position + 2 : position + 2 + length]
        (rank,) = struct.unpack_from("<I", data, position + 2 + length)
        position += 6 + length
        lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
    return "".join(lines)


def write_harmony_model(folder: Path, *, special_markers: bool = True) -> Path:
    """Write a model folder with the template of gpt-oss. With `special_markers` the markers are control tokens."""
    markers = MARKERS if special_markers else ()
    return write_tiny_model(folder, *markers, template=TEMPLATE.read_text())
