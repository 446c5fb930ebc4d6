"""One tree of errors. Each carries what went wrong, what to do, the CLI's exit code and the API's HTTP status."""

from __future__ import annotations


class UpwellError(Exception):
    """An error meant for the person who caused it: one line, the offending value, and the remedy.

    `message` says what is wrong and with which value; `remedy` says what to do about it.
    `exit_code` is what the CLI ends with, `http_status` what the server answers with.
    """

    exit_code = 2
    http_status = 400

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message} ({remedy})" if remedy else message)


class InputError(UpwellError):
    """A parameter, flag or request body that can't be used."""


class DataError(UpwellError):
    """A user's file or database that can't be read as a table."""


class QueryError(UpwellError):
    """A query that may not run, failed, or ran past its limits."""


class ConfigError(UpwellError):
    """A config.json that is not a V4 this version runs."""


class CheckpointError(UpwellError):
    """A checkpoint directory with missing, damaged or unexpected tensors."""


class DeviceError(UpwellError):
    """A device that isn't usable here, with what is missing."""


class EngineError(UpwellError):
    """The model failed while it ran a request."""

    exit_code = 1
    http_status = 500


class QueueFullError(UpwellError):
    """The engine's queue has no place for another request."""

    http_status = 429


class DeadlineError(UpwellError):
    """A request that wasn't done when its deadline passed."""

    exit_code = 1
    http_status = 504


class ShuttingDownError(UpwellError):
    """The engine drains and takes no new requests."""

    http_status = 503


class RankError(UpwellError):
    """Another process of this model ended or failed: what it held is gone, so nothing runs any more."""

    exit_code = 1
    http_status = 503
