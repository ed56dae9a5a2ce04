"""The spellings of models on the hub."""

import pytest

from server.parts.hub.names import HubError, HubName, parse_hub_name


def test_spellings() -> None:
    for text, name in (
        ("org/name@refs/pr/1", HubName("org/name", "refs/pr/1")),
        ("org/name:latest", HubName("org/name")),
        ("org/name@v1.0:ud-q4_k_xl", HubName("org/name", "v1.0", tag="ud-q4_k_xl")),
        ("org/name@v1:q4/m-00001-of-00002.GGUF", HubName("org/name", "v1", file="q4/m-00001-of-00002.GGUF")),
        ("HF.co/Org/Name:Q8_0", HubName("Org/Name", tag="Q8_0")),
        ("https://huggingface.co/org/name/", HubName("org/name")),
        ("https://hf.co/org/name:Q4_0", HubName("org/name", tag="Q4_0")),
        ("https://huggingface.co/org/name/tree/main/BF16", HubName("org/name", "main", tag="BF16")),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1", HubName("org/name", "refs/pr/1")),
        ("https://huggingface.co/org/name/resolve/main/a.gguf?download=true", HubName("org/name", "main", "a.gguf")),
        ("https://huggingface.co/org/name/blob/refs/pr/1/q4/a.gguf#x", HubName("org/name", "refs/pr/1", "q4/a.gguf")),
        ("https://huggingface.co/org/name/resolve/main/a%2Bb.gguf", HubName("org/name", "main", "a+b.gguf")),
        ("https://huggingface.co/org/name?show=files", HubName("org/name")),
        ("hf.co/org/name/resolve/main/a.gguf?download=true", HubName("org/name", "main", "a.gguf")),
        ("hf://org/name@v1.0/q4/a.gguf", HubName("org/name", "v1.0", "q4/a.gguf")),
    ):
        assert parse_hub_name(text) == name, text


def test_other_texts() -> None:
    paths = ("name", "a/b/c", "./org/name", "../a/b", "/org/name", "~/name", "org/")
    for text in (*paths, "o:x.gguf", "-", "", "org/name:a/b", "a/b c"):
        assert parse_hub_name(text) is None, text


def test_addresses_of_something_else() -> None:
    revisions = ("../../x", "/etc/passwd", "./main", "a//b")
    parts = ("%2Fetc%2Fpasswd", "a%00b", 2000 * "a", "..%2F..%2Fx")
    for text, message in (
        ("https://example.org/a/b.gguf", r"example\.org.* names no model on .* or download the file and give its path"),
        ("https://huggingface.co/datasets/org/name", "is not a model: it is under datasets"),
        ("hf://spaces/org/name", "is not a model: it is under spaces"),
        ("https://huggingface.co/org", "names no model on Hugging Face .*: give org/name"),
        ("https://huggingface.co/org/name/resolve/main/model.safetensors", "give the repository, org/name"),
        ("https://hf.co/org/name:Q4 0", "names no model on Hugging Face"),
        ("https://[x/org/name", "names no model on Hugging Face"),
        *((f"org/name@{revision}", "is not the name of a branch, tag or commit") for revision in revisions),
        *((f"hf.co/org/name/tree/{part}", "is not the name of a branch, tag or commit") for part in parts),
    ):
        with pytest.raises(HubError, match=message):
            parse_hub_name(text)


def test_a_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://mirror.example/hub")
    name = HubName("org/name", "main", "a.gguf")
    assert parse_hub_name("https://mirror.example/hub/org/name/resolve/main/a.gguf") == name
    assert parse_hub_name("https://huggingface.co/org/name/resolve/main/a.gguf") == name


def test_a_name_prints_as_it_is_given() -> None:
    for text in ("org/name", "org/name@v1", "org/name:Q4_0", "org/name@v1:a/b.gguf"):
        assert str(parse_hub_name(text)) == text
