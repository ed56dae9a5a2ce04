"""`lightwell list`: aliases, and the models in the cache of Hugging Face's hub."""

import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from engine.shared.paths import cache_folder
from server.format import format_bytes, home_relative
from server.package_aliases import PACKAGE_ALIASES, alias_path
from server.parts.hub.aliases import MODEL_ALIASES
from server.parts.hub.files import CONFIG, GGUFModel, gguf_models
from server.parts.hub.repository import hub_folder


class ListedModel(msgspec.Struct, frozen=True):
    """A model that `lightwell serve` accepts by its name."""

    name: str
    num_bytes: int | None  # None: only the hub knows
    path: str | None  # None: not downloaded yet


def list_models() -> list[ListedModel]:
    """Return the downloaded models, and the aliases of all others."""
    models = [*_package_aliases(), *_hub_models()]
    names = {model.name for model in models}
    return [*models, *(ListedModel(alias, None, None) for alias in MODEL_ALIASES if alias not in names)]


def _package_aliases() -> Iterator[ListedModel]:
    for name, alias in PACKAGE_ALIASES.items():
        path = alias_path(name, alias)
        yield ListedModel(name, alias.num_bytes, str(path) if path.is_file() else None)


def _hub_models() -> Iterator[ListedModel]:
    """Yield the models of each repository's latest snapshot: its GGUF files, and its safetensors together."""
    for folder in sorted(hub_folder().glob("models--*")):
        org, _, repo_name = folder.name.removeprefix("models--").partition("--")
        snapshots = sorted(folder.glob("snapshots/*"), key=lambda snapshot: snapshot.stat().st_mtime)
        if not (org and repo_name and snapshots):
            continue
        repo, snapshot = f"{org}/{repo_name}", snapshots[-1]
        files = {path.relative_to(snapshot).as_posix(): path for path in sorted(snapshot.rglob("*")) if path.is_file()}
        for model in gguf_models(files):
            if len(model.paths) >= model.num_parts:
                yield ListedModel(_name_of(repo, model), _num_bytes(snapshot, model.paths), str(files[model.paths[0]]))
        weights = [name for name in files if "/" not in name and name.endswith(".safetensors")]
        if weights and CONFIG in files:
            yield ListedModel(repo, _num_bytes(snapshot, weights), str(snapshot))


def _name_of(repo: str, model: GGUFModel) -> str:
    """Return the alias of a model, or else the name that any file has."""
    for name, alias in MODEL_ALIASES.items():
        if alias.model.repo == repo and alias.model.tag == model.number_format:
            return name
    return f"{repo}:{model.paths[0]}"


def _num_bytes(snapshot: Path, names: Iterable[str]) -> int:
    return sum((snapshot / name).stat().st_size for name in names)


def print_models(*, as_json: bool) -> int:
    """Print the list and return the exit status."""
    models = list_models()
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(models)).decode())
        return 0
    rows = [model for model in models if model.num_bytes is not None]
    width = max(len(model.name) for model in rows)
    print(f"{'MODEL':<{width}}  {'SIZE':>8}  PLACE")
    for model in rows:
        place = home_relative(model.path) if model.path else f"not downloaded: `lightwell pull {model.name}`"
        print(f"{model.name:<{width}}  {format_bytes(model.num_bytes or 0):>8}  {place}")
    others = ", ".join(model.name for model in models if model.num_bytes is None)
    print("\nAliases of models on Hugging Face that are not downloaded:")
    print(textwrap.fill(others, 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
    print(f"\nModels of Hugging Face are kept in {home_relative(str(hub_folder()))}, others in", end=" ")
    print(f"{home_relative(str(cache_folder()))}.\n`lightwell run MODEL` runs one of them, a GGUF file or a folder.")
    return 0
