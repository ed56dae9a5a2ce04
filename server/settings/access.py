"""The part of the table of settings that decides who may use the server."""

from typing import Annotated

import msgspec

from server.settings.setting import ACCESS, BOOLEAN, HEADER_KEY, HEADER_KEYS, Setting, pattern

_ORIGIN = r"\*|[a-z][a-z0-9+.-]*://[^/\s]+"


class AccessSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the group `ACCESS`."""

    api_key: Annotated[
        tuple[str, ...],
        Setting(
            ACCESS,
            HEADER_KEYS,
            "API key that clients must send. Can be repeated. Other users of the machine can see flags: prefer the "
            "environment or the config file.",
            secret=True,
        ),
    ] = ()
    api_keys_file: str | None = None
    admin_key: Annotated[
        str | None,
        Setting(
            ACCESS,
            HEADER_KEY,
            "API key that loading of LoRA adapters, /metrics and the usage of all clients require. Unset: a single "
            "--api-key is one, and of several none.",
            secret=True,
        ),
    ] = None
    public_metrics: Annotated[bool, Setting(ACCESS, BOOLEAN, "Serve /metrics without an API key.")] = False
    one_tenant: Annotated[
        bool,
        Setting(
            ACCESS,
            BOOLEAN,
            "Treat several --api-key as keys of one client, for example while a key is replaced. By default, each is a "
            "client of its own.",
        ),
    ] = False
    isolate_keys: Annotated[
        bool,
        Setting(
            ACCESS,
            BOOLEAN,
            "Keep cached prefixes of clients with different keys apart, so that no client learns from the times of its "
            "requests what others send.",
        ),
    ] = True
    allow_unauthenticated: Annotated[
        bool, Setting(ACCESS, BOOLEAN, "Allow listening on addresses other than loopback without an API key.")
    ] = False
    allowed_origins: Annotated[
        tuple[str, ...],
        Setting(
            ACCESS,
            pattern("an origin such as https://example.org, or *", _ORIGIN, "ORIGIN", is_list=True),
            "Origin whose web pages may call the API (CORS); * allows any. Can be repeated.",
        ),
    ] = ()

    inspect: bool = True
    inspect_public: bool = False

    @property
    def needs_key(self) -> bool:
        """True if requests need an API key."""
        return bool(self.api_key) or self.api_keys_file is not None or self.admin_key is not None
