import inspect
import subprocess
import sys

import pytest

from clipweld import client

OTHERS = {"clipweld.trainer", "clipweld.exporter"}


def test_public_names_are_exactly_these():
    assert set(client.__all__) == {
        "AsyncZeroShotClassifier", "BenchResult", "Card", "Classification", "ClientError", "ImageLike", "Interval",
        "LeftOut", "Prediction", "ServerInfo", "TLS", "Task", "Timing", "ZeroShotClassifier", "bench", "errors",
    }  # fmt: skip
    public = {name for name in vars(client) if not name.startswith("_")} - {"cli"}
    assert public == set(client.__all__)


def test_public_names_are_documented():
    for name in client.__all__:
        value = getattr(client, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name
            methods = [method for key, method in vars(value).items() if not key.startswith("_")]
            assert all(method.__doc__ for method in methods if inspect.isfunction(method)), name


def loaded_after(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = done.stdout.split()
    return {name.partition(".")[0] for name in found} | OTHERS.intersection(found)


@pytest.mark.slow
def test_import_and_help_load_nothing_heavy():
    heavy = {"torch", "torchvision", "open_clip", "onnx", "onnxruntime", *OTHERS, "tritonclient", "grpc"}
    heavy |= {"gevent", "tokenizers", "ftfy"}
    assert not loaded_after("import clipweld.client") & heavy
    assert not loaded_after("import clipweld.client.cli") & heavy


@pytest.mark.slow
def test_a_classification_imports_neither_torch_nor_the_other_packages(fake):
    call = (
        "import numpy; from clipweld.client import ZeroShotClassifier; "
        f"list(ZeroShotClassifier({fake.url!r}).classify(numpy.ones((9, 9, 3), 'u1'), ['a']))"
    )
    assert not loaded_after(call) & {"torch", "torchvision", "open_clip", "onnx", "onnxruntime", *OTHERS}
