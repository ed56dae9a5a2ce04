"""A repository on the hub at one commit: what it has, and which of it is in the cache."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from engine.config.json_file import MAX_INDEX_BYTES, read_json_object
from server.parts.hub.cache import RepositoryCache
from server.parts.hub.client import HubClient, RemoteFile
from server.parts.hub.environment import is_offline
from server.parts.hub.errors import HubError, HubUnreachableError
from server.parts.hub.files import INDEX

MAIN = "main"


class Repository:
    """The files of one commit, as the hub lists them, or as the cache has them if the hub cannot be asked."""

    def __init__(self, repo: str, revision: str, commit: str, files: Sequence[RemoteFile], *, is_listed: bool) -> None:
        self.repo = repo
        self.revision = revision
        self.commit = commit
        self.cache = RepositoryCache(repo)
        self.is_listed = is_listed  # by the hub; False: these are only the files in the cache
        self._files = {file.path: file for file in files}

    @classmethod
    def open(cls, client: HubClient, repo: str, revision: str | None, say: Callable[[str], None]) -> Self:
        """Ask the hub for a repository, or else the cache. Raises HubError."""
        revision = revision or MAIN
        if is_offline():
            return cls._from_cache(repo, revision, "HF_HUB_OFFLINE is set, and ")
        try:
            listing = client.list_files(repo, revision)
        except HubUnreachableError as error:
            found = cls._from_cache(repo, revision, f"{error}, and ")
            say(f"{repo}: {error}; using what has been downloaded")
            return found
        return cls(repo, revision, listing.commit, listing.files, is_listed=True)

    @classmethod
    def in_cache(cls, repo: str, revision: str | None) -> Self:
        """Return what has been downloaded. Raises HubError if there is nothing."""
        return cls._from_cache(repo, revision or MAIN, "")

    @classmethod
    def _from_cache(cls, repo: str, revision: str, reason: str) -> Self:
        cache = RepositoryCache(repo)
        commit = cache.commit(revision)
        if commit is None or not (paths := cache.paths(commit)):
            raise HubError(f"{reason}{_shown(repo, revision)} has not been downloaded")
        snapshot = cache.snapshot(commit)
        files = [RemoteFile(path, (snapshot / path).stat().st_size, "") for path in paths]
        return cls(repo, revision, commit, files, is_listed=False)

    def select(self, choose: Callable[[Sequence[str]], Sequence[str]]) -> list[RemoteFile]:
        """Return the files that `choose` selects among all paths. Raises HubError."""
        paths = list(self._files)
        try:
            chosen = choose(paths)
            self._check_shards(chosen)
        except HubError as error:
            if self.is_listed:
                raise
            raise HubError(f"of what has been downloaded: {error}") from None
        return [self._files[path] for path in chosen]

    def _check_shards(self, chosen: Sequence[str]) -> None:
        """Raise HubError if weights are missing that the index in the cache names."""
        index = self.path(INDEX)
        if self.is_listed or INDEX not in chosen:
            return
        try:
            shards = set(map(str, read_json_object(index, MAX_INDEX_BYTES)["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            return  # the engine says what is wrong with it
        if missing := sorted(shards - set(chosen)):
            raise HubError(f"{len(missing)} files are missing, such as {missing[0]}")

    def is_cached(self, file: RemoteFile) -> bool:
        return self.cache.has(self.commit, file.path, file.num_bytes)

    def num_missing_bytes(self, files: Sequence[RemoteFile]) -> int:
        """Return how many bytes of these files are not on disk yet."""
        missing = [
            file for file in files if not self.is_cached(file) and not self.cache.has_blob(file.etag, file.num_bytes)
        ]
        return sum(max(0, file.num_bytes - self.cache.partial_bytes(file.etag)) for file in missing)

    def path(self, path: str) -> Path:
        return self.cache.snapshot(self.commit) / path


def _shown(repo: str, revision: str) -> str:
    return repo if revision == MAIN else f"{repo}@{revision}"
