"""Read YAML files of operators. Errors quote nothing of them, since a line may hold a key."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from server.settings.setting import SettingsError

if TYPE_CHECKING:
    import yaml

Loader = TypeVar("Loader", bound="yaml.BaseLoader | yaml.SafeLoader")
Document = TypeVar("Document")


def read_yaml(
    path: Path, loader: type[Loader], construct: Callable[[Loader, yaml.Node | None], Document], max_bytes: int
) -> Document:
    """Return what `construct` makes of the root node, which is None for an empty file. Raises SettingsError.

    `max_bytes` bounds the file, and its values with those that aliases repeat.
    """
    import yaml

    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise SettingsError(f"{path}: larger than {max_bytes} bytes")
        reader = loader(data.decode("utf-8"))
        root = reader.get_single_node()
        if num_values(root, max_bytes) > max_bytes:
            raise SettingsError(f"{path}: its aliases make more than {max_bytes} values")
        return construct(reader, root)
    except SettingsError:
        raise
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        problem = re.split(r" ?['\"]", error.problem or "")[0]
        raise SettingsError(f"{path}: invalid YAML: line {line}: {problem}") from None
    except RecursionError:
        raise SettingsError(f"{path}: invalid YAML: too many levels") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: invalid YAML: the file is not UTF-8") from None
    except (yaml.YAMLError, ValueError):
        raise SettingsError(f"{path}: invalid YAML: the file contains invalid characters or values") from None


def num_values(root: yaml.Node | None, limit: int) -> int:
    """Return how many nodes there are below the root and with it, or a number above `limit` if there are more."""
    count, waiting = 0, [] if root is None else [root]
    while waiting and count <= limit:
        count += 1
        value = waiting.pop().value
        if isinstance(value, list):  # of nodes, or of pairs of them
            waiting += (node for item in value for node in (item if isinstance(item, tuple) else (item,)))
    return count
