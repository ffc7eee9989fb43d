"""Servers in front of a real Triton that send well-formed but wrong answers: types, shapes, sizes, names, statuses."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from aiohttp import ClientSession, web
from tritonclient.grpc import service_pb2 as pb

SERVICE = "/inference.GRPCInferenceService/"
HEADER_LENGTH = "Inference-Header-Content-Length"
TYPES = ("FP16", "FP64", "INT32", "BYTES", "BOOL", "BF16", "NONSENSE", "")
JUNK: tuple[Any, ...] = (None, 0, -1, 2**63, 1.5, "", "nonsense", True, [], [None], {}, {"a": 1})


class Tampering:
    """Decides which answers the two servers below change.

    Attributes:
        rate: fraction of the answers that are tampered with; 0 for none.
    """

    def __init__(self, seed: object) -> None:
        self.rate = 0.0
        self._draw, self._before = random.Random(f"{seed} tamper"), b""

    def draws(self) -> random.Random | None:
        """Return random numbers for tampering with the next answer, or None if it is passed on unchanged."""
        chance = random.Random(self._draw.random())
        return chance if chance.random() < self.rate else None


def _status(draw: random.Random, context: grpc.ServicerContext) -> None:
    context.abort(draw.choice([s for s in grpc.StatusCode if s is not grpc.StatusCode.OK]), "tampered\nwith \x00")


def tamper_infer(answer: pb.ModelInferResponse, earlier: pb.ModelInferResponse, draw: random.Random) -> None:
    """Change an answer in place so that a client must not accept it."""
    output = answer.outputs[0]
    raw = answer.raw_output_contents[0]

    def text() -> None:
        answer.raw_output_contents[0] = draw.randbytes(len(raw))

    def longer() -> None:
        answer.raw_output_contents[0] = raw + draw.randbytes(draw.randint(1, 99))

    def shorter() -> None:
        answer.raw_output_contents[0] = raw[: draw.randrange(len(raw))]

    def shape() -> None:
        del output.shape[:]
        output.shape.extend(draw.choice([[], [0], [-1], [1], [2**40, 3], [len(raw)], [1, len(raw) // 4, 1]]))

    def values() -> None:
        if output.datatype != "FP32":
            return text()
        array = np.frombuffer(raw, np.float32).copy()
        changed = draw.choice([array * 2, array * 0, array + np.nan, array * np.inf, array[::-1] + 1])
        answer.raw_output_contents[0] = changed.astype(np.float32).tobytes()
        return None

    kinds: list[Callable[[], object]] = [
        text,
        longer,
        shorter,
        shape,
        values,
        lambda: setattr(output, "datatype", draw.choice(TYPES)),
        lambda: setattr(output, "name", draw.choice(["", "nonsense", "card"])),
        lambda: setattr(answer, "id", draw.choice(["", "1", "nonsense"])),
        lambda: answer.CopyFrom(earlier),
        lambda: answer.Clear(),
        lambda: answer.ClearField("outputs"),
        lambda: answer.ClearField("raw_output_contents"),
    ]
    draw.choice(kinds)()


def tamper_json(value: Any, draw: random.Random) -> Any:
    """Return a JSON value with junk in one place, or with one entry removed."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        if draw.random() < 0.2:
            return {name: held for name, held in value.items() if name != key}
        return value | {key: tamper_json(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        return [*value[:place], tamper_json(value[place], draw), *value[place + 1 :]]
    return draw.choice([junk for junk in JUNK if junk != value])


@contextmanager
def tampered_grpc(port: int, tampering: Tampering) -> Iterator[int]:
    """Run a gRPC server in front of Triton's, and yield its port."""
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    earlier = [pb.ModelInferResponse()]

    def forward(method: str) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        call = channel.unary_unary(method)

        def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                answer: bytes = call(request, timeout=10)
            except grpc.RpcError as exc:
                context.abort(exc.code(), exc.details())
            draw = tampering.draws()
            if draw is None:
                return answer
            if draw.random() < 0.1:
                _status(draw, context)
            if draw.random() < 0.1:
                return draw.randbytes(draw.randint(0, 200))
            if method.endswith("/ModelInfer"):
                parsed = pb.ModelInferResponse.FromString(answer)
                before, earlier[0] = earlier[0], pb.ModelInferResponse.FromString(answer)
                tamper_infer(parsed, before, draw)
                return parsed.SerializeToString()
            if method.endswith("/ModelMetadata"):
                versions = draw.choice([[], ["x"], ["-1"], ["1e3"], ["99999999999"], ["2", "2", ""]])
                return pb.ModelMetadataResponse(name="clip", versions=versions).SerializeToString()
            if method.endswith("/ModelConfig"):
                config = pb.ModelConfigResponse()
                config.config.max_batch_size = draw.choice([0, -1, -(2**31)])
                return config.SerializeToString()
            return b""

        return handle

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(forward(details.method))

    with ThreadPoolExecutor(16) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers([Handler()])
        listening = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield listening
        finally:
            server.stop(grace=None).wait()
            channel.close()


@contextmanager
def tampered_http(port: int, tampering: Tampering) -> Iterator[int]:
    """Run an HTTP server in front of Triton's, and yield its port."""
    loop, ready, ports = asyncio.new_event_loop(), threading.Event(), []
    earlier = [b"{}"]

    async def handle(request: web.Request) -> web.Response:
        kept = {k: v for k, v in request.headers.items() if k.lower().startswith(("content-type", "inference"))}
        url, body = f"http://127.0.0.1:{port}{request.path_qs}", await request.read()
        async with (
            ClientSession(auto_decompress=False) as session,
            session.request(
                request.method, url, data=body, headers=kept, skip_auto_headers=("Accept-Encoding",)
            ) as answer,
        ):
            content, status = await answer.read(), answer.status
            headers = {k: v for k, v in answer.headers.items() if k.lower().startswith(("content-type", "inference"))}
        draw = tampering.draws()
        if draw is not None:
            before, earlier[0] = earlier[0], content
            status, content, headers = tamper_http(status, content, headers, before, draw)
        return web.Response(status=status, body=content, headers=headers)

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ports.append(site._server.sockets[0].getsockname()[1])
        ready.set()
        return runner

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def tamper_http(
    status: int, content: bytes, headers: dict[str, str], earlier: bytes, draw: random.Random
) -> tuple[int, bytes, dict[str, str]]:
    """Return status, body and headers of an answer, changed so that a client must not accept it."""
    length = int(headers.get(HEADER_LENGTH, len(content)))
    try:
        head, rest = json.loads(content[:length]), content[length:]
    except ValueError:
        return status, draw.randbytes(40), headers
    chance = draw.random()
    if chance < 0.1:
        return draw.choice([204, 206, 300, 304, 400, 403, 404, 418, 429, 500, 502, 503, 504]), content, headers
    if chance < 0.2:
        return status, draw.randbytes(draw.randint(0, len(content))), headers
    if chance < 0.3:
        return status, content, headers | {HEADER_LENGTH: draw.choice(["-1", "x", "0", str(2**40), str(length - 1)])}
    if chance < 0.4:
        return status, earlier, headers
    if chance < 0.5:
        return status, content, headers | {"Content-Encoding": draw.choice(["gzip", "deflate"])}
    if chance < 0.6 and "outputs" in head:
        head["outputs"][0]["datatype"] = draw.choice(TYPES)
    else:
        head = tamper_json(head, draw)
    changed = json.dumps(head).encode()
    return status, changed + rest, headers | ({HEADER_LENGTH: str(len(changed))} if HEADER_LENGTH in headers else {})
