"""Limits of tenants, from the keys file; `GET /v1/usage`: what a client has used, and its limits."""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import msgspec
from fastapi import APIRouter, Request, Response
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from server.context import ServerContext, get_context
from server.dialect import Dialect, Operation
from server.http.responses import StructResponse
from server.metrics import LABELS, Metrics
from server.part import Part
from server.parts.limits.keys_file import Limits
from server.tenants import Account, Tenant, Usage, get_tenant


class TenantUsage(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="usage"):
    """Counts since the start of the server."""

    name: str | None  # of the tenant; None: all clients, of a server without keys
    num_requests: int
    num_running_requests: int
    prompt_tokens: int
    cached_tokens: int  # of the prompt tokens
    completion_tokens: int
    total_tokens_today: int  # prompt and output, since 00:00 UTC
    limits: Limits


class UsageList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[TenantUsage]


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


class UsageCollector(Collector):
    """Reads what the tenants have used at scrape time. The label is a tenant's name, never its key or address."""

    def __init__(self, metrics: Metrics, usage: Callable[[], Mapping[str, Usage]]) -> None:
        self._usage = usage
        self._prefix = metrics.prefix
        self._label_values = (metrics.model_name, "0")  # no engine counts it

    def collect(self) -> Iterator[Metric]:
        usage = self._usage()
        for field, name, help in (
            ("num_requests", "tenant_requests", "Requests of a tenant."),
            ("num_prompt_tokens", "tenant_prompt_tokens", "Prompt tokens of a tenant."),
            ("num_cached_tokens", "tenant_prompt_tokens_cached", "Prompt tokens of a tenant from the prefix cache."),
            ("num_output_tokens", "tenant_generation_tokens", "Output tokens of a tenant."),
        ):
            family = CounterMetricFamily(f"{self._prefix}{name}", help, labels=(*LABELS, "tenant"))
            for tenant, used in usage.items():
                family.add_metric([*self._label_values, tenant], getattr(used, field))
            yield family


def _attach(context: ServerContext) -> None:
    context.metrics.registry.register(UsageCollector(context.metrics, context.api_keys.usage))


USAGE = Dialect(
    tag="Lightwell", routers=[router], operations={("/v1/usage", "get"): Operation(UsageList)}, in_workers=False
)

PART = Part(dialects=[USAGE], attach=_attach)
