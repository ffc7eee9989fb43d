"""Numbers, names and headers as callers pass them, and errors raised by callers' own iterators."""

import asyncio
import math
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from clipweld.client import TLS, AsyncZeroShotClassifier, ZeroShotClassifier, bench
from clipweld.client.errors import BadImage, InvalidRequest, RequestTimeout, VersionGone

LABELS = ["cat", "dog", "bird"]
NO_LIMIT = [math.inf, None, 1e300, 10**30, 10**400, np.float64("inf"), np.float32("inf"), Decimal("1e400"), "inf"]
SOME_SECONDS = [20, 20.5, np.int64(20), np.float32(20.5), Decimal("20.5"), Fraction(41, 2), np.array(20), "20", " 2e1 "]
TWO = [2, 2.0, np.int8(2), np.uint64(2), np.float32(2), np.array(2), Decimal(2), Fraction(4, 2), "2", "2.0"]
NO_NUMBERS = [math.nan, np.float32("nan"), "nan", "two", "", b"2", True, np.True_, [2], np.array([2]), 2j]
NO_NUMBERS.append(pytest.param(object(), id="object"))
BELOW = [-1, -1.5, -math.inf, "-1", np.int64(-1), Decimal("-1"), -(10**400)]
NO_SECONDS = [*NO_NUMBERS, *BELOW, 0, 0.0, "0", np.float64(0), Fraction(0)]


@pytest.fixture
def clip(fake, connect):
    with connect(fake.url) as classifier:
        yield classifier


@pytest.mark.parametrize("value", [*NO_LIMIT, *SOME_SECONDS], ids=repr)
def test_timeouts_are_accepted_as_any_kind_of_number(fake, picture, connect, value):
    with connect(fake.url, timeout_s=value) as clip:
        assert clip.classify(picture, LABELS, deadline_s=value)[0].version == 2
        assert clip.text_features(LABELS, deadline_s=value).shape == (3, 8)


@pytest.mark.parametrize("value", NO_SECONDS, ids=repr)
def test_invalid_timeouts_are_refused_by_name(picture, connect, value):
    with pytest.raises(InvalidRequest, match=r"^timeout_s is .*; expected more than 0 seconds, or None for no limit"):
        connect("localhost:1", timeout_s=value)
    with connect("localhost:1") as clip:
        for ask in (
            clip.card,
            clip.versions,
            clip.server_info,
            lambda **settings: clip.classify(picture, LABELS, **settings),
        ):
            with pytest.raises(InvalidRequest, match=r"^deadline_s is "):
                ask(deadline_s=value)


@pytest.mark.parametrize("value", [1e-300, 5e-324, "1e-9"])
def test_tiny_timeouts_expire_at_once(fake, connect, value):
    with connect(fake.url, timeout_s=value, retries=0) as clip, pytest.raises(RequestTimeout):
        clip.versions()
    with connect(fake.url) as clip, pytest.raises(RequestTimeout):
        clip.versions(deadline_s=value)


@pytest.mark.parametrize("value", TWO, ids=repr)
def test_counts_are_accepted_as_any_kind_of_whole_number(fake, picture, connect, value):
    with connect(fake.url, version=value, retries=value) as clip:
        (answer,) = clip.classify(picture, LABELS, top_k=value)
        assert (answer.version, len(answer.predictions)) == (2, 2)
        assert type(answer.to_dict()["version"]) is int


@pytest.mark.parametrize("value", [math.inf, 1e300, 10**30, "1e5", np.int64(2**62)], ids=repr)
def test_a_top_k_larger_than_the_number_of_labels_returns_all_labels(fake, picture, connect, value):
    with connect(fake.url, retries=value) as clip:
        assert len(clip.classify(picture, LABELS, top_k=value)[0].predictions) == 3


