"""Zero-shot image classification against a served CLIP.

>>> from client import ZeroShotClassifier
>>> with ZeroShotClassifier("localhost:8001") as clip:  # doctest: +SKIP
...     print(clip.classify("cat.jpg", labels=["cat", "dog"])[0])
cat 98.1%, dog 1.9%

Needs nothing but the address: sizes, tokenizer, labels and prompts of learned tasks come from the server.
"""

from client import errors
from client._bench import BenchResult, TowerTiming, bench
from client._card import Card, Task
from client._classifier import ZeroShotClassifier
from client._images import ImageLike
from client._results import Classification, Prediction
from client.errors import ClientError

__all__ = [
    "ZeroShotClassifier",
    "Classification",
    "Prediction",
    "ImageLike",
    "Card",
    "Task",
    "bench",
    "BenchResult",
    "TowerTiming",
    "ClientError",
    "errors",
]
