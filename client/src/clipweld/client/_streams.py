"""Work on a stream: several items at a time, results in their order, and nothing lost that came before an error."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from clipweld.client._runtime import Runtime

# Requests on their way at a time, and batches that are read and resized meanwhile. One request is answered while the
# next waits at the server. More would not help: Triton joins what waits into one batch.
IN_FLIGHT = 2
AHEAD = 6

_T = TypeVar("_T")
_U = TypeVar("_U")


class Supply(Iterator[_T]):
    """A caller's iterator, which ends where it raises.

    Attributes:
        raised: what it raised; to be raised when all that it gave before has been answered.
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
    """The results of working on items, several at a time; what works on a request takes its ``turn`` for it.

    No generator: event loops close those one by one when they end, in whatever order.
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
            if len(first) == 1:  # no thread or task for what is alone
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
        """Give up what is underway."""
        await self._runtime.finish(list(self._started))


def in_batches(items: Iterator[_T], size: int) -> Iterator[list[_T]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
