"""Promotion, rollback and pruning: on disk, and in a real Triton under load."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import tritonclient.grpc

from clipweld.client import ZeroShotClassifier
from clipweld.client.errors import VersionGone
from clipweld.exporter import cli
from clipweld.exporter.errors import (
    ConfigChanged,
    NothingToRollBackTo,
    PromotionFailed,
    RepositoryError,
    ServerUnreachable,
    VersionDamaged,
    VersionMissing,
)
from clipweld.exporter.release.publish import release
from clipweld.exporter.serving import servers, switch
from clipweld.exporter.serving.admin import admin_key
from clipweld.exporter.serving.switch import promote, prune, rollback
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.repository import HISTORY_FILE, KINDS, Repository

CLIENTS = 4


@pytest.fixture(scope="session")
def four(released, mini, make_adapter, samples, take_traced, tmp_path_factory):
    """A repository that serves version 2, with two more in the store."""
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(released[0].path.parent, folder, dirs_exist_ok=True)
    repository = Repository(folder / "model_repository", "clip")
    lineage = [make_adapter("digits")]
    with pytest.MonkeyPatch.context() as patch:
        take_traced(patch)
        for seed, task in enumerate(("letters", "flags"), start=3):
            lineage.append(make_adapter(task, tuple(lineage), seed=seed))
            release(mini, lineage, repository, *samples)
    return repository


@pytest.fixture
def repository(four, tmp_path):
    """A copy of ``four`` that a test may change."""
    shutil.copytree(four.path.parent, tmp_path, dirs_exist_ok=True)
    return Repository(tmp_path / "model_repository", "clip")


def folders(repository):
    return sorted(os.listdir(repository.path.parent))


def test_promotion_keeps_the_previous_version_and_rollback_undoes_each_promotion(repository):
    assert (repository.versions(), repository.standing(), repository.served) == ([1, 2, 3, 4], [1, 2], 2)
    promoted = promote(repository, 4, [])
    assert (promoted.version, promoted.previous, promoted.standing, promoted.servers) == (4, 2, [2, 4], [])
    assert promote(repository, 3, []).standing == [3]  # clients would get version 4 if it stayed loaded
    assert repository.history() == [1, 2, 4, 3]
    for version in (4, 2, 1):
        assert rollback(repository, []).version == version
        assert repository.standing() == [version]
    with pytest.raises(NothingToRollBackTo, match="before version 1"):
        rollback(repository, [])
    assert repository.versions() == [1, 2, 3, 4]
    assert folders(repository) == ["model_repository", "model_repository.store"]


def test_promoting_the_served_version_changes_nothing(repository):
    promote(repository, 3, [])
    written = (repository.store / HISTORY_FILE).read_bytes()
    assert promote(repository, 3, []).standing == [2, 3]
    assert repository.history() == [1, 2, 3]
    assert (repository.store / HISTORY_FILE).read_bytes() == written


def test_active_files_are_hard_links_to_the_store(repository):
    promote(repository, 3, [])
    for kind in KINDS:
        model = repository.model(kind)
        assert sorted(os.listdir(model)) == ["2", "3", "config.pbtxt"]
        assert sorted(os.listdir(model / "3")) == ["manifest.json", "model.onnx"]
        assert (model / "3/model.onnx").samefile(repository.file(kind, 3))


def test_a_missing_version_is_refused_and_the_present_ones_are_listed(repository):
    with pytest.raises(VersionMissing, match=r"clip version 9: .*versions there: 1, 2, 3, 4"):
        promote(repository, 9, [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_version_is_never_promoted(repository, kind):
    file = repository.file(kind, 3)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(VersionDamaged, match=f"3/{kind}/model.onnx: has .* bytes, the manifest says"):
        promote(repository, 3, [])
    assert repository.standing() == [1, 2]


def test_an_edited_config_is_refused_before_anything_changes(repository):
    (repository.model("card") / "config.pbtxt").write_text("edited")
    with pytest.raises(ConfigChanged):
        promote(repository, 3, [])
    assert (repository.standing(), repository.model("image") / "3" in repository.model("image").iterdir()) == (
        [1, 2],
        False,
    )


def test_an_unreachable_server_is_reported_before_anything_changes(repository):
    for url in ("127.0.0.1:1", "http://127.0.0.1:1"):
        with pytest.raises(ServerUnreachable, match=f"server {url}: .*another --url"):
            promote(repository, 3, [url])
    assert repository.standing() == [1, 2]


def test_an_outdated_history_is_corrected_from_the_active_files(repository):
    """After a kill between the last rename and writing the history, the files decide."""
    with repository.writing() as staging:
        repository.put_in(3, staging)
    assert repository.history() == [1, 2, 3]
    assert rollback(repository, []).version == 2
    repository.record([1, 2], [1, 2, 3])
    assert repository.history() == [1, 2]
    with repository.writing() as staging:
        repository.put_in(3, staging)
    assert repository.history() == [1, 2, 3]


def test_prune_keeps_the_newest_the_active_and_the_base(repository):
    promote(repository, 3, [])
    pruned = prune(repository, 1)
    assert (pruned.removed, pruned.kept) == ([], [1, 2, 3, 4])
    promote(repository, 4, [])
    pruned = prune(repository, 1)
    assert (pruned.removed, pruned.kept) == ([2], [1, 3, 4])
    assert repository.versions() == [1, 3, 4]
    assert rollback(repository, []).version == 3
    assert rollback(repository, []).version == 1


def test_prune_works_on_a_full_disk(repository, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("mkdir", "link", "symlink"):
        monkeypatch.setattr(os, name, full)
    assert prune(repository, 1).removed == [3]
    with pytest.raises(RepositoryError, match=r"can't be written .No space left on device.; make room"):
        promote(repository, 4, [])
    assert repository.standing() == repository.history() == [1, 2]


def test_the_commands_print_what_they_changed(repository, monkeypatch, capsys):
    monkeypatch.setattr(servers, "DEFAULT_SERVER", "127.0.0.1:1")
    monkeypatch.delenv("CLIPWELD_URL", raising=False)
    where = ["--repository", str(repository.path)]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["exporter", *arguments, *where])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    assert "version 3 is served (before: 2) from the next start on" in run("promote", "3")
    versions = json.loads(run("versions", "--json"))
    assert [(v["version"], v["served"], v["standing"]) for v in versions] == [
        (1, False, False), (2, False, True), (3, True, True), (4, False, False),
    ]  # fmt: skip
    assert [entry["task"] for entry in versions[3]["lineage"]] == ["digits", "letters", "flags"]
    assert "served" in run("versions")
    assert json.loads(run("rollback", "--json"))["version"] == 2
    pruned = json.loads(run("prune", "--keep", "1", "--json"))
    assert (pruned["model"], pruned["removed"], pruned["kept"]) == ("clip", [1 + 2], [1, 2, 4])
    assert (pruned["servers"], pruned["looked"][-1]) == ([], "nothing listens at 127.0.0.1:1")


def test_promote_without_a_number_takes_the_newest_version_and_names_it(repository, monkeypatch, capsys):
    monkeypatch.setattr(servers, "DEFAULT_SERVER", "127.0.0.1:1")
    monkeypatch.delenv("CLIPWELD_URL", raising=False)
    monkeypatch.setattr(sys, "argv", ["exporter", "promote", "--repository", str(repository.path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "clip version 4 is served (before: 2)" in capsys.readouterr().out
    assert (repository.served, promote(repository, None, []).version) == (4, 4)


def test_the_table_of_versions_has_plain_headings_and_states(repository, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["exporter", "versions", "--repository", str(repository.path)])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    for word in ("model", "version", "state", "learned tasks, accuracy %", "made on", "base weights"):
        assert word in shown.splitlines()[1]
    assert [shown.count(state) for state in ("served", "loaded", "stored")] == [1, 1, 2]


@pytest.fixture(scope="module")
def live(four, tmp_path_factory):
    """A real Triton on a copy of the four versions."""
    folder = tmp_path_factory.mktemp("live")
    shutil.copytree(four.path.parent, folder, dirs_exist_ok=True)
    repository = Repository(folder / "model_repository", "clip")
    with serve(repository.path) as server:
        yield repository, server


@pytest.mark.slow
def test_prune_keeps_versions_that_a_running_server_has_loaded(live):
    repository, server = live
    promote(repository, 3, [server.url])
    promote(repository, 1, [])
    assert repository.standing() == [1]
    assert prune(repository, 1, [server.url]).kept == [1, 2, 3, 4]
    promote(repository, 2, [server.url])


@pytest.fixture(scope="module")
def probe(live, samples):
    """(images, label, features by version): the answers of each version without load."""
    repository, server = live
    images, label = samples[0][:1], "a cat"
    features = {}
    for version in repository.versions():
        promote(repository, version, [server.url])
        with ZeroShotClassifier(server.url, version=version) as classifier:
            features[version] = classifier.image_features(images), classifier.text_features([label])
    for one, other in itertools.combinations(features.values(), 2):
        assert np.abs(one[0] - other[0]).max() > 1e-3
    return images, label, features


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "switches"), [("url", 20), ("http_url", 4)])
def test_switches_under_load_lose_no_request_and_mix_no_towers(live, probe, protocol, switches):
    """Old and new clients ask all the time; every answer comes from a single version, whatever is switched."""
    repository, server = live
    images, label, features = probe
    scores = {version: float((image @ text.T)[0, 0]) for version, (image, text) in features.items()}
    done, switching, seconds = threading.Event(), threading.Event(), {True: [], False: []}

    def steady(fresh):
        seen, classifier = set(), ZeroShotClassifier(server.url)
        while not done.is_set():
            if fresh:
                classifier.close()
            began, during = time.perf_counter(), switching.is_set()
            (answer,) = classifier.classify(images, labels=[label], templates=["{}"])
            seconds[during or switching.is_set()].append(time.perf_counter() - began)
            assert answer.best.score == pytest.approx(scores[answer.version], abs=1e-5)
            seen.add(answer.version)
        classifier.close()
        return seen

    order = itertools.cycle((3, 4, "back", 2, 3, "back", 1, 4))
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(steady, place % 2) for place in range(CLIENTS)]
        try:
            for version in itertools.islice(order, switches):
                time.sleep(0.5)
                url = getattr(server, protocol)
                switching.set()
                switched = rollback(repository, [url]) if version == "back" else promote(repository, version, [url])
                switching.clear()
                assert switched.servers == [url]
                with ZeroShotClassifier(server.url) as classifier:
                    assert next(classifier.classify(images, labels=[label])).version == switched.version
                    assert classifier.versions() == switched.standing
        finally:
            time.sleep(0.2)
            done.set()
        seen = set.union(*(client.result() for client in clients))
    assert len(seen) >= 3
    assert min(map(len, seconds.values())) > 10
    for name, during in (("during switches", True), ("between them", False)):
        p50, p99 = 1000 * np.quantile(seconds[during], [0.5, 0.99])
        print(f"{len(seconds[during])} requests {name}: p50 {p50:.0f} ms, p99 {p99:.0f} ms")


@pytest.mark.slow
def test_a_version_that_triton_cannot_load_is_not_promoted(live, probe, monkeypatch):
    """The file passes the check against its manifest but is not a model."""
    repository, server = live
    images, label, _ = probe
    promote(repository, 2, [server.url])
    file = repository.file("text", 3)
    whole = file.read_bytes()
    try:
        file.write_bytes(b"not a graph")
        monkeypatch.setattr(switch, "check_files", lambda *_: None)
        with pytest.raises(PromotionFailed, match="see the server's log"):
            promote(repository, 3, [server.url])
        assert repository.served == 2
        with ZeroShotClassifier(server.url) as classifier:
            assert next(classifier.classify(images, labels=[label])).version == 2
        with ZeroShotClassifier(server.url, version=3) as classifier, pytest.raises(VersionGone):
            next(classifier.classify(images, labels=[label]))
    finally:
        file.write_bytes(whole)


@pytest.mark.slow
def test_a_server_of_another_repository_is_refused(live, repository, monkeypatch):
    """It requires another key; even with the same key, its version of that number differs or is missing."""
    of_live, server = live
    with pytest.raises(ServerUnreachable, match="of this very repository"):
        promote(Repository(repository.path, "clip"), 4, [server.url], timeout_s=2)
    monkeypatch.setenv("CLIPWELD_ADMIN_KEY", admin_key(of_live.path))
    with pytest.raises(PromotionFailed, match=r"is .* what it serves|see the server's log"):
        promote(Repository(repository.path, "clip"), 4, [server.url], timeout_s=2)
    assert repository.served == 2


def test_model_control_requires_the_administrator_s_key(repository, monkeypatch):
    monkeypatch.setenv("CLIPWELD_ADMIN_KEY", "open sesame")
    with serve(repository.path) as server:
        with tritonclient.grpc.InferenceServerClient(server.url.removeprefix("grpc://")) as anyone:
            before = {m.name: m for m in anyone.get_inference_statistics().model_stats}
            assert before["clip_image"].execution_count == 2, "one batch of 1 and one of 8 warmed it up"
        for wrong in (None, "open barley"):
            monkeypatch.delenv("CLIPWELD_ADMIN_KEY") if wrong is None else monkeypatch.setenv(
                "CLIPWELD_ADMIN_KEY", wrong
            )
            for url in (server.url, server.http_url):
                with pytest.raises(ServerUnreachable, match="CLIPWELD_ADMIN_KEY"):
                    promote(repository, 3, [url])
        assert repository.served == 2
        with ZeroShotClassifier(server.url) as clip:
            assert clip.versions()
        monkeypatch.setenv("CLIPWELD_ADMIN_KEY", "open sesame")
        assert promote(repository, 3, [server.url]).version == 3
        assert rollback(repository, [server.http_url]).version == 2


@pytest.mark.parametrize("command", [["promote", "2"], ["rollback"], ["prune", "--keep", "3"], ["verify"]])
def test_a_missing_repository_is_reported_and_not_created(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["exporter", *command, "--repository", str(tmp_path / "typo")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "typo: no version of 'clip'; write one with: exporter merge" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("image", "visual.ln_post.weight"), ("text", "ln_final.weight")])
def test_a_version_that_answers_nan_is_not_promoted(repository, monkeypatch, kind, name):
    """The check of the files is skipped, as if only this machine computed NaN."""
    file = repository.file(kind, 3)
    model = onnx.load(file)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.raw_data = np.full(tensor.dims, np.nan, np.float32).tobytes()
    file.unlink()
    onnx.save(model, file)
    monkeypatch.setattr(switch, "check_files", lambda repository, version: None)
    with serve(repository.path) as server:
        with pytest.raises(PromotionFailed, match=rf"clip_{kind} version 3 at .* features of length nan, expected 1"):
            promote(repository, 3, [server.url])
        with ZeroShotClassifier(server.url) as classifier:
            assert classifier.card().version == 2
            assert classifier.text_features(["a cat"]).shape == (1, 192)
    assert repository.standing() == [1, 2]
