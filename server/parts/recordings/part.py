"""Records the latest requests, and replays them."""

from functools import partial

from server.context import ServerContext
from server.dialect import Dialect, Operation
from server.part import Part
from server.parts.recordings.replay import Replay, router
from server.parts.recordings.store import Recordings, record

REPLAY = Dialect(
    tag="Lightwell",
    routers=[router],
    operations={("/v1/requests/{request_id}/replay", "post"): Operation(Replay)},
    in_workers=False,
)


def _attach(context: ServerContext) -> None:
    recordings = context.of_parts[Recordings] = Recordings(context.settings.record_requests)
    if recordings.max_requests:
        context.steps.append(partial(record, context))


PART = Part(dialects=[REPLAY], attach=_attach)
