"""Unusual file systems: without hard links, read-only, overlays, owned by another user, full."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest

from clipweld.exporter import disk
from clipweld.exporter.cli import main
from clipweld.exporter.errors import RepositoryError
from clipweld.exporter.release.publish import release
from clipweld.exporter.serving.admin import admin_key, new_admin_key
from clipweld.exporter.serving.switch import promote, rollback
from clipweld.exporter.store.manifest import check_files
from clipweld.exporter.store.repository import KINDS, Repository
from clipweld.trainer.errors import OutputError
from clipweld.trainer.files import replacing

NO_LINKS = [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES, errno.ENOSYS, errno.EINVAL]


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", NO_LINKS, ids=errno.errorcode.get)
def test_files_are_copied_where_they_cannot_be_linked(repository, monkeypatch, number):
    promote(repository, 1, [])
    monkeypatch.setattr(os, "link", failing(number))
    assert promote(repository, 2, []).standing == [1, 2]
    for kind in KINDS:
        standing = repository.model(kind) / "2/model.onnx"
        assert not standing.samefile(repository.file(kind, 2))
        assert standing.read_bytes() == repository.file(kind, 2).read_bytes()
    check_files(repository, 2)
    assert rollback(repository, []).version == 1
    assert sorted(os.listdir(repository.path.parent)) == ["model_repository", "model_repository.store"]


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_a_first_merge_needs_no_hard_links(tmp_path, mini, make_adapter, samples, monkeypatch):
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    repository = Repository(tmp_path / "model_repository", "clip")
    assert release(mini, [make_adapter("digits")], repository, *samples).served == 2
    assert repository.standing() == [1, 2]


def test_a_server_s_key_needs_no_hard_links(repository, monkeypatch):
    monkeypatch.delenv("CLIPWELD_ADMIN_KEY", raising=False)
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    key = new_admin_key(repository.path)
    assert admin_key(repository.path) == new_admin_key(repository.path) == key


STEPS = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EACCES: "have its owner allow it",
    errno.EPERM: "have its owner allow it", errno.EROFS: "mounted read-only", errno.ENAMETOOLONG: "shorten the name",
    errno.EIO: "the disk failed", errno.EMFILE: "ulimit -n", errno.ENXIO: "mount its file system again",
    errno.ENOTEMPTY: "something else has the name", errno.ETIMEDOUT: "find out why",
}  # fmt: skip


@pytest.mark.parametrize("number", STEPS, ids=errno.errorcode.get)
def test_an_error_names_its_cause_and_suggests_making_room_only_on_a_full_disk(tmp_path, number):
    place = tmp_path / "place"
    for context, kind in ((disk.changing, RepositoryError), (replacing, OutputError)):
        with pytest.raises(kind) as caught, context(place):
            failing(number)()
        text = str(caught.value)
        assert text.startswith(f"{place}: can't be written ({os.strerror(number)}")
        assert STEPS[number] in text
        assert ("make room" in text) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_an_error_names_the_path_that_caused_it(tmp_path):
    with pytest.raises(RepositoryError, match="no-such-folder/x"), disk.changing(tmp_path):
        (tmp_path / "no-such-folder/x").touch()


def test_a_file_system_without_locks_is_reported(repository, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with pytest.raises(RepositoryError, match=r"can't lock it \(No locks available\)"):
        promote(repository, 1, [])
    assert repository.standing() == [1, 2]


def test_a_completed_switch_is_reported_with_a_warning_if_cleaning_up_fails(repository, monkeypatch, capsys):
    """In a switch back to version 1, 1 is served as soon as the card of 2 is removed, even if its towers remain."""
    take_out = Repository.take_out

    def failing_for_towers(self, version, staging, kinds=KINDS):
        if "image" in kinds:
            raise RepositoryError(f"{self.model('image')}: can't be written (Input/output error)")
        take_out(self, version, staging, kinds)

    monkeypatch.setattr(Repository, "take_out", failing_for_towers)
    monkeypatch.setattr(Repository, "_clean", lambda _: None)
    monkeypatch.delenv("CLIPWELD_URL", raising=False)
    monkeypatch.setattr(sys, "argv", ["exporter", "promote", "1", "--json", "--repository", str(repository.path)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    switched = json.loads(out)
    assert (ended.value.code or 0, switched["version"], repository.served) == (0, 1, 1)
    assert "version 2 could not be taken out" in switched["warnings"][0]
    assert err.startswith("exporter: warning: version 2 could not be taken out")


def test_a_switch_that_fails_is_undone(repository, monkeypatch):
    """If the card of 2 can't be removed in a switch back to 1, 2 is still served and reported as served."""

    def fail(self, version, staging, kinds=KINDS):
        raise RepositoryError("can't be written (Input/output error)")

    monkeypatch.setattr(Repository, "take_out", fail)
    with pytest.raises(RepositoryError, match="Input/output error"):
        promote(repository, 1, [])
    assert (repository.standing(), repository.history()) == ([1, 2], [1, 2])


