"""Names of the MTIL benchmark's tasks, apart from ``mtil`` so that checking arguments doesn't import torchvision."""

from __future__ import annotations

MTIL = (
    "aircraft", "caltech101", "cifar100", "dtd", "eurosat", "flowers", "food", "mnist", "oxford-pet", "stanford-cars",
    "sun397",
)  # fmt: skip

# The benchmark's two orders, and X-TAIL's tasks.
LISTS = {
    "mtil-1": MTIL,
    "mtil-2": (
        "stanford-cars", "food", "mnist", "oxford-pet", "flowers", "sun397", "aircraft", "caltech101", "dtd", "eurosat",
        "cifar100",
    ),
    "x-tail": tuple(name for name in MTIL if name != "cifar100"),
}  # fmt: skip
