"""Every exception a caller of Sluice can meet, named by what the caller should do about it.

    SluiceError
    ├── InvalidRequest      fix the request: `param` names the field, the message names the remedy
    │   ├── ContextTooLong  the prompt does not fit the model's context (or the KV memory)
    │   └── UnknownModel    no such model is served here
    ├── InvalidConfig       fix the flags, the config file or the machine's set-up
    ├── InvalidCheckpoint   fix the model folder: names the file and the tensor
    ├── Overloaded          try again later: `retry_after` seconds
    │   └── ShuttingDown    this process accepts no more work
    ├── RequestFailed       this one request failed (NaN logits, worker lost); the engine goes on
    │   └── RequestAborted  an administrator ended it: leave it
    └── EngineDead          the engine stopped; nothing submitted here will finish

Nothing here knows HTTP: status codes are the business of `server/`.
"""

from __future__ import annotations

NOT_FINITE = "the model's logits are not finite"  # what a request is told whose numbers cannot be used


class SluiceError(Exception):
    """Base of all errors raised on purpose."""


class InvalidRequest(SluiceError):
    """The request cannot be served as written.

    `param` is the name of the offending field as the caller spelled it (or None), `code` a short stable identifier.
    """

    code = "invalid_value"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class ContextTooLong(InvalidRequest):
    """Prompt plus requested output exceed what the model or the KV memory can hold."""

    code = "context_length_exceeded"


class UnknownModel(InvalidRequest):
    """The request names a model that is not served here."""

    code = "model_not_found"


class InvalidConfig(SluiceError):
    """A flag, config file or environment cannot work."""


class InvalidCheckpoint(SluiceError):
    """A model folder is incomplete, corrupt or of an unsupported kind."""


class Overloaded(SluiceError):
    """A bounded queue is full. `retry_after` is a suggestion in seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDown(Overloaded):
    """The engine is draining and takes no new requests."""


class RequestFailed(SluiceError):
    """One request failed inside the engine. `retryable` says whether the same request may succeed if sent again."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class RequestAborted(RequestFailed):
    """Somebody other than its client ended the request on purpose: it is not to be sent again."""


class EngineDead(SluiceError):
    """The engine thread or process stopped with an error; see the cause."""
