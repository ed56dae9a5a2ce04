"""Names of models on Hugging Face's hub: parses ids, addresses and the spellings of other programs."""

import re
from typing import NamedTuple

from server.parts.hub.errors import HubError

GGUF_SUFFIX = ".gguf"
MAX_PATH_LENGTH = 1024

_ADDRESS = re.compile(r"(hf|https?)://|(huggingface|hf)\.co/", re.IGNORECASE)
_WWW = re.compile(r"^(https?://)?www\.", re.IGNORECASE)
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
    address = _WWW.sub(r"\1", text)
    name = _parse_address(address) if _ADDRESS.match(address) else _parse_id(text)
    revision = name and name.revision
    if revision is not None and (not is_inside(revision) or ".." in revision):  # which Git does not allow either
        raise HubError(f"{revision!r} is not the name of a branch, tag or commit")
    return name


def is_inside(path: str) -> bool:
    """Return whether a relative path stays inside its folder, and can be shown."""
    is_short = len(path) <= MAX_PATH_LENGTH
    return is_short and path.isprintable() and not any(part in ("", ".", "..") for part in path.split("/"))


def _parse_id(text: str) -> HubName | None:
    match = _ID.fullmatch(text)
    if match is None:
        return None
    name, choice = HubName(match["repo"], match["revision"]), match["choice"]
    if choice is None or choice == "latest":
        return name
    if choice.lower().endswith(GGUF_SUFFIX):
        return name._replace(file=choice)
    return name._replace(tag=choice) if "/" not in choice else None


def _parse_address(text: str) -> HubName:
    """Parse the address of a repository, a folder or a file, or that of a repository with `:tag`. Raises HubError."""
    from huggingface_hub import constants, parse_hf_uri

    address, _, choice = text.rpartition(":")
    is_tagged = "/" in address and "/" not in choice
    problem = HubError(
        f"{text!r} names no model on Hugging Face (HF_ENDPOINT names a mirror): give org/name, org/name:TAG or "
        "org/name:file.gguf, or download the file and give its path"
    )
    try:
        uri = parse_hf_uri(address if is_tagged else text, constants.ENDPOINT)
    except ValueError:
        raise problem from None
    if uri.type != "model":
        raise HubError(f"{text!r} is not a model: it is under {uri.type}s")
    name, path = _parse_id(f"{uri.id}:{choice if is_tagged else 'latest'}"), uri.path_in_repo
    if name is None or (is_tagged and path):
        raise problem
    name = name._replace(revision=uri.revision)
    if not path:
        return name
    if path.lower().endswith(GGUF_SUFFIX):
        return name._replace(file=path)
    if "/tree/" in text:  # a folder, which is named after the number format of its files
        return name._replace(tag=path.rpartition("/")[2])
    raise HubError(f"{path} is not a GGUF file: for a model in safetensors, give the repository, {name.repo}")
