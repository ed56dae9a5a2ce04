"""The pages for browsers."""

from server.context import ServerContext
from server.part import Part
from server.parts.page.pages import page_routes


def _attach(context: ServerContext) -> None:
    context.routes.extend(page_routes(with_docs=context.settings.enable_docs))


PART = Part(attach=_attach)
