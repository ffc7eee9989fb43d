"""Tiny versions of all eleven data sets, in torchvision's layout on disk."""

import json
import pickle
import re
import shutil
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets

from clipweld.trainer.errors import TaskDataMissing
from clipweld.trainer.tasks import load_task, mtil
from clipweld.trainer.tasks.flowers import FLOWERS


def paint(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 20, 3), value, dtype=np.uint8)).save(path)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def aircraft(folder):
    write(folder / "data/variants.txt", "707-320", "A310")
    for split in ("trainval", "test"):
        write(folder / f"data/images_variant_{split}.txt", f"{split}0 707-320", f"{split}1 A310")
        for number in range(2):
            paint(folder / f"data/images/{split}{number}.jpg", 100 * number)


def caltech101(folder):
    for value, name in enumerate(("BACKGROUND_Google", "Faces", "yin_yang")):
        for number in range(1, 4):
            paint(folder / f"101_ObjectCategories/{name}/image_{number:04d}.jpg", 50 * value)


def cifar100(folder):
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        pixels = np.repeat([[0], [100]], 3072, axis=1).astype(np.uint8)
        (folder / split).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [0, 1]}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "aquarium_fish"]}))


def dtd(folder):
    for split in ("train", "test"):
        write(folder / f"dtd/labels/{split}1.txt", f"banded/{split}0.jpg", f"woven/{split}1.jpg")
        paint(folder / f"dtd/images/banded/{split}0.jpg", 0)
        paint(folder / f"dtd/images/woven/{split}1.jpg", 100)


def eurosat(folder):
    for value, name in enumerate(
        ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
         "Residential", "River", "SeaLake")
    ):  # fmt: skip
        for number in range(1, 4):
            paint(folder / f"2750/{name}/{name}_{number}.jpg", 20 * value)


def flowers(folder):
    for number in range(1, 5):
        paint(folder / f"jpg/image_{number:05d}.jpg", 100 * ((number - 1) % 2))
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": [[1, 2, 1, 2]]})
    scipy.io.savemat(folder / "setid.mat", {"trnid": [[1, 2]], "valid": [[1, 2]], "tstid": [[3, 4]]})


def food(folder):
    for split in ("train", "test"):
        (folder / "meta").mkdir(parents=True, exist_ok=True)
        names = {"apple_pie": ["apple_pie/" + split], "waffles": ["waffles/" + split]}
        (folder / f"meta/{split}.json").write_text(json.dumps(names))
        for value, name in enumerate(names):
            paint(folder / f"images/{name}/{split}.jpg", 100 * value)


def mnist(folder):
    (folder / "raw").mkdir(parents=True)
    for split in ("train", "t10k"):
        pixels = bytes(28 * 28) + bytes([100] * 28 * 28)
        header = (2051).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (2, 28, 28))
        (folder / f"raw/{split}-images-idx3-ubyte").write_bytes(header + pixels)
        labels = b"".join(n.to_bytes(4, "big") for n in (2049, 2)) + bytes([0, 1])
        (folder / f"raw/{split}-labels-idx1-ubyte").write_bytes(labels)


def oxford_pet(folder):
    for split in ("trainval", "test"):
        write(folder / f"annotations/{split}.txt", f"Abyssinian_{split} 1 1 1", f"great_pyrenees_{split} 2 2 1")
        paint(folder / f"images/Abyssinian_{split}.jpg", 0)
        paint(folder / f"images/great_pyrenees_{split}.jpg", 100)


def stanford_cars(folder):
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    scipy.io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    for split, annotations in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.array([("00001.jpg", 1), ("00002.jpg", 2)], dtype=[("fname", object), ("class", object)])
        scipy.io.savemat(folder / annotations, {"annotations": rows})
        for number in range(2):
            paint(folder / f"cars_{split}/0000{number + 1}.jpg", 100 * number)


def sun397(folder):
    write(folder / "ClassName.txt", "/a/abbey", "/a/apartment_building/outdoor")
    for number in range(3):
        paint(folder / f"a/abbey/sun_{number}.jpg", 0)
        paint(folder / f"a/apartment_building/outdoor/sun_{number}.jpg", 100)


