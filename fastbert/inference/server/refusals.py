"""How a request is turned down: the reason, and what OpenAI's clients and TEI's call it."""

from typing import NamedTuple


class Reason(NamedTuple):
    """The statuses and types of both dialects.

    Attributes:
        openai, openai_type, openai_code: as https://platform.openai.com/docs/guides/error-codes has them.
        tei, tei_type: as text-embeddings-inference has them.
    """

    openai: int
    openai_type: str
    openai_code: str | None
    tei: int
    tei_type: str


_INVALID = "invalid_request_error"
NOT_JSON = Reason(400, _INVALID, None, 400, "Validation")
FIELD = Reason(400, _INVALID, None, 422, "Validation")
EMPTY = Reason(400, _INVALID, None, 400, "Empty")
TOO_MANY = Reason(400, _INVALID, None, 413, "Validation")
TOO_LONG = Reason(400, _INVALID, "context_length_exceeded", 413, "Validation")
TOO_LARGE = Reason(413, _INVALID, None, 413, "Validation")
OTHER_KIND = Reason(400, _INVALID, None, 424, "Backend")
OTHER_MODEL = Reason(404, _INVALID, "model_not_found", 404, "Validation")
NO_PATH = Reason(404, _INVALID, None, 404, "Validation")
NO_METHOD = Reason(405, _INVALID, None, 405, "Validation")
NO_KEY = Reason(401, _INVALID, "invalid_api_key", 401, "Unauthorized")
FULL = Reason(429, "rate_limit_error", "rate_limit_exceeded", 429, "Overloaded")
CLOSING = Reason(503, "server_error", None, 503, "Unhealthy")
FAILED = Reason(500, "server_error", None, 500, "Backend")


class Refusal(Exception):
    """A request that gets no results.

    Args:
        param: the field of the body that is wrong.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self, reason: Reason, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.reason, self.message, self.param, self.retry_after = reason, message, param, retry_after
