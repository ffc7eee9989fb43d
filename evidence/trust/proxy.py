"""A TCP proxy that delays, truncates, garbles or drops the data that passes through it, or closes connections."""

from __future__ import annotations

import asyncio
import random
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

CHUNK = 2**16
Pass = Callable[["Connection", bytes], Awaitable[None]]


class Connection:
    """A connection of a client, and the matching connection to the server.

    Attributes:
        to_client: writes to the client.
        draw: random numbers for the faults of this connection.
        ruined: whether the connection passes no valid data any more.
    """

    def __init__(self, to_client: asyncio.StreamWriter, to_server: asyncio.StreamWriter, draw: random.Random) -> None:
        self.to_client, self._to_server, self.draw, self.ruined = to_client, to_server, draw, False

    async def send(self, answer: bytes) -> None:
        """Send data to the client."""
        self.to_client.write(answer)
        await self.to_client.drain()

    def close(self, *, reset: bool) -> None:
        """End both connections, either with RST, or with FIN after the data that was sent."""
        for writer in (self.to_client, self._to_server):
            writer.transport.abort() if reset else writer.close()


class Proxy:
    """A proxy that listens on loopback, in a thread of its own.

    Args:
        port: port of the server.
        seed: seed of the faults.
        tls: if given, the proxy terminates TLS.

    Attributes:
        port: port on which the proxy listens.
        fault: handles each chunk of the server's answers; if None, chunks are passed on unchanged.
    """

    def __init__(self, port: int, seed: object, tls: ssl.SSLContext | None = None) -> None:
        self._target, self._seed, self._tls = port, seed, tls
        self.fault: Pass | None = None
        self._connections = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="proxy")
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Close all connections, and end the thread."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self._connections += 1
        draw = random.Random(f"{self._seed} {self._connections}")
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            to_client.transport.abort()
            return
        connection = Connection(to_client, to_server, draw)
        try:
            with suppress(OSError, asyncio.CancelledError):  # CancelledError when the proxy closes
                await asyncio.gather(
                    self._pump(from_client, to_server, connection, answers=False),
                    self._pump(from_server, to_client, connection, answers=True),
                )
        finally:
            connection.close(reset=True)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: Connection, *, answers: bool
    ) -> None:
        while chunk := await reader.read(CHUNK):
            if answers and self.fault is not None:
                await self.fault(connection, chunk)
            elif connection.ruined:
                continue
            else:
                writer.write(chunk)
                await writer.drain()
        with suppress(OSError, NotImplementedError):
            writer.close()


@contextmanager
def proxied(port: int, seed: object, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """Run a proxy in front of a port of this machine."""
    proxy = Proxy(port, seed, tls)
    try:
        yield proxy
    finally:
        proxy.close()


async def slow(connection: Connection, answer: bytes) -> None:
    """Delay the answer, now and then by longer than any client waits."""
    await asyncio.sleep(connection.draw.uniform(0, 0.05) if connection.draw.random() < 0.97 else 3)
    await connection.send(answer)


async def closed(connection: Connection, answer: bytes) -> None:
    """Close the connection before or after some answers."""
    if connection.draw.random() < 0.2:
        connection.close(reset=True)
    else:
        await connection.send(answer)
        if connection.draw.random() < 0.1:
            connection.close(reset=False)


async def truncated(connection: Connection, answer: bytes) -> None:
    """Close the connection in the middle of some answers."""
    if connection.draw.random() < 0.2:
        await connection.send(answer[: connection.draw.randrange(len(answer))])
        connection.close(reset=False)
    else:
        await connection.send(answer)


async def garbled(connection: Connection, answer: bytes) -> None:
    """At a random moment, start to send noise instead of answers, sometimes after a false HTTP answer."""
    if not connection.ruined and connection.draw.random() < 0.15:
        connection.ruined = True
        if connection.draw.random() < 0.3:
            await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    if connection.ruined:
        answer = connection.draw.randbytes(connection.draw.randint(1, 2 * len(answer)))
    await connection.send(answer)


async def silent(connection: Connection, answer: bytes) -> None:
    """Stop passing data without closing the connection, as if the other end had disappeared."""
    connection.ruined = True


async def flipped(connection: Connection, answer: bytes) -> None:
    """Flip one bit in some answers."""
    if connection.draw.random() < 0.2:
        changed = bytearray(answer)
        changed[connection.draw.randrange(len(answer))] ^= 1 << connection.draw.randrange(8)
        answer = bytes(changed)
    await connection.send(answer)
