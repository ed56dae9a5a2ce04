"""Why a model is not loaded, as clients see it."""

from server.http.errors import EngineUnavailableError

RETRY_SECONDS = 10.0  # after a failure, until the model is loaded again for another request


class ModelLoadError(EngineUnavailableError):
    """A model cannot be loaded. An empty reason is not shown, since it may name files."""

    def __init__(self, name: str, reason: str) -> None:
        message = f"The model `{name}` cannot be loaded" + (f": {reason}." if reason else ".")
        super().__init__(message, code="model_load_failed", retry_after=RETRY_SECONDS)


class LoadTimeoutError(EngineUnavailableError):
    """A model was not loaded in the time that a request may wait."""

    def __init__(self, name: str, seconds: float) -> None:
        message = f"The model `{name}` is still being loaded. The request waited for {seconds:g} seconds, its limit."
        super().__init__(message, code="request_timeout")
