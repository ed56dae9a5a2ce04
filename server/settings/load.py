"""Read the settings from flags, the environment and the config file, and check that they fit together."""

import ipaddress
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from server.part_table import PARTS, is_installed, load_module, why_missing
from server.settings.setting import ENV_PREFIX, SettingsError, did_you_mean
from server.settings.table import CONFIG_VARIABLE, OTHER_VARIABLES, SETTINGS, Settings

if TYPE_CHECKING:
    import yaml

AnyLoader = TypeVar("AnyLoader", bound="yaml.BaseLoader | yaml.SafeLoader")
Document = TypeVar("Document")

MAX_FILE_BYTES = 1 << 20
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")  # LIGHTWELL_PORT=tcp://10.0.0.1:8000
_MODELS = frozenset({"model", "models"})
_LINKS = " (Kubernetes sets it for a Service named lightwell; disable that with enableServiceLinks: false)"


def load_settings(
    flags: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None, config: str | None = None
) -> Settings:
    """Merge all sources: flags override the environment, which overrides the file `config`, which overrides defaults.

    `flags` maps setting names to text (or to a bool for a switch). Raises SettingsError.
    """
    environ = environ or {}
    config = config or environ.get(CONFIG_VARIABLE)
    values: dict[str, Any] = {}
    in_file = named_settings(_load_yaml(Path(config)), config) if config else ()
    in_flags = [(name, value, SETTINGS[name].flag) for name, value in (flags or {}).items() if name in SETTINGS]
    for source in (in_file, _from_environment(environ), in_flags):
        found = {name: SETTINGS[name].parse(value, origin) for name, value, origin in source}
        if not found.keys().isdisjoint(_MODELS):  # they say together what is served
            values = {name: value for name, value in values.items() if name not in _MODELS}
        values |= found
    settings = Settings(**_with_models(values))
    _check(settings)
    return settings


def _with_models(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with the first model as `model`, and all with their settings as `models` if there are more."""
    first = [{"model": values["model"]}] if "model" in values else []
    entries = [*first, *values.get("models", ())]
    if len(entries) < 2:
        return {name: value for name, value in values.items() if name != "models"} | (entries[0] if entries else {})
    return values | {"model": entries[0]["model"], "models": tuple(entries)}


# Sources. Each yields (setting name, unparsed value, source as named in errors).


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, object, str]]:
    names = {setting.variable: name for name, setting in SETTINGS.items()}
    ours = [variable for variable in environ if variable.startswith(ENV_PREFIX)]
    known = {*names, *OTHER_VARIABLES}
    if unknown := sorted(set(ours) - known):
        raise SettingsError(_unknown_variables(unknown, known))
    for variable in ours:
        if name := names.get(variable):
            value = environ[variable]
            if _SERVICE_LINK.match(value):
                raise SettingsError(f"{variable}: expected {SETTINGS[name].value_type.expected}, got {value!r}{_LINKS}")
            items = [item.strip() for item in value.split(",")]
            yield name, items if SETTINGS[name].value_type.is_list else value, variable


def _unknown_variables(variables: list[str], known: Collection[str]) -> str:
    if any(re.search(r"_SERVICE_(HOST|PORT)|_PORT_\d+_", variable) for variable in variables):
        return f"unknown environment variables: {', '.join(variables)}{_LINKS}"
    named = [f"{variable}{did_you_mean(variable, known)}" for variable in variables]
    return f"unknown environment variables: {', '.join(named)}"


def named_settings(pairs: Iterable[tuple[object, object]], source: str) -> Iterator[tuple[str, object, str]]:
    """Yield the settings of a mapping. Keys may be in kebab or snake case; a null value leaves a setting unset.

    Raises SettingsError for keys that are unknown or repeated.
    """
    seen = set()
    for key, value in pairs:
        name = key.replace("-", "_") if isinstance(key, str) else ""
        if name not in SETTINGS:
            raise SettingsError(f"{source}: unknown setting {key!r}{_suggested_key(name)}")
        if name in seen:
            raise SettingsError(f"{source}: {key} is set twice")
        seen.add(name)
        if value is not None:
            yield name, value, f"{source}: {key}"


def _suggested_key(name: str) -> str:
    negated = SETTINGS.get(name.removeprefix("no_"))
    if negated and negated.is_switch:
        return f" (write {negated.key}: false)"
    return did_you_mean(name.replace("_", "-"), [setting.key for setting in SETTINGS.values()])


def _load_yaml(path: Path) -> list[tuple[object, object]]:
    """Return the key-value pairs of the file's top-level mapping, repeated keys included."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses integers that no setting has and that cannot be shown."""

        def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
            if abs(value := int(super().construct_yaml_int(node))) < 1 << 64:
                return value
            raise yaml.MarkedYAMLError(problem="the number is too large", problem_mark=node.start_mark)

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)

    def pairs(loader: Loader, root: yaml.Node | None) -> list[tuple[object, object]]:
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise SettingsError(f"{path}: expected a mapping of settings to values")
        construct = partial(loader.construct_object, deep=True)
        return [(construct(key), construct(value)) for key, value in root.value]

    return read_yaml(path, Loader, pairs, MAX_FILE_BYTES)


# YAML files of operators. Errors quote nothing of them, since a line may hold a key.


def read_yaml(
    path: Path, loader: type[AnyLoader], construct: "Callable[[AnyLoader, yaml.Node | None], Document]", max_bytes: int
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


def num_values(root: "yaml.Node | None", limit: int) -> int:
    """Return how many nodes there are below the root and with it, or a number above `limit` if there are more."""
    count, waiting = 0, [] if root is None else [root]
    while waiting and count <= limit:
        count += 1
        value = waiting.pop().value
        if isinstance(value, list):  # of nodes, or of pairs of them
            waiting += (node for item in value for node in (item if isinstance(item, tuple) else (item,)))
    return count


# Checks that involve more than one setting.


def _check(settings: Settings) -> None:
    if settings.models and (error := why_missing("models")) is not None:
        raise SettingsError(f"{SETTINGS['models'].flag}: {error}")
    is_local = settings.uds is not None or is_loopback(settings.host)
    if not (is_local or settings.needs_key or settings.allow_unauthenticated):
        raise SettingsError(
            f"--host {settings.host} is reachable from other machines: "
            "set --api-key, or --allow-unauthenticated if everyone may use this server"
        )
    for name, part in PARTS.items():
        check = getattr(load_module(name, "settings"), "check", None) if part.settings and is_installed(name) else None
        if check is not None:
            check(settings)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`. Names other than localhost count as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
