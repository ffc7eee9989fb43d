"""How the one core waits: blocking, or in asyncio.

The core is written once, as coroutines. Everything in it that takes time is awaited from a runtime or a transport.
Those of the blocking kind block and never suspend, so a coroutine that awaits nothing else runs to its end in one step,
without an event loop; those of asyncio suspend, as usual.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Protocol, TypeVar

_T = TypeVar("_T")


class Runtime(Protocol):
    """What the core waits with."""

    def start(self, coroutine: Coroutine[Any, Any, _T]) -> Awaitable[_T]:
        """Have a coroutine go on by itself."""

    async def finish(self, started: list[Awaitable[Any]]) -> None:
        """Give up what was started, as far as that is possible, and wait until it has ended."""

    async def in_thread(self, function: Callable[..., _T], *args: Any) -> _T:
        """Call a function that keeps a core busy, off the thread that waits for answers."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""

    def lock(self) -> Any:
        """A lock for ``acquire``."""

    def semaphore(self, value: int) -> Any:
        """A semaphore for ``acquire``."""

    async def acquire(self, lock: Any, timeout_s: float) -> bool:
        """Take a lock or a semaphore; False if it could not be had in time."""


class AsyncioRuntime:
    """Waits in the running event loop."""

    def start(self, coroutine: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        return asyncio.create_task(coroutine)

    async def finish(self, started: list[Awaitable[Any]]) -> None:
        for task in started:
            task.cancel()  # type: ignore[attr-defined]  # what start gave
        await asyncio.gather(*started, return_exceptions=True)

    async def in_thread(self, function: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.to_thread(function, *args)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def lock(self) -> asyncio.Lock:
        return asyncio.Lock()

    def semaphore(self, value: int) -> asyncio.Semaphore:
        return asyncio.Semaphore(value)

    async def acquire(self, lock: asyncio.Lock | asyncio.Semaphore, timeout_s: float) -> bool:
        try:
            return await asyncio.wait_for(lock.acquire(), None if timeout_s == math.inf else timeout_s)
        except asyncio.TimeoutError:
            return False


class BlockingRuntime:
    """Waits by blocking the calling thread. What is started has a thread of its own, so that it may start more."""

    def start(self, coroutine: Coroutine[Any, Any, _T]) -> _InThread[_T]:
        return _InThread(coroutine)

    async def finish(self, started: list[Awaitable[Any]]) -> None:
        for work in started:
            with suppress(Exception):
                await work

    async def in_thread(self, function: Callable[..., _T], *args: Any) -> _T:
        return function(*args)

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def lock(self) -> threading.Lock:
        return threading.Lock()

    def semaphore(self, value: int) -> threading.Semaphore:
        return threading.Semaphore(value)

    async def acquire(self, lock: threading.Lock | threading.Semaphore, timeout_s: float) -> bool:
        return lock.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX))


class _InThread(Awaitable[_T]):
    """A coroutine in a thread; awaiting it blocks."""

    def __init__(self, coroutine: Coroutine[Any, Any, _T]) -> None:
        self._future: Future[_T] = Future()
        threading.Thread(target=self._run, args=(coroutine,), name="clipweld", daemon=True).start()

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> None:
        try:
            self._future.set_result(run(coroutine))
        except BaseException as exc:  # of whoever awaits it
            self._future.set_exception(exc)

    def __await__(self) -> Generator[Any, None, _T]:
        return self._future.result()
        yield  # never reached: it makes this a generator, as __await__ must be


def run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine of a blocking runtime to its end.

    Raises:
        RuntimeError: it suspended: it awaited something that needs an event loop.
    """
    try:
        coroutine.send(None)
    except StopIteration as ended:
        value: _T = ended.value
        return value
    coroutine.close()
    raise RuntimeError("a coroutine of the blocking runtime suspended")


def iterate(items: AsyncGenerator[_T, None]) -> Generator[_T, None, None]:
    """The items of an asynchronous generator of a blocking runtime."""
    try:
        while True:
            try:
                yield run(anext(items))
            except StopAsyncIteration:
                return
    finally:
        run(items.aclose())
