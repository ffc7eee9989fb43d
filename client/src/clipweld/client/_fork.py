"""What a forked child does with the classifiers that it inherits: it begins anew, and leaves what is open alone."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Inherited(Protocol):
    """What a child of a fork may inherit."""

    def after_fork(self) -> None:
        """Make this usable in the child, without touching what the parent still uses."""


_living: weakref.WeakSet[Inherited] = weakref.WeakSet()


def at_fork(living: Inherited) -> None:
    """Call ``after_fork`` in every child that is forked while this object lives."""
    _living.add(living)


def never_free(thing: object) -> None:
    """Keep an object and all that it refers to until the process ends, without any of their finalizers being run.

    A child shares sockets and epoll sets with its parent. Whatever closes them politely, as finalizers do, would say
    goodbye in the parent's name.
    """
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _after_fork() -> None:
    for living in list(_living):
        living.after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_after_fork)
