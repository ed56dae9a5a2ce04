"""What shows the inside of the engine."""

from engine.parts.inspection.records import BlockMap, QueueList, StepList
from server.context import ServerContext
from server.dialect import BEGINNING, Dialect, Operation
from server.part import Part
from server.parts.inspection import inspect, routes, trace
from server.parts.inspection.inspect import Inspection
from server.parts.inspection.routes import EngineView, RequestDetails, RequestList, StepReaders
from server.parts.inspection.trace import Trace

INSPECTION = Dialect(
    tag="Lightwell",
    routers=[routes.router, inspect.router, trace.router],
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
    errors=routes.EVENT_ERRORS,
    in_workers=False,
)


def _attach(context: ServerContext) -> None:
    context.of_parts[StepReaders] = StepReaders()


PART = Part(dialects=[INSPECTION], attach=_attach)
