"""Errors of the client, one type per kind of failure.

ClientError
├── ServerUnavailable    there is no server at the address
├── RequestTimeout       the server took longer than timeout_s, or the call longer than deadline_s
├── ServerError          the server reports a failure
│   └── ServerBusy       it has more requests waiting than it accepts
├── NotAllowed           the server requires other headers or certificates
├── ModelNotFound        the server does not serve this model
├── VersionGone          the server serves the model, but not this version
├── ContractMismatch     this client does not understand the served model
├── UnknownTask          the served version has not learned this task
├── BadImage             an image can't be read or used
├── ResultsError         results can't be written or resumed
└── InvalidRequest       the call itself is wrong: labels, templates, url, ...
    └── TooManyLabels    more labels or prompts than a call accepts

Messages are one line: what, which object, what was expected and found, and the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class ClientError(Exception):
    """Base class of all errors that ``clipweld.client`` raises on purpose."""


class ServerUnavailable(ClientError):
    """There is no server at the address, or it is not a Triton server that is ready for requests."""


class RequestTimeout(ClientError):
    """The server did not answer within ``timeout_s`` seconds, or the call was not done within ``deadline_s``."""


class ServerError(ClientError):
    """The server was reached, and reports a failure or gives an unusable answer."""


class ServerBusy(ServerError):
    """The server has more requests waiting than it accepts."""


class NotAllowed(ClientError):
    """The server, or a proxy before it, refuses these headers or certificates."""


class ModelNotFound(ClientError):
    """The server does not serve all three parts of the model: image tower, text tower and card."""


class VersionGone(ClientError):
    """The server serves the model, but not the requested version."""


class ContractMismatch(ClientError):
    """This client does not understand the served model: its card format, tokenizer, preprocessing or batching."""


class UnknownTask(ClientError):
    """The served version has not learned this task.

    Attributes:
        name: the requested task.
        known: names of the tasks that this version has learned.
        near: those of ``known`` whose spelling is close to ``name``, closest first.
        version: the served version.
    """

    def __init__(self, name: str, known: Sequence[str], version: int) -> None:
        super().__init__(name, known, version)  # pickling and copying call the class with these arguments
        self.name, self.version = name, version
        self.known = tuple(known)
        self.near = tuple(difflib.get_close_matches(name, self.known))

    def __str__(self) -> str:
        hint = f"did you mean {' or '.join(map(repr, self.near))}? " if self.near else ""
        listed = f"it has: {', '.join(self.known)}" if self.known else "it is the base model, without tasks"
        return f"version {self.version} has no task {self.name!r}; {hint}{listed}"


class BadImage(ClientError):
    """An image can't be read, or is not something that can be turned into an image.

    Attributes:
        image: the image's path, or its place in the call; empty if the error is not about one image of a call.
    """

    image: str = ""


class ResultsError(ClientError):
    """Results can't be written to a file or to standard output, or an existing file of results can't be resumed."""


class InvalidRequest(ClientError):
    """An argument of the call is wrong, or the server refused the request as malformed."""


class TooManyLabels(InvalidRequest):
    """There are more labels, or prompts for them, than a call accepts."""
