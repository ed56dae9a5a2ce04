"""The environment variables, as huggingface_hub itself reads them."""

import subprocess
import sys
from pathlib import Path

import pytest

from server.hub.environment import endpoint, hub_folder, is_offline, token

CODE = """
from huggingface_hub import constants, get_token
print(constants.HF_HUB_CACHE, constants.ENDPOINT, constants.HF_HUB_OFFLINE, get_token(), sep="\\n")
"""
VARIABLES = (
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_ENDPOINT", "HF_TOKEN"),
    *("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"HF_HOME": "/a"},
        {"HF_HUB_CACHE": "/b"},
        {"HUGGINGFACE_HUB_CACHE": "/b"},
        {"XDG_CACHE_HOME": "/c"},
        {"HF_HOME": "/a", "HF_HUB_CACHE": "/b"},
        {"HF_ENDPOINT": "https://mirror.example/"},
        {"HF_TOKEN": " hf_x\n"},
        {"HUGGING_FACE_HUB_TOKEN": "hf_y"},
        {"HF_HUB_OFFLINE": "1"},
        {"HF_HUB_OFFLINE": "true"},
        {"HF_HUB_OFFLINE": "0"},
        {"TRANSFORMERS_OFFLINE": "on"},
    ],
)
def test_it_is_read_as_the_library_reads_it(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    ours = (hub_folder(), endpoint(), is_offline(), token())
    assert "\n".join(map(str, ours)) == done.stdout.strip()


def test_the_token_of_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "token").write_text("hf_login\n")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert token() == "hf_login" == done.stdout.split()[-1]
