"""The part of the table of settings that decides who may use the server."""

from typing import Annotated

import msgspec

from server.settings.setting import Setting
from server.settings.value_types import BOOLEAN, HEADER_KEY, HEADER_KEYS, pattern, text

ACCESS = "Access"
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
    api_keys_file: Annotated[
        str | None,
        Setting(
            ACCESS,
            text("FILE"),
            "YAML file of clients, with hashes of their keys and limits (docs/tenants.md). SIGHUP reads it again.",
        ),
    ] = None
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

    inspect: Annotated[
        bool,
        Setting(
            ACCESS,
            BOOLEAN,
            "Show under /lightwell/v1/ what the engine does (its steps, its requests, its KV blocks) and what happens "
            "inside the model. With API keys, a client sees its own requests and an admin key all.",
        ),
    ] = True
    inspect_public: Annotated[
        bool,
        Setting(
            ACCESS,
            BOOLEAN,
            "Show it, with the texts of all requests, to everybody where there are no API keys. By default "
            "only clients on this machine see it: not through a proxy, not with --allowed-origins '*', and not if the "
            "server listens beyond loopback.",
        ),
    ] = False

    @property
    def needs_key(self) -> bool:
        """True if requests need an API key."""
        return bool(self.api_key) or self.api_keys_file is not None or self.admin_key is not None
