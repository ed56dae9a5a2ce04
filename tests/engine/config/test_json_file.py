"""JSON files that no tool writes: each is a ValueError that names the file."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import load_model_config
from engine.config.fields import MAX_DEPTH, parse_json_object, read_json_object
from engine.config.tokenizer_files import read_added_tokens
from engine.parts.quantized.config import OTHER_FILES

HOSTILE = {
    "lists": (b'{"a": ' + 5000 * b"[", "more than 100 levels"),
    "closed": (b'{"a": ' + 500 * b"[" + 500 * b"]" + b"}", "more than 100 levels"),
    "digits": (b'{"a": ' + 100_000 * b"9" + b"}", "a number of 100000 digits"),
    "no text": (b'{"a": "\xff"}', "codec can't decode"),
    "cut": (b'{"a": ', "Expecting value"),
}
FILES: dict[str, Callable[[Path], object]] = {
    **dict.fromkeys(("config.json", "generation_config.json", *OTHER_FILES), load_model_config),
    **dict.fromkeys(("tokenizer_config.json", "added_tokens.json"), read_added_tokens),
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 8,
    "rms_norm_eps": 1e-5,
    **dict.fromkeys(SIZES, 8),
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("name", ["x.json", *FILES])
@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_content_that_no_tool_writes(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / name
    path.write_bytes(data)
    read: Callable[[Path], object] = FILES.get(name, lambda folder: read_json_object(folder / name))
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: not valid JSON (')}.*{message}"):
        read(tmp_path)


def test_limits(tmp_path: Path) -> None:
    nested = (MAX_DEPTH - 1) * b"[" + b"10" + (MAX_DEPTH - 1) * b"]"
    assert parse_json_object(tmp_path, b'{"a": ' + nested + b"}")
    with pytest.raises(ValueError, match="more than 100 levels"):
        parse_json_object(tmp_path, b'{"a": [' + nested + b"]}")
    assert parse_json_object(tmp_path, b'{"a": 1000000000000000019884624838656}') == {"a": int(1e30)}
    (tmp_path / "x").write_bytes(b"[1]")
    with pytest.raises(ValueError, match="x: must hold a JSON object"):
        read_json_object(tmp_path / "x")
    with pytest.raises(ValueError, match=r"x: not valid JSON \(larger than 2 bytes\)"):
        read_json_object(tmp_path / "x", 2)
    (tmp_path / "x").write_bytes(b"{}".ljust(16 << 20))
    assert read_json_object(tmp_path / "x") == {}
    (tmp_path / "x").write_bytes(b"{}".ljust((16 << 20) + 1))
    with pytest.raises(ValueError, match=r"x: not valid JSON \(larger than 16777216 bytes\)"):
        read_json_object(tmp_path / "x")
