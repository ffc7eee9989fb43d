"""Everything that can go wrong between a caller and the server, as types.

ClientError
├── ServerUnavailable    nobody answers at the address
├── RequestTimeout       the server took longer than timeout_s, or the call longer than deadline_s
├── ServerError          the server answered that it failed
│   └── ServerBusy       it has more requests than it takes
├── NotAllowed           the server wants other headers or certificates
├── ModelNotFound        the server does not serve this model
├── VersionGone          the model is served, this version of it is not
├── ContractMismatch     the served model is not one that this client understands
├── UnknownTask          the served version has not learned this task
├── BadImage             an image that cannot be read or used
├── ResultsError         results that cannot be written or resumed
└── InvalidRequest       the call itself is wrong: labels, templates, url, ...
    └── TooManyLabels    more than a call takes

Messages are one line: what, which object, what was expected and found, and the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class ClientError(Exception):
    """Base of every error that `client` raises on purpose."""


class ServerUnavailable(ClientError):
    """Nobody answers at the address, or what answers there is no Triton server."""


class RequestTimeout(ClientError):
    """The server did not answer within ``timeout_s`` seconds, or a call was not done after its ``deadline_s``."""


class ServerError(ClientError):
    """The server was reached and reports a failure of its own."""


class ServerBusy(ServerError):
    """The server has more requests waiting than it takes."""


class NotAllowed(ClientError):
    """The server, or a proxy before it, refuses these headers or certificates."""


class ModelNotFound(ClientError):
    """The server does not serve all three parts (image, text, card) of the model."""


class VersionGone(ClientError):
    """The model is served, but not in the requested version."""


class ContractMismatch(ClientError):
    """The served model needs another client: card format, tokenizer, preprocessing, batching."""


class UnknownTask(ClientError):
    """The served version has not learned this task.

    Attributes:
        name: the requested task.
        known: names of the tasks that this version has learned.
        near: those of ``known`` that are spelled like ``name``, best first.
        version: the served version.
    """

    def __init__(self, name: str, known: Sequence[str], version: int) -> None:
        super().__init__(name, known, version)  # as a copy, or another process, makes it again
        self.name, self.version = name, version
        self.known = tuple(known)
        self.near = tuple(difflib.get_close_matches(name, self.known))

    def __str__(self) -> str:
        hint = f"did you mean {' or '.join(map(repr, self.near))}? " if self.near else ""
        listed = f"it has: {', '.join(self.known)}" if self.known else "it is the base model, without tasks"
        return f"version {self.version} has no task {self.name!r}; {hint}{listed}"


class BadImage(ClientError):
    """An image that cannot be read, or that is not something an image can be made of.

    Attributes:
        image: its path, or its place in the call, where it is one of several.
    """

    image: str = ""


class ResultsError(ClientError):
    """Results that cannot be written to a file or to standard output, or a file of them that belongs elsewhere."""


class InvalidRequest(ClientError):
    """The arguments of a call are wrong, or the server refused the request as malformed."""


class TooManyLabels(InvalidRequest):
    """More labels, or prompts for them, than a call takes."""
