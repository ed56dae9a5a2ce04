"""One row of the table of settings."""

import dataclasses
import datetime
import difflib
from collections.abc import Iterable
from typing import Any

from server.settings.value_types import ExplainedError, ValueType, format_size

ENV_PREFIX = "LIGHTWELL_"
ADAPTER_NAME = r"[\w./:@+-]{1,128}"  # without comma and =, which separate items and names in lists of adapters

MODELS, ENGINE, API, ACCESS, LIMITS = "Models", "Engine", "API", "Access", "Limits"
MEMORY, LORA, LOGS = "Memory and scheduling", "LoRA adapters", "Logs and metrics"
GROUPS = (MODELS, ENGINE, API, ACCESS, LIMITS, MEMORY, LORA, LOGS)  # in help and documentation

MAX_SHOWN = 200  # characters of an invalid value
MIN_SIMILARITY = 0.7


class SettingsError(ValueError):
    """An invalid setting. The message names the setting, its source, and the values that it accepts."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table. `name` and `default` are taken from the field of `Settings`."""

    group: str
    value_type: ValueType
    help: str
    secret: bool = False  # the value is never shown
    positional: bool = False
    singular: str = ""  # of the name, for the flag of a list; empty: the same
    name: str = ""
    default: Any = None

    @property
    def key(self) -> str:
        """Key in the config file."""
        return self.name.replace("_", "-")

    @property
    def flag(self) -> str:
        return self.name.upper() if self.positional else f"--{self.singular or self.key}"

    @property
    def is_switch(self) -> bool:
        return isinstance(self.default, bool)

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return ENV_PREFIX + self.name.upper()

    @property
    def description(self) -> str:
        """The help text without its last period, followed by the accepted values if they are few."""
        options = f" ({', '.join(self.value_type.options)})" if self.value_type.options else ""
        return self.help.removesuffix(".") + options

    @property
    def default_text(self) -> str:
        """The default as a user would write it; empty if there is none."""
        if self.default is None or self.default == ():
            return ""
        if self.value_type.metavar == "SIZE":
            return format_size(self.default)
        return str(self.default).lower() if self.is_switch else str(self.default).removesuffix(".0")

    def parse(self, value: object, source: str) -> Any:
        """Parse a value from `source`, which the message of an error names. Raises SettingsError."""
        try:
            return self.value_type.parse(value)
        except ExplainedError as error:
            raise SettingsError(f"{source}: {error}") from None
        except ValueError:
            got = "" if self.secret else f", got {_shown(value)}"
            hint = ": put it in quotes" if self._would_accept_text_of(value) else ""
            raise SettingsError(f"{source}: expected {self.value_type.expected}{got}{hint}") from None

    def _would_accept_text_of(self, value: object) -> bool:
        """Return whether the value would be valid if YAML had not read it as a number, a boolean or a date."""
        text = _as_text(value)
        try:
            self.value_type.parse(text)
        except ValueError:
            return False
        return text != value


def _shown(value: object) -> str:
    """Return a value as the user may have written it, or its beginning if it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _as_text(value: object) -> object:
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return str(value) if isinstance(value, int | float | datetime.date) else value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question about the known name that is most like `name`, or "" if none is."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=MIN_SIMILARITY)
    return f" (did you mean {nearest[0]}?)" if nearest else ""
