"""What shows the inside of the engine."""

from server.dialect import BEGINNING, Dialect, Operation
from server.part import Part
from server.parts.inspection import events, inspect, routes, trace
from server.parts.inspection.schemas import (
    BlockMap,
    EngineView,
    Inspection,
    QueueList,
    RequestDetails,
    RequestList,
    StepList,
    Trace,
)

INSPECTION = Dialect(
    tag="Lightwell",
    routers=[routes.router, events.router, inspect.router, trace.router],
    operations={
        ("/lightwell/v1/engine", "get"): Operation(EngineView),
        ("/lightwell/v1/steps", "get"): Operation(StepList),
        ("/lightwell/v1/events", "get"): Operation(None, events=StepList),
        ("/lightwell/v1/queue", "get"): Operation(QueueList),
        ("/lightwell/v1/blocks", "get"): Operation(BlockMap),
        ("/lightwell/v1/requests", "get"): Operation(RequestList),
        ("/lightwell/v1/requests/{request_id}", "get"): Operation(RequestDetails),
        ("/lightwell/v1/requests/{request_id}/trace", "get"): Operation(Trace),
        ("/lightwell/v1/trace", "get"): Operation(Trace),
        ("/lightwell/v1/inspect", "post"): Operation(Inspection, {"prompt": BEGINNING}, has_model=False),
    },
    errors=events.EVENT_ERRORS,
    in_workers=False,
)

PART = Part(dialects=[INSPECTION])
