"""The models and LoRA adapters that a name can stand for: they are downloaded, removed and listed."""

import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from engine.shared.files import cache_folder
from server.format import format_bytes, home_relative
from server.model_paths import ADAPTER_FILES, ModelError, ResolvedModel, find_local
from server.parts.hub.names import (
    CONFIG,
    MODEL_ALIASES,
    GGUFModel,
    HubError,
    HubModel,
    families,
    find_alias,
    gguf_models,
    parse_hub_name,
)
from server.parts.hub.packages import PACKAGE_ALIASES, alias_path
from server.parts.hub.repository import hub_folder
from server.settings.setting import did_you_mean


def find_model(name: str) -> HubModel:
    """Return the model called `name` on the hub. Raises ModelError if it names none."""
    with _hub_errors(f"model {name}"):
        if alias := find_alias(name):
            return alias
        if source := parse_hub_name(name):
            return HubModel(None, source, {})
    known = [*PACKAGE_ALIASES, *MODEL_ALIASES, *families()]
    raise ModelError(
        f"model {name!r} is neither an existing file or folder, nor an alias (such as {', '.join(known[:3])}; "
        f"`lightwell list` shows all), nor a Hugging Face id (org/name){did_you_mean(name, known)}"
    )


def fetch_model(name: str, *, shows_progress: bool) -> ResolvedModel:
    """Download a model unless it is there. Raises ModelError."""
    found = find_model(name)
    with _hub_errors(f"model {name}{f' ({found.source})' if found.name else ''}"):
        from server.parts.hub import download  # which takes some time

        path = download.fetch_model(found.source, download.new_progress(shows_progress))
    whole = re.sub(r"-\d{5}-of-\d{5}(?=\.gguf$)", "", path.name)
    default_name = whole if path.is_file() else found.source.repo.partition("/")[2]
    return ResolvedModel(path, found.name or default_name, found.card_sampling)


def fetch_adapter(name: str, *, shows_progress: bool) -> tuple[Path, str]:
    """Download an adapter unless it is there. Return its path and its repository. Raises ModelError."""
    with _hub_errors(f"adapter {name}"):
        source = parse_hub_name(name)
    if source is None:
        raise ModelError(f"adapter {name!r} is neither an existing file or folder, nor a Hugging Face id (org/name)")
    with _hub_errors(f"adapter {name}"):
        from server.parts.hub import download

        return download.fetch_adapter(source, ADAPTER_FILES, download.new_progress(shows_progress)), source.repo


def remove_model(name: str) -> int:
    """Remove a downloaded model, and return the bytes freed. Raises ModelError."""
    if alias := PACKAGE_ALIASES.get(name):
        path = alias_path(name, alias)
        if not path.is_file():
            raise ModelError(f"model {name}: it has not been downloaded")
        path.unlink()
        return alias.num_bytes
    if (local := find_local(name)) is not None:
        raise ModelError(f"model {name}: {local.path} is not a download; remove it yourself")
    with _hub_errors(f"model {name}"):
        from server.parts.hub import download

        return download.remove_model(find_model(name).source)


@contextmanager
def _hub_errors(subject: str) -> Iterator[None]:
    """Turn errors of the hub and of its cache into ModelError, with the model or adapter that they are about."""
    try:
        yield
    except HubError as error:
        raise ModelError(f"{subject}: {error}") from None
    except OSError as error:
        raise ModelError(f"{subject}: {error.strerror or error} (the cache is {hub_folder()})") from None


# `lightwell list`.


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
        if alias.source.repo == repo and alias.source.tag == model.number_format:
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
