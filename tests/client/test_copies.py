"""Pickling and copying: classifiers keep their address and settings, answers and errors all their contents."""

import copy
import functools
import importlib
import math
import multiprocessing
import pickle

import pytest

from clipweld.client import TLS, AsyncZeroShotClassifier, ZeroShotClassifier
from clipweld.client._address import Address

LABELS = ["cat", "dog"]
COPIES = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "oldest pickle": lambda thing: pickle.loads(pickle.dumps(thing, 0)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def errors_of(package):
    module = importlib.import_module(f"clipweld.{package}.errors")
    return [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, BaseException)]


# Arguments of the errors whose constructor takes more than a message.
MADE_OF = {
    "client.UnknownTask": ("digit", ["digits", "clothes"], 2),
    "exporter.GateClosed": ("version 2 lost 3.0 on digits", [{"task": "digits"}], [("a", 0.5)]),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("package", ["client", "trainer", "exporter"])
def test_errors_keep_their_message_arguments_and_attributes(package, way):
    kinds = errors_of(package)
    assert len(kinds) > 10
    for kind in kinds:
        error = kind(*MADE_OF.get(f"{package}.{kind.__name__}", (f"{kind.__name__}: what, which, and the next step",)))
        error.image = "scan.png"  # attributes set later are copied too
        found = COPIES[way](error)
        assert type(found) is kind
        assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))
        assert str(found)


class Counting(ZeroShotClassifier):
    """A caller's subclass with its own state."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.counted = 3


@pytest.mark.parametrize("way", COPIES)
def test_a_copied_classifier_has_the_same_settings_and_its_own_connections(fake, picture, way):
    with Counting(fake.url, version=1, timeout_s=7, retries=0, headers={"X-Who": "me"}) as clip:
        (before,) = clip.classify(picture, LABELS)
        with COPIES[way](clip) as found:
            assert (type(found), found.counted, found._settings) == (Counting, 3, clip._settings)
            assert list(found.classify(picture, LABELS)) == [before]
            clip.close()
            assert list(found.classify(picture, LABELS)) == [before]
        assert list(clip.classify(picture, LABELS)) == [before]


def test_all_settings_survive_pickling_and_secrets_stay_out_of_the_repr(tmp_path):
    (tmp_path / "ca.pem").write_text("")
    settings = {"version": "latest", "timeout_s": math.inf, "retries": 7, "exif_orientation": False}
    tls = TLS(ca=tmp_path / "ca.pem")
    for kind in (ZeroShotClassifier, AsyncZeroShotClassifier):
        clip = kind("grpcs://a:443", "other", headers={"authorization": "secret"}, tls=tls, **settings)
        found = COPIES["pickle"](clip)
        assert found._settings == clip._settings
        assert found._settings.address == Address("grpc", "a", 443, True, tls, {"authorization": "secret"})
        assert "secret" not in repr(found._settings)


def label_of(clip, picture):
    return next(clip.classify(picture, LABELS)).best.label


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_classifier_can_be_sent_to_a_pool_of_spawned_processes(fake, picture, method):
    with ZeroShotClassifier(fake.url) as clip:
        expected = label_of(clip, picture)
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(functools.partial(label_of, clip), [picture] * 4) == [expected] * 4


def test_answers_cards_and_tasks_survive_copying(fake, picture):
    with ZeroShotClassifier(fake.url) as clip:
        things = [*clip.classify(picture, task="digits"), clip.card(), *clip.tasks()]
    for thing in things:
        for make in COPIES.values():
            assert make(thing) == thing