@pytest.mark.parametrize("value", [*NO_NUMBERS, *BELOW, 2.5, "2.5", Fraction(5, 2)], ids=repr)
def test_invalid_counts_are_refused_by_name(picture, connect, value):
    with pytest.raises(InvalidRequest, match=r"^version is .*; expected a whole number, .* or 'latest'"):
        connect(version=value)
    with pytest.raises(InvalidRequest, match=r"^retries is .*; expected a whole number, 0 or more"):
        connect(retries=value)
    with (
        connect("localhost:1") as clip,
        pytest.raises(InvalidRequest, match=r"^top_k is .*; expected a whole number, 1"),
    ):
        clip.classify(picture, LABELS, top_k=value)


def test_version_numbers_out_of_range_are_refused(fake, connect):
    for value in (math.inf, 10**30, 10**5000, 2**63, "99999999999999999999"):
        with pytest.raises(InvalidRequest, match=r"^version is .* 1 to 9,223,372,036,854,775,807, or 'latest'"):
            connect(version=value)
    with connect(fake.url, version=2**63 - 1) as clip, pytest.raises(VersionGone, match="ready: 1, 2"):
        clip.card()
    for value in ("latest", None):
        with connect(fake.url, version=value) as clip:
            assert clip.card().version == 2


@pytest.mark.parametrize(
    "value", ["", " ", None, 3, b"clip", "a/b", "..", "clip\n", "clip\0", "cl\udcffip", ["clip"]], ids=repr
)
def test_invalid_model_and_task_names_are_refused(picture, connect, value):
    with pytest.raises(InvalidRequest, match=r"^model is "):
        connect(model=value)
    if value not in (None, "a/b", ".."):
        with connect("localhost:1") as clip, pytest.raises(InvalidRequest, match=r"^task is "):
            clip.classify(picture, task=value)


@pytest.mark.parametrize(
    "value",
    [None, 3, b"localhost:8001", ["a:1"], "a b:1", "a\n:1", "a:1\n", f"{'a' * 99}:1", "a..b:1", "a:-1", "a:1e3"],
)
def test_invalid_urls_are_refused(connect, value):
    with pytest.raises(InvalidRequest, match=r"^url .*; expected host:port"):
        connect(value)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ([("a", "b")], "headers is a list"),
        ("a: b", "headers is a str"),
        ({3: "a"}, "header 3 cannot"),
        ({"": "a"}, "header '' cannot"),
        ({"a b": "c"}, "header 'a b' cannot"),
        ({"a:": "b"}, "header 'a:' cannot"),
        ({"é": "b"}, "header 'é' cannot"),
        ({"Content-Length": "3"}, "header 'Content-Length' cannot"),
        ({"Transfer-Encoding": "chunked"}, "header 'Transfer-Encoding' cannot"),
        ({"grpc-timeout": "1S"}, "header 'grpc-timeout' cannot"),
        ({"trace-bin": "a"}, "header 'trace-bin' cannot"),
        ({"A": "1", "a": "2"}, "header 'a' is given twice"),
        ({"a": "secret\n"}, "header 'a' cannot be sent: its value"),
        ({"a": "secrét"}, "header 'a' cannot be sent: its value"),
        ({"a": b"secret"}, "header 'a' cannot be sent: its value, a bytes,"),
        ({"a": None}, "header 'a' cannot be sent: its value"),
        ({"a": True}, "header 'a' cannot be sent: its value"),
    ],
)
def test_headers_that_cannot_be_sent_are_refused(connect, headers, message):
    with pytest.raises(InvalidRequest, match=f"^{message}") as caught:
        connect(headers=headers)
    assert "secr" not in str(caught.value)


def test_unusual_but_valid_headers_are_accepted_over_both_protocols(server, connect):
    headers = {"X-Number": 3, "x_under.score-1": "with = signs; and, more", "Authorization": "", "User-Agent": "mine"}
    for url in (server.url, server.http_url):
        with connect(url, headers=headers) as clip:
            assert clip.versions() == [1, 2]


@pytest.mark.parametrize("texts", [None, 3, b"cat", {"cat": 1}, ["cat", 3], ["cat", None], [b"cat"]])
def test_texts_of_the_wrong_type_are_refused(connect, texts):
    with connect("localhost:1") as clip, pytest.raises(InvalidRequest, match=r"^texts? .*; expected text"):
        clip.text_features(texts)


