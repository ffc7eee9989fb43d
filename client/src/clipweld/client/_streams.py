"""Work on a stream of items: several at a time, with results in order, and none lost that precede an error."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from clipweld.client._runtime import Runtime

# Requests in flight at a time, and batches that are read and resized meanwhile. While one request is answered, the next
# waits at the server. More would not help: Triton joins waiting requests into one batch.
IN_FLIGHT = 2
AHEAD = 6

_T = TypeVar("_T")
_U = TypeVar("_U")


class Supply(Iterator[_T]):
    """A caller's iterator, which ends instead of raising.

    Attributes:
        raised: what the iterator raised, to be raised once all items before it have been answered.
    """

    def __init__(self, items: Iterator[_T]) -> None:
        self._items = items
        self.raised: BaseException | None = None

    def __next__(self) -> _T:
        if self.raised is None:
            try:
                return next(self._items)
            except StopIteration:
                raise
            except BaseException as exc:
                self.raised = exc
        raise StopIteration


class InOrder(AsyncIterator[_U]):
    """The results of work on items, several at a time and in the order of the items.

    Not an asynchronous generator: when an event loop ends, it closes those one by one, in arbitrary order.

    Args:
        runtime: how to wait.
        items: what to work on.
        work: called with an item and ``turn``, a semaphore to hold during each request, which limits those in flight.
    """

    def __init__(
        self, runtime: Runtime, items: Iterator[_T], work: Callable[[_T, Any], Coroutine[Any, Any, _U]]
    ) -> None:
        turn = runtime.semaphore(IN_FLIGHT)
        self._runtime, self._begun = runtime, False
        self._works: Iterator[Coroutine[Any, Any, _U]] = (work(item, turn) for item in items)
        self._started: deque[Awaitable[_U]] = deque()

    async def __anext__(self) -> _U:
        if not self._begun:
            self._begun = True
            first = list(itertools.islice(self._works, 2))
            if len(first) == 1:  # a single item needs no thread or task
                return await first[0]
            self._works = itertools.chain(first, self._works)
        for work in itertools.islice(self._works, IN_FLIGHT + AHEAD - len(self._started)):
            self._started.append(self._runtime.start(work))
        if not self._started:
            raise StopAsyncIteration
        done = await self._started[0]
        self._started.popleft()
        return done

    async def aclose(self) -> None:
        """Give up the work in progress."""
        await self._runtime.finish(list(self._started))


def in_batches(items: Iterator[_T], size: int) -> Iterator[list[_T]]:
    """Yield items in lists of ``size``; the last one may be shorter."""
    while batch := list(itertools.islice(items, size)):
        yield batch
