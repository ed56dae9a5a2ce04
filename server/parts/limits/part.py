"""Limits of tenants, from the keys file, and what they have used."""

from server.dialect import Dialect, Operation
from server.part import Part
from server.parts.limits.routes import router
from server.parts.limits.schemas import UsageList

USAGE = Dialect(
    tag="Lightwell", routers=[router], operations={("/v1/usage", "get"): Operation(UsageList)}, in_workers=False
)

PART = Part(dialects=[USAGE])
