"""One limit on the bytes of all answers in memory."""

from __future__ import annotations

from collections.abc import Callable

from server.http.errors import APIError, BuffersExceedMemoryError
from server.tenants import Tenant


class AnswerShare:
    """What one request's answer takes of an `AnswerBudget`: all of it, or what a stream's client has not read yet."""

    def __init__(
        self,
        budget: AnswerBudget,
        tenant: Tenant,
        refuse: Callable[[APIError], None],
        too_large: Callable[[], APIError],
    ) -> None:
        """`refuse` ends the request with an error; `too_large` makes that of one that exceeds the budget alone."""
        self.tenant = tenant
        self.num_bytes = 0
        self.too_large = too_large
        self.error: APIError | None = None  # that has refused the answer
        self._budget = budget
        self._refuse = refuse
        self._is_listed = False  # in the budget, from the first byte on

    def add(self, num_bytes: int) -> None:
        """Count bytes that were received or made. This may refuse the answer, or another one."""
        budget = self._budget
        if not self._is_listed:
            self._is_listed = True
            budget.shares.setdefault(self.tenant.name, {})[self] = None
        self.num_bytes += num_bytes
        budget.num_bytes += num_bytes
        if budget.num_bytes > budget.max_bytes:
            budget.make_room(self)

    def sent(self, num_bytes: int) -> None:
        """Count bytes no longer."""
        self.num_bytes -= num_bytes
        self._budget.num_bytes -= num_bytes

    @property
    def is_refused(self) -> bool:
        return self.error is not None

    def check(self) -> None:
        """Raise the error that has refused the answer, if one has."""
        if self.error is not None:
            raise self.error

    def refuse(self, error: APIError) -> None:
        """End the request. Its bytes count until the share is released."""
        self.error = error
        self._refuse(error)

    def on_refusal(self, refuse: Callable[[APIError], None]) -> None:
        """Replace what ends the request, as the answer is complete and being sent now."""
        self._refuse = refuse

    def release(self) -> None:
        """Count the answer no longer. Has no effect the second time."""
        self.sent(self.num_bytes)
        if self._is_listed:
            self._is_listed = False
            own = self._budget.shares[self.tenant.name]
            del own[self]
            if not own:
                del self._budget.shares[self.tenant.name]
        self._refuse = _ignore  # it refers to the request, which refers to this share


class AnswerBudget:
    """Counts the bytes of answers in memory, and ends requests when there are too many.

    When all answers exceed the limit, the largest answer of the tenant that holds most is refused, so that none can
    push out the answers of others. An answer that exceeds it alone is refused for good.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.shares: dict[str, dict[AnswerShare, None]] = {}  # by the tenant's name

    def make_room(self, newest: AnswerShare) -> None:
        """Refuse answers until those that are not refused fit; refused ones end soon. `newest` has grown."""
        if newest.num_bytes > self.max_bytes and not newest.is_refused:
            newest.refuse(newest.too_large())
        while True:
            holders = [[share for share in shares if not share.is_refused] for shares in self.shares.values()]
            totals = [sum(share.num_bytes for share in shares) for shares in holders]
            if sum(totals) <= self.max_bytes:
                return
            largest = holders[totals.index(max(totals))]
            max(largest, key=lambda share: share.num_bytes).refuse(BuffersExceedMemoryError("large answers"))


def _ignore(error: APIError) -> None:
    """End nothing: the request has ended."""
