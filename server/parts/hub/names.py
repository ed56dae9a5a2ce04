"""Names of models on Hugging Face's hub: parses ids, addresses and the spellings of other programs."""

import re
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from server.parts.hub.environment import endpoint
from server.parts.hub.errors import HubError

GGUF_SUFFIX = ".gguf"
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
MAX_PATH_LENGTH = 1024
OTHER_KINDS = ("datasets", "spaces", "collections", "papers", "kernels", "buckets")

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<choice>[\w./+-]+))?", re.ASCII
)


class HubName(NamedTuple):
    """A model on the hub: a repository, and which of its files if it has several models."""

    repo: str  # org/name
    revision: str | None = None  # branch, tag or commit; None: main
    file: str | None = None  # path of a GGUF file in the repository
    tag: str | None = None  # number format of the GGUF file, such as Q4_K_M

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        choice = self.file or self.tag
        return f"{self.repo}{revision}{f':{choice}' if choice else ''}"


def parse_hub_name(text: str) -> HubName | None:
    """Parse `org/name[@revision][:tag or file]`, or an address. Return None for a text that is neither.

    Raises HubError for an address that is not that of a model on the hub.
    """
    path = _path_on_hub(text)
    name = _parse_id(text) if path is None else _parse_path(path, text)
    revision = name and name.revision
    if revision is not None and (not is_inside(revision) or ".." in revision):  # which Git does not allow either
        raise HubError(f"{revision!r} is not the name of a branch, tag or commit")
    return name


def is_inside(path: str) -> bool:
    """Return whether a relative path stays inside its folder, and can be shown."""
    is_short = len(path) <= MAX_PATH_LENGTH
    return is_short and path.isprintable() and not any(part in ("", ".", "..") for part in path.split("/"))


def _path_on_hub(text: str) -> str | None:
    """Return the path of an address on the hub, still quoted, or None for a text without scheme and host."""
    if text.startswith("hf://"):
        return text.removeprefix("hf://")
    host, slash, path = text.partition("/")
    if slash and host.lower() in HOSTS:
        return path.partition("?")[0]
    if not re.match(r"https?://", text):
        return None
    try:
        url = urlsplit(text)
    except ValueError:
        raise HubError(f"{text!r} is not a valid address") from None
    mirror = urlsplit(endpoint())
    if url.netloc == mirror.netloc:
        return url.path.removeprefix(mirror.path)
    if url.netloc.lower() in HOSTS:
        return url.path
    raise HubError(
        f"{url.netloc} is not Hugging Face (HF_ENDPOINT names a mirror): download the file and give its path"
    )


def _parse_id(text: str) -> HubName | None:
    match = _ID.fullmatch(text)
    if match is None:
        return None
    choice = match["choice"]
    if choice is None or choice == "latest":
        return HubName(match["repo"], match["revision"])
    if choice.lower().endswith(GGUF_SUFFIX):
        return HubName(match["repo"], match["revision"], file=choice)
    return HubName(match["repo"], match["revision"], tag=choice) if "/" not in choice else None


def _parse_path(quoted: str, text: str) -> HubName:
    """Parse `org/name`, `org/name/tree/REVISION`, `org/name/resolve/REVISION/FILE` or `org/name/FILE`."""
    parts = [unquote(part) for part in quoted.strip("/").split("/")]
    if parts[0] in OTHER_KINDS:
        raise HubError(f"{text!r} is not a model: it is under {parts[0]}")
    name = _parse_id("/".join(parts[:2]))
    if name is None:
        raise HubError(f"{text!r} names no model: give org/name, org/name:TAG or org/name:file.gguf")
    action, rest = (parts[2], parts[3:]) if len(parts) > 2 else ("", [])
    if action in ("resolve", "blob", "raw", "tree") and rest:
        length = 3 if rest[0] == "refs" else 1  # refs/pr/1
        name, path = name._replace(revision="/".join(rest[:length])), rest[length:]
    else:
        path = parts[2:]
    if not path:
        return name
    if action == "tree":  # a folder, which is named after the number format of its files
        return name._replace(tag=path[-1])
    if not path[-1].lower().endswith(GGUF_SUFFIX):
        raise HubError(f"{path[-1]} is not a GGUF file: for a model in safetensors, give the repository, {name.repo}")
    return name._replace(file="/".join(path))
