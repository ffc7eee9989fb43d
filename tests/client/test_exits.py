"""The interpreter exits when the script does, silently, whatever calls are still unfinished."""

import signal
import socket
import subprocess
import sys
import time

import pytest

BEGIN = """
import asyncio, atexit, itertools, os, signal, sys, threading, time
import numpy as np
from clipweld.client import AsyncZeroShotClassifier, ZeroShotClassifier
url, endless = sys.argv[1], itertools.repeat(np.zeros((20, 24, 3), np.uint8))
settings = {"timeout_s": 1000, "deadline_s": None}
def ask(clip): return clip.classify(endless, ["cat", "dog"])
"""
ENDS = {
    "a global name holds the answers": "answers = ask(ZeroShotClassifier(url)); next(answers)",
    "an error of the caller's": "for answer in ask(ZeroShotClassifier(url)): raise KeyError('mine')",
    "sys.exit": "for answer in ask(ZeroShotClassifier(url)): sys.exit(3)",
    "os._exit": "for answer in ask(ZeroShotClassifier(url)): os._exit(3)",
    "closed before its answers": "with ZeroShotClassifier(url) as clip: answers = ask(clip); next(answers)",
    "a thread that has ended": """
held = []
def work():
    held.append(ask(ZeroShotClassifier(url)))
    next(held[0])
thread = threading.Thread(target=work); thread.start(); thread.join()
""",
    "a daemon thread in the middle": """
def work():
    for answer in ask(ZeroShotClassifier(url)): begun.set()
begun = threading.Event()
threading.Thread(target=work, daemon=True).start(); begun.wait()
""",
    "an asynchronous one, neither exhausted nor closed": """
clip = AsyncZeroShotClassifier(url)
async def work():
    global answers
    answers = ask(clip)
    await anext(answers)
asyncio.run(work())
""",
    "an event loop that was closed over it": """
clip, loop = AsyncZeroShotClassifier(url), asyncio.new_event_loop()
loop.run_until_complete(clip.versions())
loop.close()
""",
    "answers closed at the very end": """
answers = ask(ZeroShotClassifier(url)); next(answers); atexit.register(answers.close)
""",
}
CODES = {"an error of the caller's": 1, "sys.exit": 3, "os._exit": 3}


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", BEGIN + script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def silent_port():
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.mark.parametrize("way", ENDS)
def test_the_interpreter_exits_with_unfinished_calls_over_grpc(fake, way):
    check(run(ENDS[way], fake.url), way)


@pytest.mark.parametrize("way", ENDS)
def test_the_interpreter_exits_with_unfinished_calls_over_http(server, way):
    check(run(ENDS[way], server.http_url), way)


def check(done, way):
    assert done.returncode == CODES.get(way, 0), done.stderr
    said = done.stderr.splitlines()
    assert said[-1:] == (["KeyError: 'mine'"] if way == "an error of the caller's" else [])
    assert not [line for line in said if "gnored" in line or "never" in line or "nclosed" in line]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize("kind", ["ZeroShotClassifier", "AsyncZeroShotClassifier"])
def test_the_interpreter_exits_while_a_thread_waits_for_a_silent_server(silent_port, scheme, kind):
    script = f"""
clip = {kind}(url, timeout_s=1000)
def work():
    done = clip.versions()
    if asyncio.iscoroutine(done): asyncio.run(done)
threading.Thread(target=work, daemon=True).start()
time.sleep(1)
print("end", flush=True)
"""
    done = run(script, f"{scheme}://127.0.0.1:{silent_port}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


INTERRUPTED = {
    "blocking": "list(ask(ZeroShotClassifier(url, timeout_s=1000, retries=0)))",
    "asynchronous": """
async def work():
    async for answer in ask(AsyncZeroShotClassifier(url, timeout_s=1000, retries=0)): pass
asyncio.run(work())
""",
}


@pytest.mark.parametrize("kind", INTERRUPTED)
@pytest.mark.parametrize("interruption", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_call_to_a_server_that_stopped_answering(fake, kind, interruption):
    """Several requests are in flight when the signal arrives, and none is answered for a long time."""
    silent = [0]

    def go_silent(model, version, context):
        if model == "clip_image":
            silent[0] += 1
            time.sleep(20)

    fake.before_infer = go_silent
    command = [sys.executable, "-c", BEGIN + INTERRUPTED[kind], fake.url]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while silent[0] < 2:
        time.sleep(0.05)
    program.send_signal(interruption)
    began = time.monotonic()
    _, said = program.communicate(timeout=60)
    assert time.monotonic() - began < 10, "it waited for answers"
    assert program.returncode == -interruption
    assert said.splitlines()[-1:] == (["KeyboardInterrupt"] if interruption == signal.SIGINT else [])
