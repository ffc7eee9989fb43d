"""How the core waits: by blocking, or in asyncio.

The core is written once, as coroutines. Everything in it that takes time is awaited from a runtime or a transport. In
the blocking kind these block and never suspend, so a coroutine that awaits nothing else runs to its end in one step,
without an event loop. In the asyncio kind they suspend, as usual.
"""

from __future__ import annotations

import _thread
import asyncio
import math
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import TimeoutError as FuturesTimeout
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from clipweld.client._fork import at_fork
from clipweld.client.errors import InvalidRequest

_T = TypeVar("_T")

BEFORE_FORK = "this call was begun in another process, before a fork; make a new call in the child"
LOOK_S = 0.1  # how often a thread that waits for a lock checks whether its work has been given up


class Runtime(Protocol):
    """The ways in which the core waits."""

    def start(self, coroutine: Coroutine[Any, Any, _T]) -> Awaitable[_T]:
        """Run a coroutine concurrently."""

    async def finish(self, started: list[Awaitable[Any]]) -> None:
        """Give up the work that was started, as far as possible."""

    async def result(self, future: Future[_T]) -> _T:
        """Wait for the result of a future that another thread completes; cancel it if the wait is interrupted.

        Raises:
            ConnectionAbortedError: the future was cancelled by someone else.
        """

    async def in_thread(self, function: Callable[..., _T], *args: Any) -> _T:
        """Call a function that keeps a core busy, without holding up an event loop."""

    async def sleep(self, seconds: float) -> None:
        """Wait for some seconds."""

    def lock(self) -> Any:
        """Create a lock for ``acquire``."""

    def semaphore(self, value: int) -> Any:
        """Create a semaphore for ``acquire``."""

    async def acquire(self, lock: Any, timeout_s: float) -> bool:
        """Acquire a lock or a semaphore; return False if it is still taken after ``timeout_s``, or earlier."""


