"""Which files of a repository are a model, on the lists of files that real repositories have."""

from collections.abc import Sequence

import pytest

from server.parts.hub.names import HubError, HubName, select_files

BF16 = ["BF16/big-BF16-00001-of-00002.gguf", "BF16/big-BF16-00002-of-00002.gguf"]
UNSLOTH = [
    *(".gitattributes", *BF16, "README.md", "big-IQ4_XS.gguf", "big-Q4_K_M.gguf", "big-Q8_0.gguf"),
    *("big-UD-Q4_K_M.gguf", "big-UD-Q4_K_XL.gguf", "config.json"),
    *("imatrix_unsloth.gguf", "mmproj-BF16.gguf", "mtp-big-Q4_K_M.gguf"),
]
QWEN = ["qwen-q4_0-00001-of-00002.gguf", "qwen-q4_0-00002-of-00002.gguf", "qwen-q4_0.gguf", "qwen-q8_0.gguf"]
WANTED = {
    *("config.json", "generation_config.json", "chat_template.jinja", "tekken.json", "tokenizer.model"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
}
SAFETENSORS = [
    *sorted(WANTED),
    *("consolidated.safetensors", "modeling_custom.py", "original/params.json", "pytorch_model.bin"),
    "vision/model.safetensors",
]


FOUR = "a-Q4_0.gguf", "b-Q4_0.gguf"
PARTS = [f"m-Q4_0-{number:05}-of-00003.gguf" for number in (3, 1, 2)]
COMPANIONS = ["mmproj-a-Q4_K_M.gguf", "a-mmproj-Q4_K_M.gguf", "a-imatrix.gguf", "eagle3-a-Q4_0.gguf", "a.gguf"]


def select(paths: Sequence[str], choice: str = "") -> list[str]:
    """Select by a tag, or by a file."""
    kind = "file" if choice.endswith(".gguf") else "tag"
    return list(select_files(paths, HubName("org/name", **{kind: choice or None})))


def test_files() -> None:
    for paths, choice, files in (
        (UNSLOTH, "q4_k_m", ["big-Q4_K_M.gguf"]),
        (UNSLOTH, "UD-Q4_K_M", ["big-UD-Q4_K_M.gguf"]),
        (UNSLOTH, "Q4_K_XL", ["big-UD-Q4_K_XL.gguf"]),
        (UNSLOTH, "bf16", BF16),
        (["a-fp16.gguf"], "F16", ["a-fp16.gguf"]),
        (["a-F16.gguf"], "fp16", ["a-F16.gguf"]),
        (["small.gguf"], "", ["small.gguf"]),
        (["model-instruct.gguf", "model-base.gguf"], "base", ["model-base.gguf"]),
        (QWEN, "Q4_0", ["qwen-q4_0.gguf"]),  # the whole file is preferred to its parts
        (QWEN, QWEN[1], QWEN[:2]),
        (UNSLOTH, "big-q8_0.gguf", ["big-Q8_0.gguf"]),
        (UNSLOTH, BF16[0], BF16),
        (UNSLOTH, "mmproj-BF16.gguf", ["mmproj-BF16.gguf"]),
        (PARTS, "", sorted(PARTS)),
        # A sensible one, where none is named.
        (UNSLOTH, "", ["big-Q4_K_M.gguf"]),
        (["a-Q8_0.gguf", "a-Q4_0.gguf", "a-BF16.gguf"], "", ["a-Q4_0.gguf"]),
        (["a-Q2_K.gguf", "a-Q8_0.gguf"], "", ["a-Q8_0.gguf"]),
        (["gpt-oss-20b-mxfp4.gguf"], "", ["gpt-oss-20b-mxfp4.gguf"]),
        (["a-UD-Q4_K_XL.gguf", "a-Q4_0.gguf"], "", ["a-UD-Q4_K_XL.gguf"]),
        (["a-Q2_K.gguf", "a-Q3_K_S.gguf"], "", ["a-Q2_K.gguf"]),
        (["smtp-classifier-Q4_0.gguf"], "", ["smtp-classifier-Q4_0.gguf"]),  # it has the mark of a companion in it
        (COMPANIONS, "", ["a.gguf"]),
    ):
        assert select(paths, choice) == files, (paths, choice)


def test_safetensors() -> None:
    files = select(SAFETENSORS)
    assert set(files) == WANTED
    assert files[-1].endswith(".safetensors")
    assert set(select([*SAFETENSORS, "model-Q4_K_M.gguf"])) == set(files)
    assert "consolidated.safetensors" in select(["config.json", "consolidated.safetensors"])


HAS = "it has BF16, IQ4_XS, Q4_K_M, Q8_0, UD-Q4_K_M, UD-Q4_K_XL$"


@pytest.mark.parametrize(
    ("paths", "choice", "message"),
    [
        *((UNSLOTH, tag, f"has no .*; {HAS}") for tag in ("Q4", "Q4_K", "M", "K_M", "4_K_M", "Q4_K_M.", "0")),
        (["small.gguf"], "Q4_0", r"has no Q4_0; it has small\.gguf"),
        (
            UNSLOTH,
            "big-Q4_K_S.gguf",
            r"no file big-Q4_K_S\.gguf \(did you mean big-Q4_K_M\.gguf\?\); it has .*big-Q8_0",
        ),
        *((FOUR, tag, r"several files are Q4_0; give one as .*: a-Q4_0\.gguf, b-Q4_0\.gguf") for tag in ("", "Q4_0")),
        (BF16[:1], "BF16", "1 of 2 parts are there"),
        (["config.json", "pytorch_model.bin"], "", "only pickle files"),
        (["README.md"], "", "no model in safetensors .* and no GGUF file"),
        (["model.safetensors"], "", "no model in safetensors .with config.json"),
        (SAFETENSORS, "Q4_0", "no GGUF files .its weights are in safetensors: org/name"),
        (["mmproj-BF16.gguf"], "BF16", "no GGUF files"),
    ],
)
def test_repositories_without_one_such_model(paths: list[str], choice: str, message: str) -> None:
    with pytest.raises(HubError, match=message):
        select(paths, choice)
