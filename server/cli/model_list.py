"""`lightwell list`: aliases, and the models in the cache of Hugging Face's hub."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from engine.shared.paths import cache_folder
from server.package_aliases import PACKAGE_ALIASES, alias_path

_REPO_FOLDER = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)")


class ListedModel(msgspec.Struct, frozen=True):
    """A model that `lightwell serve` accepts by its name."""

    name: str
    num_bytes: int
    path: str | None  # None: not downloaded yet


def list_models() -> list[ListedModel]:
    return [*_aliases(), *_hub_models()]


def _aliases() -> Iterator[ListedModel]:
    for name, alias in PACKAGE_ALIASES.items():
        path = alias_path(name, alias)
        yield ListedModel(name, alias.num_bytes, str(path) if path.is_file() else None)


def hub_folder() -> Path:
    """Return the folder in which huggingface_hub keeps repositories. Importing it for this would take long."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _hub_models() -> Iterator[ListedModel]:
    """Yield the models of each repository's latest snapshot: its GGUF files, and its safetensors together."""
    for folder in sorted(hub_folder().glob("models--*")):
        match = _REPO_FOLDER.fullmatch(folder.name)
        snapshots = sorted(folder.glob("snapshots/*"), key=lambda snapshot: snapshot.stat().st_mtime)
        if match is None or not snapshots:
            continue
        repo, snapshot = f"{match['org']}/{match['name']}", snapshots[-1]
        for file in sorted(path for path in snapshot.rglob("*.gguf") if path.exists()):
            name = f"{repo}:{file.relative_to(snapshot).as_posix()}"
            yield ListedModel(name, file.stat().st_size, str(file))
        weights = [path for path in snapshot.glob("*.safetensors") if path.exists()]
        if weights and (snapshot / "config.json").exists():
            yield ListedModel(repo, sum(path.stat().st_size for path in weights), str(snapshot))


def print_models(*, as_json: bool) -> int:
    """Print the list and return the exit status."""
    models = list_models()
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(models)).decode())
        return 0
    width = max(len(model.name) for model in models)
    print(f"{'MODEL':<{width}}  {'SIZE':>8}  PLACE")
    for model in models:
        place = home_relative(model.path) if model.path else f"not downloaded: `lightwell pull {model.name}`"
        print(f"{model.name:<{width}}  {format_bytes(model.num_bytes):>8}  {place}")
    print(f"\nAliases are kept in {home_relative(str(cache_folder()))}, models of Hugging Face in", end=" ")
    print(f"{home_relative(str(hub_folder()))}.\n`lightwell run MODEL` runs one of them, a GGUF file or a folder.")
    return 0


def home_relative(path: str) -> str:
    """Return the path with ~ for the home folder."""
    home = os.path.expanduser("~")
    return f"~{path[len(home) :]}" if path.startswith(f"{home}/") else path


def format_bytes(num_bytes: int) -> str:
    """Return a size with its unit, as download pages give it: 98 MB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}" if num_bytes < 10 * size else f"{num_bytes / size:.0f} {unit}"
    return f"{num_bytes / 1000:.0f} kB"
