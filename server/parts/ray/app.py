"""The application for `serve run server.parts.ray.app:app` and for the `import_path` of a `serve deploy` file."""

import os
from collections.abc import Mapping

from ray import serve

from server.parts.ray.ingress import Ingress
from server.parts.ray.replica import STOP_SECONDS, Replica
from server.parts.ray.router import PrefixRouter
from server.settings.load import load_settings, named_settings
from server.settings.setting import SettingsError
from server.settings.table import SETTINGS, Settings

# What Ray Serve has: the socket, the certificate and the path.
ADDRESS = ("host", "port")  # refused as arguments only, since the image of the server sets them in its environment
OWNED = ("uds", "ssl_certfile", "ssl_keyfile", "root_path", "forwarded_allow_ips")
OTHER_REQUESTS = 64  # besides those that generate: health probes, metrics


def app(args: Mapping[str, object]) -> serve.Application:
    """Return the application. `args` are settings by the names of the config file, such as `max-num-seqs`.

    Raises SettingsError.
    """
    settings = replica_settings(args)
    room = settings.data_parallel_size * settings.max_num_seqs + settings.max_queued_requests + OTHER_REQUESTS
    grace = settings.drain_timeout + STOP_SECONDS
    replicas = serve.deployment(
        name="Lightwell",
        max_ongoing_requests=room,  # the server itself refuses requests, with status 429
        graceful_shutdown_timeout_s=grace,
        request_router_config={"request_router_class": PrefixRouter},
    )(Replica)
    ingress = serve.deployment(name="Ingress", max_ongoing_requests=100_000, graceful_shutdown_timeout_s=grace)(Ingress)
    return ingress.bind(replicas.bind(settings), settings)


def replica_settings(args: Mapping[str, object]) -> Settings:
    """Return the settings of each replica, from `args` and the environment. Raises SettingsError."""
    flags = {name: value for name, value, _ in named_settings(args.items(), "args")}
    settings = load_settings(flags, os.environ)
    owned = [name for name in OWNED if getattr(settings, name) != SETTINGS[name].default]
    if refused := [name for name in ADDRESS if name in flags] + owned:
        raise SettingsError(f"{', '.join(refused)}: not here, Ray Serve has this in its http_options and route_prefix")
    if not (settings.needs_key or settings.allow_unauthenticated):
        raise SettingsError(
            "args: other machines may reach Ray Serve: set api-key (or LIGHTWELL_API_KEY), "
            "or allow-unauthenticated: true if everyone may use this server"
        )
    return settings
