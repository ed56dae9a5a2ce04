"""Errors of Hugging Face's hub. Each message is one line for the user."""


class HubError(Exception):
    """A model on the hub that cannot be found or downloaded."""


class PassingError(HubError):
    """The hub does not answer, or not now: a download may be continued later, and what the cache holds can be used."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after  # seconds that the hub asks to wait
