"""The requests of one call: retried where that is safe, and never past the call's deadline."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from clipweld.client._runtime import Runtime
from clipweld.client._transport import Transport
from clipweld.client.errors import RequestTimeout, ServerBusy, ServerUnavailable

_T = TypeVar("_T")

# Retrying is safe: no request changes anything on the server, and these errors mean that there was no answer.
RETRIED = (ServerUnavailable, RequestTimeout, ServerBusy)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 2.0


class Asker:
    """The requests of one call, which share its deadline.

    Args:
        transport: where they are sent.
        runtime: how to wait, for locks and between attempts.
        timeout_s: limit on one request, in seconds.
        retries: how often a request without an answer is retried, after randomised, growing pauses.
        deadline_s: limit on the whole call, in seconds; None: no limit.
    """

    def __init__(
        self, transport: Transport, runtime: Runtime, timeout_s: float, retries: int, deadline_s: float | None
    ) -> None:
        self.transport = transport
        self._runtime, self._timeout_s, self._retries = runtime, timeout_s, retries
        self._deadline_s = deadline_s
        self._end = None if deadline_s is None else time.monotonic() + deadline_s

    async def ask(self, request: Callable[[float], Awaitable[_T]]) -> _T:
        """Make a request, and retry it while there is no answer.

        Args:
            request: called with its time limit, in seconds.

        Raises:
            RequestTimeout: every attempt took longer than its limit, or the call's deadline has passed.
            ClientError: any other error of the request.
        """
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

        retrying = AsyncRetrying(
            sleep=self._sleep,
            stop=stop_after_attempt(1 + self._retries),
            wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            retry=retry_if_exception_type(RETRIED),
            reraise=True,
        )
        return await retrying(self._once, request)

    @asynccontextmanager
    async def holding(self, lock: Any) -> AsyncGenerator[None, None]:
        """Hold a lock or a semaphore of the runtime.

        Raises:
            RequestTimeout: the call's deadline passed before it was free.
        """
        while not await self._runtime.acquire(lock, self._left()):
            pass  # _left raises once the deadline has passed
        try:
            yield
        finally:
            lock.release()

    async def _once(self, request: Callable[[float], Awaitable[_T]]) -> _T:
        return await request(min(self._timeout_s, self._left()))

    async def _sleep(self, seconds: float) -> None:
        await self._runtime.sleep(min(seconds, self._left()))

    def _left(self) -> float:
        """Return the seconds until the deadline, or raise RequestTimeout after it."""
        if self._end is None:
            return float("inf")
        left = self._end - time.monotonic()
        if left <= 0:
            raise RequestTimeout(f"the call was not done within {self._deadline_s:g} s; allow more time, or ask less")
        return left
