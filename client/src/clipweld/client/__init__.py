"""Zero-shot image classification against a served CLIP.

>>> from clipweld.client import ZeroShotClassifier
>>> with ZeroShotClassifier(url) as clip:
...     for answer in clip.classify(["samples/seven.png"], labels=["the number seven", "a shoe"]):
...         print(answer.best.label)
the number seven

The address is all that it needs: image size, preprocessing, and the labels and prompts of learned tasks come from the
server.
"""

from clipweld.client import errors
from clipweld.client._address import TLS
from clipweld.client._bench import BenchResult, Interval, Timing, bench
from clipweld.client._card import Card, Task
from clipweld.client._classifier import AsyncZeroShotClassifier, ZeroShotClassifier
from clipweld.client._folders import LeftOut
from clipweld.client._images import ImageLike
from clipweld.client._results import Classification, Prediction, ServerInfo
from clipweld.client.errors import ClientError

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

__version__ = "0.1.0"