class AsyncioRuntime:
    """Waits in the running event loop."""

    def start(self, coroutine: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        return asyncio.create_task(coroutine)

    async def finish(self, started: list[Awaitable[Any]]) -> None:
        for task in started:
            task.cancel()  # type: ignore[attr-defined]  # what start returned
        await asyncio.gather(*started, return_exceptions=True)

    async def result(self, future: Future[_T]) -> _T:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def wake(_: Future[_T]) -> None:
            with suppress(RuntimeError):  # the loop was closed in the meantime
                loop.call_soon_threadsafe(done.set)

        future.add_done_callback(wake)
        try:
            await done.wait()
        except BaseException:
            future.cancel()
            raise
        return _result(future)

    async def in_thread(self, function: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.to_thread(function, *args)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def lock(self) -> _LockOfEachLoop:
        return _LockOfEachLoop()

    def semaphore(self, value: int) -> asyncio.Semaphore:
        return asyncio.Semaphore(value)

    async def acquire(self, lock: _LockOfEachLoop | asyncio.Semaphore, timeout_s: float) -> bool:
        try:
            return await asyncio.wait_for(lock.acquire(), None if timeout_s == math.inf else timeout_s)
        except TimeoutError:
            return False


class _LockOfEachLoop:
    """A lock with a separate lock per event loop: asyncio's own is bound for good to the first loop that uses it."""

    def __init__(self) -> None:
        self._locks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()

    async def acquire(self) -> bool:
        return await self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock()).acquire()

    def release(self) -> None:
        self._locks[asyncio.get_running_loop()].release()


class BlockingRuntime:
    """Waits by blocking the calling thread. Each coroutine that is started has its own thread, so it may start more."""

    def start(self, coroutine: Coroutine[Any, Any, _T]) -> _InThread[_T]:
        return _InThread(coroutine)

    async def finish(self, started: list[Awaitable[Any]]) -> None:
        def give_up() -> None:
            for work in started:
                work.give_up()  # type: ignore[attr-defined]  # what start returned

        if started:
            aside(give_up)

    async def result(self, future: Future[_T]) -> _T:
        _wait(future)
        return _result(future)

    async def in_thread(self, function: Callable[..., _T], *args: Any) -> _T:
        return function(*args)

    async def sleep(self, seconds: float) -> None:
        _wait(Future(), seconds)

    def lock(self) -> threading.Lock:
        return threading.Lock()

    def semaphore(self, value: int) -> threading.Semaphore:
        return threading.Semaphore(value)

    async def acquire(self, lock: threading.Lock | threading.Semaphore, timeout_s: float) -> bool:
        got = lock.acquire(timeout=min(timeout_s, LOOK_S))
        if not got:
            _stop_if_given_up()
        return got


class _InThread(Awaitable[_T]):
    """A coroutine that runs in a thread; awaiting it blocks."""

    def __init__(self, coroutine: Coroutine[Any, Any, _T]) -> None:
        self.waits_for: Future[Any] | None = None
        self.given_up = False
        self._done: Future[_T] = Future()
        # A daemon, so that the interpreter can exit without waiting for work that a caller has abandoned.
        thread = threading.Thread(target=self._run, args=(coroutine,), name="clipweld", daemon=True)
        try:
            thread.start()
        except BaseException:
            coroutine.close()
            raise
        at_fork(self)

    def give_up(self) -> None:
        """End the work, at the latest when it next waits."""
        self.given_up = True
        if (future := self.waits_for) is not None:
            future.cancel()

    def after_fork(self) -> None:
        """Fail in the child, which has none of its parent's threads."""
        self._done = Future()
        self._done.set_exception(InvalidRequest(BEFORE_FORK))

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> None:
        _here.work = self
        settle(self._done, lambda: run(coroutine))

    def __await__(self) -> Generator[Any, None, _T]:
        yield from ()  # yields nothing; it only makes this a generator, as __await__ must return an iterator
        _wait(self._done)
        return _result(self._done)


class _GivenUp(BaseException):
    """Ends work whose result is no longer awaited. It is not an Exception, so that no handler of errors catches it."""


_here = threading.local()  # its attribute ``work`` is the _InThread that runs in this thread


def _wait(future: Future[Any], timeout_s: float | None = None) -> None:
    """Block until a future is done or the timeout has passed; cancel the future if the wait is interrupted."""
    work: _InThread[Any] | None = getattr(_here, "work", None)
    if work is not None:
        work.waits_for = future
    try:
        _stop_if_given_up()
        with suppress(CancelledError, FuturesTimeout):
            future.exception(timeout_s)
        _stop_if_given_up()
    except BaseException:
        future.cancel()
        raise


def _stop_if_given_up() -> None:
    work: _InThread[Any] | None = getattr(_here, "work", None)
    if work is not None and work.given_up:
        raise _GivenUp


def _result(future: Future[_T]) -> _T:
    """Return the result of a future that is done; raise ConnectionAbortedError if it was cancelled."""
    if future.cancelled():
        raise ConnectionAbortedError("given up")
    return future.result()


def settle(future: Future[_T], result: Callable[[], _T]) -> None:
    """Complete a future with a function's result or exception; a future that was cancelled stays as it is."""
    try:
        value = result()
    except BaseException as exc:  # for whoever waits for the future
        with suppress(InvalidStateError):
            future.set_exception(exc)
    else:
        with suppress(InvalidStateError):
            future.set_result(value)


def in_background(function: Callable[[], _T]) -> Future[_T]:
    """Call a function that may block for long, in a thread that the interpreter does not wait for at exit."""
    future: Future[_T] = Future()
    threading.Thread(target=settle, args=(future, function), name="clipweld-aside", daemon=True).start()
    return future


def aside(function: Callable[[], object]) -> None:
    """Call a function in the background, without even waiting for its thread to start.

    For functions that garbage collection may call. It can run in any thread, even the one that delivers gRPC's answers,
    while that thread holds any lock, even those inside `threading`. Code that waits there may wait for itself forever.
    """

    def begin() -> None:
        with suppress(RuntimeError):  # the interpreter is shutting down
            in_background(function)

    with suppress(RuntimeError):
        _thread.start_new_thread(begin, ())


def run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine of the blocking runtime to its end and return its result.

    Raises:
        RuntimeError: it suspended, because it awaited something that needs an event loop.
    """
    try:
        coroutine.send(None)
    except StopIteration as ended:
        value: _T = ended.value
        return value
    coroutine.close()
    raise RuntimeError("a coroutine of the blocking runtime suspended")


def iterate(items: AsyncGenerator[_T, None]) -> Generator[_T, None, None]:
    """Yield the items of an asynchronous generator of the blocking runtime."""
    try:
        while True:
            try:
                yield run(anext(items))
            except StopAsyncIteration:
                return
    finally:
        run(items.aclose())
