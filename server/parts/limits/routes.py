"""`GET /v1/usage`: what a client has used, and its limits."""

from fastapi import APIRouter, Request, Response

from server.accounts import Account
from server.context import get_context
from server.http.json_response import StructResponse
from server.parts.limits.rules import Limits
from server.parts.limits.schemas import TenantUsage, UsageList
from server.tenants import Tenant, get_tenant

router = APIRouter()


@router.get("/v1/usage")
async def usage(request: Request) -> Response:
    """Return the requests and tokens of the client's key since the start of the server, and its limits.

    An admin key gets those of all keys.
    """
    own = get_tenant(request)
    tenants = get_context(request).api_keys.tenants.values() if own.is_admin else ()
    usages = [_usage(tenant.owner or None, tenant.account, _limits(tenant)) for tenant in tenants or (own,)]
    return StructResponse(UsageList(data=usages))


def _limits(tenant: Tenant) -> Limits:
    return tenant.limits if isinstance(tenant.limits, Limits) else Limits()


def _usage(name: str | None, account: Account, limits: Limits) -> TenantUsage:
    used = account.usage
    return TenantUsage(
        name=name,
        num_requests=used.num_requests,
        num_running_requests=account.num_running,
        prompt_tokens=used.num_prompt_tokens,
        cached_tokens=used.num_cached_tokens,
        completion_tokens=used.num_output_tokens,
        total_tokens_today=account.num_tokens_today,
        limits=limits,
    )
