"""Which files of a repository are a model, on the lists of files that real repositories have."""

import pytest

from server.hub.errors import HubError
from server.hub.files import gguf_models, select_files
from server.hub.names import HubName

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


def select(paths: list[str], file: str | None = None, tag: str | None = None) -> list[str]:
    return list(select_files(paths, HubName("org/name", file=file, tag=tag)))


def test_a_tag() -> None:
    for tag, files in (
        ("q4_k_m", ["big-Q4_K_M.gguf"]),
        ("UD-Q4_K_M", ["big-UD-Q4_K_M.gguf"]),
        ("Q4_K_XL", ["big-UD-Q4_K_XL.gguf"]),
        ("bf16", BF16),
        ("Q8_0", ["big-Q8_0.gguf"]),
    ):
        assert select(UNSLOTH, tag=tag) == files, tag


@pytest.mark.parametrize("tag", ["Q4", "Q4_K", "M", "K_M", "4_K_M", "Q4_K_M.", "0"])
def test_a_tag_is_not_a_part_of_a_name(tag: str) -> None:
    with pytest.raises(HubError, match=r"has no .*; it has BF16, IQ4_XS, Q4_K_M, Q8_0, UD-Q4_K_M, UD-Q4_K_XL$"):
        select(UNSLOTH, tag=tag)


def test_other_names() -> None:
    assert select(["a-fp16.gguf"], tag="F16") == ["a-fp16.gguf"]
    assert select(["a-F16.gguf"], tag="fp16") == ["a-F16.gguf"]
    assert select(["small.gguf"]) == ["small.gguf"]
    assert select(["model-instruct.gguf", "model-base.gguf"], tag="base") == ["model-base.gguf"]
    with pytest.raises(HubError, match=r"has no Q4_0; it has small\.gguf"):
        select(["small.gguf"], tag="Q4_0")
    assert select(QWEN, tag="Q4_0") == ["qwen-q4_0.gguf"]  # the whole file is preferred to its parts
    assert select(QWEN, file=QWEN[1]) == QWEN[:2]


def test_a_sensible_file() -> None:
    for paths, file in (
        (UNSLOTH, "big-Q4_K_M.gguf"),
        (["a-Q8_0.gguf", "a-Q4_0.gguf", "a-BF16.gguf"], "a-Q4_0.gguf"),
        (["a-Q2_K.gguf", "a-Q8_0.gguf"], "a-Q8_0.gguf"),
        (["gpt-oss-20b-mxfp4.gguf"], "gpt-oss-20b-mxfp4.gguf"),
        (["a-UD-Q4_K_XL.gguf", "a-Q4_0.gguf"], "a-UD-Q4_K_XL.gguf"),
        (["a-Q2_K.gguf", "a-Q3_K_S.gguf"], "a-Q2_K.gguf"),
        (["smtp-classifier-Q4_0.gguf"], "smtp-classifier-Q4_0.gguf"),  # it has the mark of a companion in it
        (["mmproj-a-Q4_K_M.gguf", "a-mmproj-Q4_K_M.gguf", "a-imatrix.gguf", "eagle3-a-Q4_0.gguf", "a.gguf"], "a.gguf"),
    ):
        assert select(paths) == [file], paths


def test_a_file() -> None:
    assert select(UNSLOTH, file="big-Q8_0.gguf") == ["big-Q8_0.gguf"]
    assert select(UNSLOTH, file="big-q8_0.gguf") == ["big-Q8_0.gguf"]
    assert select(UNSLOTH, file="BF16/big-BF16-00001-of-00002.gguf") == BF16
    assert select(UNSLOTH, file="mmproj-BF16.gguf") == ["mmproj-BF16.gguf"]
    with pytest.raises(
        HubError, match=r"no file big-Q4_K_S\.gguf \(did you mean big-Q4_K_M\.gguf\?\); it has .*big-Q8_0"
    ):
        select(UNSLOTH, file="big-Q4_K_S.gguf")


def test_parts_are_in_order() -> None:
    paths = [f"m-Q4_0-{number:05}-of-00003.gguf" for number in (3, 1, 2)]
    assert select(paths) == sorted(paths)
    assert gguf_models(paths)[0].number_format == "Q4_0"


def test_safetensors() -> None:
    files = select(SAFETENSORS)
    assert set(files) == WANTED
    assert files[-1].endswith(".safetensors")
    assert set(select([*SAFETENSORS, "model-Q4_K_M.gguf"])) == set(files)
    assert "consolidated.safetensors" in select(["config.json", "consolidated.safetensors"])


@pytest.mark.parametrize(
    ("paths", "tag", "message"),
    [
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], None, r"several files are Q4_0; give one as .*: a-Q4_0\.gguf, b-Q4_0\.gguf"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], "Q4_0", r"several files are Q4_0; give one as .*: a-Q4_0\.gguf, b-Q4_0\.gguf"),
        (BF16[:1], "BF16", "1 of 2 parts are there"),
        (["config.json", "pytorch_model.bin"], None, "only pickle files"),
        (["README.md"], None, "no model in safetensors .* and no GGUF file"),
        (["model.safetensors"], None, "no model in safetensors .with config.json"),
        (SAFETENSORS, "Q4_0", "no GGUF files .its weights are in safetensors: org/name"),
        (["mmproj-BF16.gguf"], "BF16", "no GGUF files"),
    ],
)
def test_repositories_without_one_such_model(paths: list[str], tag: str | None, message: str) -> None:
    with pytest.raises(HubError, match=message):
        select(paths, tag=tag)
