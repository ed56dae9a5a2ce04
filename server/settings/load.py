"""Read the settings from flags, the environment and the config file, and check that they fit together."""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from server.part_table import why_missing
from server.settings.setting import ENV_PREFIX, SettingsError, did_you_mean
from server.settings.table import CONFIG_VARIABLE, OF_A_MODEL, OTHER_VARIABLES, SETTINGS, Settings

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
    for source in (_from_file(Path(config)) if config else (), _from_environment(environ), _from_flags(flags or {})):
        found = {name: _parse(name, value, origin) for name, value, origin in source}
        if not found.keys().isdisjoint(_MODELS):  # they say together what is served
            values = {name: value for name, value in values.items() if name not in _MODELS}
        values |= found
    settings = Settings(**_with_models(values))
    _check(settings)
    return settings


def _parse(name: str, value: object, origin: str) -> Any:
    """Parse a value. Raises SettingsError."""
    parsed = SETTINGS[name].parse(value, origin)
    if name != "models":
        return parsed
    return tuple(_parse_entry(entry, f"{origin}[{index}]") for index, entry in enumerate(parsed))


def _parse_entry(entry: dict[str, object], origin: str) -> dict[str, Any]:
    """Parse the settings of one of several models. Raises SettingsError."""
    parsed = {}
    for key, value in entry.items():
        name = str(key).replace("-", "_")
        if name not in OF_A_MODEL:
            known = [SETTINGS[each].key for each in OF_A_MODEL]
            reason = "applies to all models" if name in SETTINGS else f"unknown setting{did_you_mean(str(key), known)}"
            raise SettingsError(f"{origin}: {key}: {reason}")
        if value is not None:
            parsed[name] = SETTINGS[name].parse(value, f"{origin}: {key}")
    return parsed


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
            yield name, _items(value) if SETTINGS[name].value_type.is_list else value, variable


def _items(value: str) -> list[str]:
    return [item.strip() for item in value.split(",")]


def _unknown_variables(variables: list[str], known: Collection[str]) -> str:
    if any(re.search(r"_SERVICE_(HOST|PORT)|_PORT_\d+_", variable) for variable in variables):
        return f"unknown environment variables: {', '.join(variables)}{_LINKS}"
    named = [f"{variable}{did_you_mean(variable, known)}" for variable in variables]
    return f"unknown environment variables: {', '.join(named)}"


def _from_file(path: Path) -> Iterator[tuple[str, object, str]]:
    return named_settings(_load_yaml(path), str(path))


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


def _from_flags(flags: Mapping[str, object]) -> Iterator[tuple[str, object, str]]:
    for name, value in flags.items():
        if name in SETTINGS:
            yield name, value, SETTINGS[name].flag


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
    for name in ("data_parallel_size", "api_server_count"):
        if settings.unloads_models and getattr(settings, name) > 1:
            raise SettingsError(f"{SETTINGS[name].flag}: not with several models, --load on-first-use or --idle-unload")
    if settings.models and (settings.served_model_name or settings.lora_modules):
        name = "served-model-name" if settings.served_model_name else "lora-modules"
        raise SettingsError(
            f"--{name}: there are several models; set {name} of its model in the list models of the --config file"
        )
    for model in settings.each_model:
        check_adapter_names(model, model.served_model_name)
        if len(model.lora_modules) > model.max_loras:
            raise SettingsError(
                f"--lora-modules names {len(model.lora_modules)} adapters, but --max-loras is {model.max_loras}"
            )


def check_model_names(names: Sequence[Collection[str]]) -> None:
    """Raise SettingsError if several models or adapters share a name. `names` are those of each model."""
    counts = Counter(chain.from_iterable(map(set, names)))
    if shared := [name for name, count in counts.items() if count > 1]:
        raise SettingsError(
            f"two models are named {shared[0]}; set served-model-name of one in the list models of the --config file"
        )


def check_certificate(settings: Settings) -> None:
    """Raise SettingsError if there is a private key without a certificate."""
    if settings.ssl_keyfile is not None and settings.ssl_certfile is None:
        raise SettingsError("--ssl-keyfile: set --ssl-certfile too, the file of its certificate")


def check_otel(settings: Settings) -> None:
    """Raise SettingsError if the packages are missing that --otlp-endpoint needs."""
    if settings.otlp_endpoint is None:
        return
    try:
        is_installed = find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:  # a package around it is missing
        is_installed = False
    if not is_installed:
        raise SettingsError("--otlp-endpoint needs more packages: pip install 'lightwell[otel]'")


def check_adapter_names(settings: Settings, model_names: Collection[str]) -> None:
    """Raise SettingsError if an adapter of --lora-modules shares its name with another one or with the model."""
    names = settings.lora_names
    for index, name in enumerate(names):
        if name in names[:index]:
            raise SettingsError(f"--lora-modules: two adapters are named {name}")
        if name in model_names:
            raise SettingsError(f"--lora-modules: {name} is the name of the model; choose another adapter name")


def hidden_without_keys(settings: Settings) -> str | None:
    """Return why a server without API keys shows nobody what the engine does, or None if it may show it."""
    if settings.inspect_public:
        return None
    if settings.uds is None and not is_loopback(settings.host):
        return "Without API keys, what the engine does is shown only by a server that listens on loopback"
    if "*" in settings.allowed_origins:
        return "Without API keys, what the engine does is not shown where all origins are allowed"
    return None


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`. Names other than localhost count as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
