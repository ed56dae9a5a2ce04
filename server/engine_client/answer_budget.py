"""One limit on the bytes of all answers in memory."""

from __future__ import annotations

from collections.abc import Callable

from server.http.errors import APIError, BuffersExceedMemoryError
from server.tenants import Tenant


class AnswerShare:
    """What one request's answer takes of an `AnswerBudget`: all of it, or what a stream's client has not read yet."""

    def __init__(
        self, budget: AnswerBudget, tenant: Tenant, refuse: Callable[[APIError], None], too_large: APIError
    ) -> None:
        """`refuse` ends the request with an error; `too_large` is the error of one that exceeds the budget alone."""
        self.tenant = tenant
        self.num_bytes = 0
        self.too_large = too_large
        self._error: APIError | None = None
        self._budget = budget
        self._refuse = refuse

    def add(self, num_bytes: int) -> None:
        """Count bytes that were received or made. This may refuse the answer, or another one."""
        self._budget.update(self, num_bytes)

    def sent(self, num_bytes: int) -> None:
        """Count bytes no longer."""
        self._budget.update(self, -num_bytes)

    @property
    def is_refused(self) -> bool:
        return self._error is not None

    def check(self) -> None:
        """Raise the error that has refused the answer, if one has."""
        if self._error is not None:
            raise self._error

    def refuse(self, error: APIError) -> None:
        """End the request. Its bytes count until the share is released."""
        self._error = error
        self._refuse(error)

    def on_refusal(self, refuse: Callable[[APIError], None]) -> None:
        """Replace what ends the request, as the answer is complete and being sent now."""
        self._refuse = refuse

    def release(self) -> None:
        """Count the answer no longer. Has no effect the second time."""
        self._budget.update(self, -self.num_bytes)
        self._refuse = _ignore  # it refers to the request, which refers to this share


class AnswerBudget:
    """Counts the bytes of answers in memory, and ends requests when there are too many.

    When all answers exceed the limit, the largest answer of the tenant that holds most is refused, so that none can
    push out the answers of others. An answer that exceeds it alone is refused for good.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._shares: dict[str, dict[AnswerShare, None]] = {}  # by the tenant's name; those with any bytes

    def update(self, share: AnswerShare, change: int) -> None:
        """Count the new size of an answer, and refuse answers until the others fit."""
        share.num_bytes += change
        self.num_bytes += change
        own = self._shares.setdefault(share.tenant.name, {})
        if share.num_bytes:
            own[share] = None
        else:
            own.pop(share, None)
        if not own:
            del self._shares[share.tenant.name]
        if change > 0 and share.num_bytes > self.max_bytes and not share.is_refused:
            share.refuse(share.too_large)
        if change > 0 and self.num_bytes > self.max_bytes:
            self._make_room()

    def _make_room(self) -> None:
        """Refuse answers until those that are not refused fit; refused ones end soon."""
        while True:
            holders = [[share for share in shares if not share.is_refused] for shares in self._shares.values()]
            totals = [sum(share.num_bytes for share in shares) for shares in holders]
            if sum(totals) <= self.max_bytes:
                return
            largest = holders[totals.index(max(totals))]
            max(largest, key=lambda share: share.num_bytes).refuse(BuffersExceedMemoryError("large answers"))


def _ignore(error: APIError) -> None:
    """End nothing: the request has ended."""
