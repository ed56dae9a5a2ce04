"""Who may send a request: checks of its Host, its Origin and its API key."""

from collections.abc import Collection, Iterable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from server.http.errors import APIError, BadRequestError, UnauthorizedError, clip
from server.tenants import ANYBODY, ApiKeys, Tenant, get_tenant, tenant_of_address, valid_address

OPEN_PATHS = frozenset({"/", "/docs", "/health", "/healthz", "/readyz"})  # no API key required
METRICS = "/metrics"
ASSETS = "/assets/"  # nor for files of pages
EXPOSED_HEADERS = (
    "x-request-id",
    "request-id",
    "x-lightwell-seed",
    "x-lightwell-deterministic",
    "x-lightwell-warnings",
    "retry-after",
    *(f"x-ratelimit-{part}-{noun}" for part in ("limit", "remaining", "reset") for noun in ("requests", "tokens")),
)
MAX_KNOWN = 64  # values of the header Host; a client may send many that are accepted
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class HostRules:
    """Which hosts and origins a request may name, to protect a server without keys from web pages of others.

    DNS rebinding needs a domain that resolves to this machine, so a Host with a domain must be one of `hosts`;
    addresses and names without a dot are accepted. An Origin must be a page of this machine or one of `origins`.
    """

    def __init__(self, hosts: Iterable[str], origins: Iterable[str]) -> None:
        self.origins = frozenset(origin.rstrip("/").lower() for origin in origins)
        self._hosts = LOOPBACK_NAMES | {host.lower() for host in hosts} | set(map(host_of_url, self.origins))
        self._known: set[str] = set()  # headers that were accepted

    def check(self, headers: Headers) -> APIError | None:
        """Return why a request is refused, or None."""
        hosts = headers.getlist("host")
        if len(hosts) == 1 and hosts[0] in self._known and "origin" not in headers:
            return None
        return self.check_host(headers) or self.check_origin(headers)

    def check_host(self, headers: Headers) -> APIError | None:
        """Return why a request is refused for its Host, or None."""
        for host in headers.getlist("host"):
            name = host_of_url(f"//{host}")
            if name == "" or (name not in self._hosts and "." in name and not valid_address(name)):
                return APIError(403, host_not_allowed(host))
            if len(self._known) < MAX_KNOWN:
                self._known.add(host)
        return None

    def check_origin(self, headers: Headers, own_host: str | None = None) -> APIError | None:
        """Return why a request is refused for its Origin, or None. Pages of `own_host` are accepted."""
        for origin in headers.getlist("origin"):
            if origin.lower() not in self.origins and host_of_url(origin) not in LOOPBACK_NAMES | {own_host}:
                return APIError(403, origin_not_allowed(origin))
        return None


def host_not_allowed(host: str) -> str:
    """Return the message for a Host that is not one of this machine's."""
    if not host_of_url(f"//{host}"):
        return "The Host header of your request is invalid."
    host = clip(host)
    return f"The Host {host} is not allowed on this server; --allowed-origins http://{host} allows it."


def origin_not_allowed(origin: str) -> str:
    """Return the message for a page of another origin. Pages from files have the origin `null`."""
    allowed = "'*'" if origin == "null" else clip(origin)
    return f"Web pages of the origin {clip(origin)} may not call this server; --allowed-origins {allowed} allows it."


def host_of_url(url: str) -> str:
    """Return the host of a URL in lower case, without port and brackets, or "" if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


class CrossOriginMiddleware(CORSMiddleware):
    """Starlette's CORS middleware, with errors in our envelope."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=[origin if origin == "*" else origin.rstrip("/") for origin in origins],
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        origin = request_headers["origin"]
        if not self.is_allowed_origin(origin):
            return BadRequestError(origin_not_allowed(origin)).response()
        return BadRequestError("Web pages may only send requests with the methods GET, POST and DELETE.").response()


class Authentication:
    """Finds the tenant of each request. If there are API keys, requires one of them on all paths that are not open.

    The key is read from `Authorization: Bearer` or from Anthropic's `x-api-key`. The path is the one that routing uses.
    """

    def __init__(self, keys: ApiKeys, *, public_metrics: bool) -> None:
        self._open_paths = OPEN_PATHS | ({METRICS} if public_metrics else set())
        self._keys = keys

    def find_tenant(self, scope: Scope) -> Tenant:
        """Return the tenant of a request. Raises UnauthorizedError if it needs a key and has none that is valid."""
        if not self._keys.are_required:
            tenant: Tenant | None = tenant_of_address(scope, self._keys.everybody)
        elif is_open(scope, self._open_paths):
            tenant = ANYBODY
        else:
            tenant = tenant_of_keys(scope, self._keys)
        if tenant is None:
            has_key = bool(_keys_of(scope["headers"]))
            raise UnauthorizedError(key_given=has_key, scheme_missing=has_other_scheme(scope["headers"]))
        return tenant


def tenant_of_keys(scope: Scope, keys: ApiKeys) -> Tenant | None:
    """Return the tenant of the first key in the headers of a request that is valid now, or None if none is."""
    found = [keys.find(key) for key in _keys_of(scope["headers"])]
    return next((tenant for tenant in found if tenant is not None), None)


def _keys_of(headers: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
    """Return the keys in the headers of a request."""
    return [token for token in (bearer_token(headers), api_key(headers)) if token]


def is_open(scope: Scope, paths: Collection[str] = OPEN_PATHS) -> bool:
    """Return whether a request needs no API key: it reads a probe or a page, which hold no data."""
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in paths or path.startswith(ASSETS))


def require_admin(request: Request) -> None:
    """Raise APIError if the client's key is no admin key."""
    if not get_tenant(request).is_admin:
        raise APIError(403, "This needs an admin key of the server; the key of your request is none.")


def bearer_token(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the token of the Authorization header, if there is exactly one, with the scheme Bearer in any case."""
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, token = values[0].strip().partition(b" ")
    return token.strip() or None if scheme.lower() == b"bearer" else None


def has_other_scheme(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether an Authorization header begins with something other than the scheme Bearer."""
    values = [value.split() for name, value in headers if name == b"authorization"]
    return any(words and words[0].lower() != b"bearer" for words in values)


def api_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the value of the x-api-key header, if there is exactly one."""
    values = [value.strip() for name, value in headers if name == b"x-api-key"]
    return values[0] or None if len(values) == 1 else None
