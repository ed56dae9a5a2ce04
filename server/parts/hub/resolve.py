"""Resolves the names of models and LoRA adapters on Hugging Face's hub, and downloads them."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from server.model_paths import ADAPTER_FILES, ModelError, ResolvedModel, find_local
from server.package_aliases import PACKAGE_ALIASES, alias_path
from server.parts.hub.aliases import MODEL_ALIASES, families, find_alias
from server.parts.hub.errors import HubError
from server.parts.hub.names import HubName, parse_hub_name
from server.parts.hub.repository import hub_folder
from server.progress import Progress
from server.settings.suggestions import did_you_mean


class HubModel(NamedTuple):
    """A model on the hub."""

    source: HubName
    name: str | None  # default name in the API; None: that of the file or folder
    card_sampling: Mapping[str, float]


def find_model(name: str) -> HubModel:
    """Return the model called `name` on the hub. Raises ModelError if it names none."""
    with _hub_errors(f"model {name}"):
        if alias := find_alias(name):
            return HubModel(alias.model, alias.name, alias.card_sampling)
        if source := parse_hub_name(name):
            return HubModel(source, None, {})
    known = [*PACKAGE_ALIASES, *MODEL_ALIASES, *families()]
    raise ModelError(
        f"model {name!r} is neither an existing file or folder, nor an alias (such as {', '.join(known[:3])}; "
        f"`lightwell list` shows all), nor a Hugging Face id (org/name){did_you_mean(name, known)}"
    )


def fetch_model(name: str, progress: Progress) -> ResolvedModel:
    """Download a model unless it is there. Raises ModelError."""
    found = find_model(name)
    with _hub_errors(f"model {name}{f' ({found.source})' if found.name else ''}"):
        from server.parts.hub import fetch

        path = fetch.fetch_model(found.source, progress)
    default_name = _without_part_number(path.name) if path.is_file() else found.source.repo.partition("/")[2]
    return ResolvedModel(path, found.name or default_name, found.card_sampling)


def fetch_adapter(name: str, progress: Progress) -> tuple[Path, str]:
    """Download an adapter unless it is there. Return its path and its repository. Raises ModelError."""
    with _hub_errors(f"adapter {name}"):
        source = parse_hub_name(name)
    if source is None:
        raise ModelError(f"adapter {name!r} is neither an existing file or folder, nor a Hugging Face id (org/name)")
    with _hub_errors(f"adapter {name}"):
        from server.parts.hub import fetch

        return fetch.fetch_adapter(source, ADAPTER_FILES, progress), source.repo


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
        from server.parts.hub import fetch

        return fetch.remove_model(find_model(name).source)


@contextmanager
def _hub_errors(subject: str) -> Iterator[None]:
    """Turn errors of the hub and of its cache into ModelError, with the model or adapter that they are about."""
    try:
        yield
    except HubError as error:
        raise ModelError(f"{subject}: {error}") from None
    except OSError as error:
        raise ModelError(f"{subject}: {error.strerror or error} (the cache is {hub_folder()})") from None


def _without_part_number(file: str) -> str:
    """Return the name of a GGUF file without -00001-of-00002."""
    return re.sub(r"-\d{5}-of-\d{5}(?=\.gguf$)", "", file)
