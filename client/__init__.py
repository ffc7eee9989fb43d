"""Zero-shot image classification against a served CLIP.

>>> from client import ZeroShotClassifier
>>> with ZeroShotClassifier(url) as clip:
...     for answer in clip.classify(["samples/seven.png"], labels=["the number seven", "a shoe"]):
...         print(answer.best.label)
the number seven

Needs nothing but the address: sizes, tokenizer, labels and prompts of learned tasks come from the server.
"""

from client import errors
from client._address import TLS
from client._bench import BenchResult, Interval, Timing, bench
from client._card import Card, Task
from client._classifier import AsyncZeroShotClassifier, ZeroShotClassifier
from client._folders import LeftOut
from client._images import ImageLike
from client._results import Classification, Prediction, ServerInfo
from client.errors import ClientError

__all__ = [
    "ZeroShotClassifier",
    "AsyncZeroShotClassifier",
    "Classification",
    "Prediction",
    "ServerInfo",
    "TLS",
    "ImageLike",
    "LeftOut",
    "Card",
    "Task",
    "bench",
    "BenchResult",
    "Timing",
    "Interval",
    "ClientError",
    "errors",
]
