"""The accounts of tenants, for the requests that begin and end."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count

from server.tenants import Tenant


class Ledger:
    """Counts requests in the accounts of their tenants, and numbers those that have no seed."""

    def __init__(self) -> None:
        self._numbers = count()

    async def enter(self, tenant: Tenant) -> int:
        """Count a request that begins, and return the number with which `leave` must follow.

        Raises APIError if it exceeds a limit of its tenant.
        """
        tenant.account.begin()
        return 0

    async def leave(self, tenant: Tenant, number: int) -> None:
        """Count a request as ended."""
        tenant.account.num_running -= 1

    async def headers(self, tenant: Tenant) -> Mapping[str, str]:
        """Return OpenAI's headers for the rates of the tenant that are limited."""
        return tenant.account.headers()

    async def take_number(self) -> int:
        """Return how often this has been called before."""
        return next(self._numbers)
