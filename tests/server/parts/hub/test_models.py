"""`lightwell list`, over folders as huggingface_hub makes them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from server.parts.hub.names import MODEL_ALIASES
from server.parts.hub.packages import PACKAGE_ALIASES

ALIAS = PACKAGE_ALIASES["smollm2-135m"]


def snapshot(hub: Path, repo: str, revision: str, **files: int) -> Path:
    """Make a snapshot of sparse files, linked to blobs as in the hub's cache."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    for name, size in files.items():
        blob = folder / "blobs" / f"{revision}-{name}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        with blob.open("wb") as file:
            file.truncate(size)
        link = folder / "snapshots" / revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder / "snapshots" / revision


def run(*flags: str, **environment: str) -> str:
    command = [sys.executable, "-m", "server.cli.main", "list", *flags]
    env = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env).stdout


def test_what_has_been_downloaded(tmp_path: Path) -> None:
    environment = {"LIGHTWELL_CACHE": f"{tmp_path}/cache", "HF_HUB_CACHE": f"{tmp_path}/hub", "HOME": str(tmp_path)}
    gguf = tmp_path / "cache" / "smollm2-135m" / ALIAS.file
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"")
    hub = tmp_path / "hub"
    snapshot(hub, "org/old-and-new", "a", **{"model.safetensors": 1, "config.json": 1})
    newer = snapshot(hub, "org/old-and-new", "b", **{"model.safetensors": 2_500_000_000, "config.json": 1})
    os.utime(newer.parent / "a", (1, 1))
    packed = snapshot(hub, "org/packed", "a", **{"q4.gguf": 5_000_000, "README.md": 1, "mmproj-f16.gguf": 1})
    parts = {f"big-Q8_0-0000{part}-of-00002.gguf": 3_000_000 for part in (1, 2)}
    split = snapshot(hub, "org/split", "a", **parts, **{"big-Q4_0-00001-of-00002.gguf": 1})
    known = snapshot(hub, "Qwen/Qwen3-4B-GGUF", "a", **{"Qwen3-4B-Q4_K_M.gguf": 7, "Qwen3-4B-Q8_0.gguf": 8})
    snapshot(hub, "org/only-config", "a", **{"config.json": 1})
    (hub / "models--broken").mkdir()
    (hub / "datasets--org--x").mkdir()
    models: list[dict[str, Any]] = json.loads(run("--json", **environment))
    found = [(model["name"], model["num_bytes"], model["path"]) for model in models]
    assert found[7:] == [(name, None, None) for name in MODEL_ALIASES if name != "qwen3:4b"]
    assert found[:7] == [
        ("smollm2-135m", ALIAS.num_bytes, str(gguf)),
        ("gemma3:270m", 253_113_024, None),
        ("qwen3:4b", 7, str(known / "Qwen3-4B-Q4_K_M.gguf")),
        ("Qwen/Qwen3-4B-GGUF:Qwen3-4B-Q8_0.gguf", 8, str(known / "Qwen3-4B-Q8_0.gguf")),
        ("org/old-and-new", 2_500_000_000, str(newer)),
        ("org/packed:q4.gguf", 5_000_000, str(packed / "q4.gguf")),
        ("org/split:big-Q8_0-00001-of-00002.gguf", 6_000_000, str(split / "big-Q8_0-00001-of-00002.gguf")),
    ]
    output = run(**environment)
    assert output.split()[:3] == ["MODEL", "SIZE", "PLACE"]
    assert "253 MB  not downloaded: `lightwell pull gemma3:270m`" in output
    assert "qwen3:8b," in output
    assert "~/cache/smollm2-135m/" in output
    assert "2.5 GB" in output


def test_characters_that_the_terminal_lacks_are_escaped(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "LIGHTWELL_CACHE": f"{tmp_path}/é"}
    done = subprocess.run(
        [sys.executable, "-m", "server.cli.main", "list"], env=environ, capture_output=True, check=True
    )
    assert f"others in {tmp_path}/\\xe9".encode() in done.stdout
