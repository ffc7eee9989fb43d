"""Inherited classifiers in a forked child: they open new connections, and leave the parent's alone."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Inherited(Protocol):
    """An object that a forked child may inherit."""

    def after_fork(self) -> None:
        """Make this object usable in the child, without touching what the parent still uses."""


_living: weakref.WeakSet[Inherited] = weakref.WeakSet()


def at_fork(living: Inherited) -> None:
    """Call ``after_fork`` in every child that is forked while this object is alive."""
    _living.add(living)


def never_free(thing: object) -> None:
    """Keep an object and all that it refers to alive until the process ends, so that no finalizer of theirs runs.

    A child shares sockets and epoll sets with its parent. Finalizers close them in an orderly way, which would end the
    parent's connections too.
    """
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _after_fork() -> None:
    for living in list(_living):
        living.after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_after_fork)