def test_tls_settings_of_the_wrong_type_are_refused(connect):
    with pytest.raises(InvalidRequest, match=r"^tls is 'ca.pem'; expected client.TLS"):
        connect("grpcs://a:443", tls="ca.pem")
    with pytest.raises(InvalidRequest, match=r"^tls: ca is b'a.pem'; expected the path"):
        TLS(ca=b"a.pem")
    with pytest.raises(InvalidRequest, match="needs its key"):
        TLS(certificate="a.pem")


@pytest.mark.parametrize(
    "settings",
    [
        {"requests": 0}, {"requests": 1e300}, {"requests": "many"}, {"batches": []}, {"batches": 3}, {"batches": [0]},
        {"concurrencies": [math.inf]}, {"concurrencies": [10**6]}, {"concurrencies": "12"}, {"timeout_s": math.nan},
        {"model": ""}, {"versions": (1,)}, {"versions": (1, 2, 3)}, {"versions": (0, 2)}, {"versions": 3},
    ],
    ids=repr,
)  # fmt: skip
def test_a_benchmark_refuses_invalid_settings_by_name(settings):
    (name,) = settings
    with pytest.raises(InvalidRequest, match=f"^{name.removesuffix('s')}"):
        bench("localhost:1", **({"versions": (1, 2)} | settings))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--version", "99999999999999999999"], "client: version is 99999999999999999999; "),
        (["--model", "a/b"], "client: model is 'a/b'; "),
        (["--timeout", "inf"], "client: no server at localhost:1: "),
        (["--timeout", "1e300"], "client: no server at localhost:1: "),
    ],
)
def test_the_command_reports_invalid_arguments_in_one_line(flags, message):
    command = [
        sys.executable,
        "-c",
        "from clipweld.client.cli import main; main()",
        "tasks",
        "--url",
        "localhost:1",
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


class Own(BaseException):
    """Not an ``Exception``, like ``KeyboardInterrupt``."""


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 40])
@pytest.mark.parametrize("raised", [KeyError("mine"), Own("mine"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_images_yielded_before_an_iterator_fails_are_answered_first(fake, picture, kind_of_answers, count, raised):
    def images():
        for _ in range(count):
            yield picture
        raise raised

    answers, caught = kind_of_answers(fake.url, images(), LABELS)
    assert [answer.image for answer in answers] == [f"image {i} (ndarray)" for i in range(count)]
    assert caught is raised


@pytest.mark.parametrize("place", [0, 1, 6, 39])
def test_images_before_an_unreadable_one_are_answered_first(fake, picture, kind_of_answers, place):
    images = [picture] * place + [b"nonsense"] + [picture] * 10
    answers, caught = kind_of_answers(fake.url, images, LABELS)
    assert len(answers) == place
    assert type(caught) is BadImage
    assert caught.image == f"image {place} (bytes)"


@pytest.fixture(params=["blocking", "asynchronous"])
def kind_of_answers(request):
    """A function that classifies and returns the answers and the exception that ended them."""

    def blocking(url, *question):
        answers = []
        with ZeroShotClassifier(url) as clip:
            stream = clip.classify(*question)
            while True:
                try:
                    answers.append(next(stream))
                except BaseException as exc:
                    return answers, exc

    def asynchronous(url, *question):
        async def ask():
            answers = []
            async with AsyncZeroShotClassifier(url) as clip:
                try:
                    async for answer in clip.classify(*question):
                        answers.append(answer)  # a comprehension would lose the answers before the error
                except BaseException as exc:
                    return answers, exc
            return answers, None

        return asyncio.run(ask())

    return blocking if request.param == "blocking" else asynchronous


def test_asynchronous_iterators_are_refused_by_name(fake, picture, connect):
    async def images():
        yield picture

    with connect(fake.url) as clip, pytest.raises(BadImage, match=r"images is an? async_generator; "):
        clip.classify(images(), LABELS)