WRITERS = {
    "aircraft": aircraft, "caltech101": caltech101, "cifar100": cifar100, "dtd": dtd, "eurosat": eurosat,
    "flowers": flowers, "food": food, "mnist": mnist, "oxford-pet": oxford_pet, "stanford-cars": stanford_cars,
    "sun397": sun397,
}  # fmt: skip
CLASSES = {
    "aircraft": ("707-320", "A310"),
    "caltech101": ("off-center face", "yin and yang symbol"),
    "cifar100": ("apple", "aquarium fish"),
    "dtd": ("banded", "woven"),
    "eurosat": mtil.EUROSAT,
    "flowers": FLOWERS,
    "food": ("apple pie", "waffles"),
    "mnist": tuple("0123456789"),
    "oxford-pet": ("Abyssinian", "Great Pyrenees"),
    "stanford-cars": ("AM General Hummer SUV 2000", "Acura RL Sedan 2012"),
    "sun397": ("abbey", "apartment building outdoor"),
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A function that writes a tiny data set; torchvision's checksums are reduced to checking that files exist."""
    for module in (datasets.cifar, datasets.flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: shutil.os.path.isfile(path))

    def put(name):
        WRITERS[name](tmp_path / mtil.SOURCES[name].folder)
        return tmp_path

    return put


@pytest.mark.parametrize("name", mtil.names())
def test_each_data_set_is_read_with_names_labels_and_splits(name, data):
    task = load_task(name, data(name))
    assert task.class_names == CLASSES[name]
    for split in ("train", "test"):
        images = task.load(split)
        assert set(images.labels) == set(range(10 if name == "eurosat" else 2))
        step = {"eurosat": 20, "caltech101": 50}.get(name, 100)
        first = 50 if name == "caltech101" else 0  # its background category is not a class
        for image, label in images:
            assert abs(int(np.asarray(image).mean()) - first - step * label) <= 3, images.name_of(0)
    assert all(template.count("{}") == 1 for template in task.templates)


@pytest.mark.parametrize("name", mtil.names())
def test_label_files_may_have_windows_encoding_and_line_endings(name, data):
    root = data(name)
    for file in root.rglob("*"):
        if file.suffix in (".txt", ".json"):
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    task = load_task(name, root)
    assert task.class_names == CLASSES[name]
    assert len(list(task.load("train"))) > 0
    assert not any("open" in vars(module) for module in (datasets.dtd, datasets.sun397)), (
        "torchvision is left as it was"
    )


@pytest.mark.parametrize("name", mtil.names())
def test_a_missing_file_is_reported_with_the_next_step(name, data):
    root = data(name)
    source = mtil.SOURCES[name]
    lost = root / source.folder / source.needs[0]
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises(TaskDataMissing) as caught:
        load_task(name, root)
    assert f"task {name!r}: no {source.needs[0]} in {root / source.folder}; " in str(caught.value)
    assert ("copy the data set there" if source.dead else "--download") in str(caught.value)


@pytest.mark.parametrize("name", [name for name, source in mtil.SOURCES.items() if not source.dead])
def test_without_a_network_the_error_says_what_to_download_and_where_to_put_it(name, tmp_path, monkeypatch):
    def offline(*_arguments, **_settings):
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for download in (False, True):
        with pytest.raises(TaskDataMissing) as caught:
            load_task(name, tmp_path, download=download)
        said = str(caught.value)
        assert ("Name or service not known" in said) == download
        assert re.search(rf"https?://\S+[^;]* in {tmp_path}", said), said
        assert "\n" not in said


@pytest.mark.parametrize("name", ["stanford-cars", "sun397"])
def test_dead_downloads_are_refused_and_the_needed_files_named(name, tmp_path):
    with pytest.raises(TaskDataMissing) as caught:
        load_task(name, tmp_path, download=True)
    assert all(path in str(caught.value) for path in mtil.SOURCES[name].needs)


@pytest.mark.parametrize("name", ["aircraft", "dtd", "flowers", "food", "oxford-pet", "stanford-cars"])
def test_a_missing_image_is_reported(name, data):
    root = data(name)
    lost = next(iter((root / mtil.SOURCES[name].folder).rglob("*.jpg")))
    lost.unlink()
    with pytest.raises(TaskDataMissing, match=f"1 of its images are missing, such as .*{lost.name}"):
        load_task(name, root)


def test_an_unreadable_data_set_is_reported(data):
    root = data("food")
    (root / "food-101/meta/train.json").write_text("{")
    with pytest.raises(TaskDataMissing, match="food-101 can't be read"):
        load_task("food", root)


def test_the_split_of_sun397_does_not_depend_on_the_order_of_files(data, monkeypatch):
    root = data("sun397")
    straight = load_task("sun397", root).load("test")
    listed = sorted((root / "SUN397").rglob("sun_*.jpg"), reverse=True)
    monkeypatch.setattr(datasets.sun397.Path, "rglob", lambda self, pattern: listed)
    turned = load_task("sun397", root).load("test")
    assert straight.labels == turned.labels
    assert [straight.name_of(i) for i in range(len(straight))] == [turned.name_of(i) for i in range(len(turned))]