def test_a_failure_to_clean_up_after_a_switch_is_only_logged(repository, monkeypatch, caplog):
    clean, calls = Repository._clean, []

    def failing_at_the_end(self):
        calls.append(self)
        if len(calls) > 1:
            raise RepositoryError("can't be written (Input/output error)")
        clean(self)

    monkeypatch.setattr(Repository, "_clean", failing_at_the_end)
    assert promote(repository, 1, []).version == 1
    assert [record.message for record in caplog.records] == [
        "not cleaned up yet: can't be written (Input/output error)"
    ]


ACTIONS = """
import sys
from pathlib import Path
from clipweld.exporter.store.repository import Repository
from clipweld.exporter.serving.switch import promote, prune, rollback
from clipweld.exporter.store.manifest import check_files
repository = Repository(Path(sys.argv[1]), "clip")
print(promote(repository, 1, []).standing, promote(repository, 2, []).standing, rollback(repository, []).standing)
print(promote(repository, 2, []).standing, prune(repository, 1).kept)
check_files(repository, 2)
"""


def mounted(script, *arguments):
    """Run a shell script as root in its own mount namespace; return the finished process."""
    command = ["unshare", "--mount", "sh", "-euc", script, "sh", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mounts for this user: {done.stderr.strip()}")
    return done


@pytest.fixture
def actions(tmp_path):
    """A Python script that switches versions back and forth."""
    file = tmp_path / "actions.py"
    file.write_text(ACTIONS)
    return file


def test_a_repository_in_the_lower_layer_of_an_overlay_can_be_switched(repository, tmp_path, actions):
    """Folders of the lower layer can't be renamed; a container's image is such a layer."""
    done = mounted(
        """
        mkdir "$1/layers"; mount -t tmpfs none "$1/layers"; cd "$1/layers"; mkdir lower upper work merged
        cp -a "$1"/model_repository* lower
        mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
        exec "$2" "$3" merged/model_repository
        """,
        tmp_path, sys.executable, actions,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "[1] [1, 2] [1]\n[1, 2] [1, 2]\n"), done.stderr


def test_versions_are_copied_from_a_store_on_another_file_system(repository, tmp_path, actions):
    done = mounted(
        """
        cp -a "$1/model_repository.store" "$1/kept"; mount -t tmpfs none "$1/model_repository.store"
        cp -a "$1/kept/clip" "$1/model_repository.store"
        exec "$2" "$3" "$1/model_repository"
        """,
        tmp_path, sys.executable, actions,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "[1] [1, 2] [1]\n[1, 2] [1, 2]\n"), done.stderr


def test_a_version_is_moved_into_a_store_on_another_file_system(tmp_path):
    shm = "/dev/shm"
    if not os.path.isdir(shm) or os.stat(shm).st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    (tmp_path / "version/image").mkdir(parents=True)
    (tmp_path / "version/image/model.onnx").write_bytes(b"weights")
    store = disk.new_staging(disk.Path(shm), "clipweld-test-")
    try:
        disk.move_into(tmp_path / "version", store / "1")
        assert (store / "1/image/model.onnx").read_bytes() == b"weights"
        assert sorted(os.listdir(store)) == [disk.MARK, "1"]
        assert not (tmp_path / "version").exists()
    finally:
        shutil.rmtree(store)


def test_a_read_only_repository_can_be_listed_and_changes_are_refused(repository, tmp_path):
    done = mounted(
        """
        mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; export CLIPWELD_URL=
        for command in "promote 1" "rollback" "prune --keep 1" "versions"; do
            "$2" -m clipweld.exporter $command --repository "$1/model_repository" 2>&1 || echo "status $?"
        done
        """,
        tmp_path, sys.executable,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[1::2][:2] == ["status 1", "status 1"], done.stdout
    assert all("Read-only file system" in line and "mounted read-only" in line for line in lines[0:4:2])
    assert "make room" not in done.stdout
    assert "served" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to be another user")
def test_missing_write_permission_is_reported(repository, tmp_path):
    """The user may read the repository but not write it."""
    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents:
        if parent != parent.parent and not parent.stat().st_mode & 0o001:
            pytest.skip(f"{parent} can't be entered by others")
    probe = subprocess.run(
        [sys.executable, "-c", "import os, clipweld.exporter.serving.switch"],
        user=65534,
        group=65534,
        capture_output=True,
    )
    if probe.returncode:
        pytest.skip("this Python can't be run by others")
    done = subprocess.run(
        [sys.executable, "-m", "clipweld.exporter", "promote", "1", "--repository", str(repository.path)],
        user=65534, group=65534, capture_output=True, text=True, env=os.environ | {"CLIPWELD_URL": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert "have its owner allow it" in done.stderr
    assert "make room" not in done.stderr
