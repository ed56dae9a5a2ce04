"""Whom a request belongs to: the owner of its API key, or its address where there are no keys."""

import msgspec
from starlette.requests import Request
from starlette.types import Scope

TENANT = "tenant"  # in the scope's state, set by `AuthMiddleware`


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """A client of the server, which gets its share of it. The name occurs in logs and metrics, and is never a key."""

    name: str
    weight: float = 1.0  # its share of the engine, relative to that of others


ANYBODY = Tenant(name="")  # of work that no client has asked for


def tenant_of_address(scope: Scope) -> Tenant:
    """Return the tenant of a request without a key."""
    return Tenant(name=(scope.get("client") or ("",))[0])


def get_tenant(request: Request) -> Tenant:
    """Return the tenant whose request this is."""
    tenant: Tenant = request.scope["state"][TENANT]
    return tenant
