"""The shipped weights, tasks and licences agree with each other."""

import json
from collections import Counter

import pytest
import torch

from evidence.mini_recipe import measure, tasks, unseen

CATALOGUE = json.loads((measure.TASKS / "tasks.json").read_text(encoding="utf-8"))


def test_weights_load_strictly_and_give_unit_features():
    model = measure.load_model(measure.MINI / "mini.safetensors")
    with torch.inference_mode():
        features = model.encode_image(torch.zeros(2, 3, 64, 64), normalize=True)
    assert features.shape == (2, 192)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("name", CATALOGUE)
def test_each_zip_has_the_recorded_number_of_pictures_per_class(name):
    entry = CATALOGUE[name]
    for split in ("train", "test"):
        labelled = measure.task_images(measure.TASKS / f"{name}.zip", f"{split}/")
        times = Counter(label for label, _ in labelled)
        assert [times[label] for label in entry["class_names"]] == entry["counts"][split]
        assert {image.size for _, image in labelled} == {(64, 64)}


@pytest.mark.parametrize("name", CATALOGUE)
def test_licences_name_every_zip(name):
    assert f"`tasks/{name}.zip`" in (measure.MINI / "LICENSES.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["emoji", "clipart"])
def test_the_held_out_list_has_the_recorded_number_of_pictures_per_class(name):
    times = Counter((split, label) for split, label, _ in tasks.listed(name))
    entry = CATALOGUE[name]
    for split in ("train", "test"):
        assert [times[split, label] for label in entry["class_names"]] == entry["counts"][split]


@pytest.mark.parametrize("name", unseen.BUILDERS)
def test_no_picture_of_an_unseen_task_is_in_both_splits(name):
    entries = list(tasks.listed(name, unseen.LISTED))
    assert len({entry for _, _, entry in entries}) == len(entries)
    assert {(split, label) for split, label, _ in entries} == {
        (split, label) for split in ("train", "test") for label in CATALOGUE[name]["class_names"]
    }


def test_no_icon_set_is_in_both_splits():
    sets = {split: set() for split in ("train", "test")}
    for split, _, entry in tasks.listed("icons", unseen.LISTED):
        sets[split].add(entry.split("/")[0])
    assert not sets["train"] & sets["test"]


def test_unseen_tasks_are_large_enough_and_small_on_disk():
    for name in unseen.BUILDERS:
        counts = CATALOGUE[name]["counts"]
        assert sum(counts["test"]) >= 400
        assert min(counts["train"]) >= 20
    assert sum((measure.TASKS / f"{name}.zip").stat().st_size for name in CATALOGUE) < 20e6


def test_licences_name_every_package_of_the_recipe():
    from evidence.mini_recipe import sources

    text = (measure.MINI / "LICENSES.md").read_text(encoding="utf-8")
    pretraining = [*sources.EMOJI, sources.FLAGS, *sources.ICON_SETS, *sources.FONTS]
    packages = [one.package for one in (*pretraining, sources.SIGNS, *sources.TASK_ICON_SETS, *sources.WHEELS)]
    assert [package for package in packages if package.rsplit("/", 1)[-1] not in text] == []


def test_no_icon_set_of_a_task_is_used_for_pre_training():
    from evidence.mini_recipe import sources

    assert not {one.package for one in sources.TASK_ICON_SETS} & {one.package for one in sources.ICON_SETS}


def test_recipe_takes_only_permissive_licences():
    from evidence.mini_recipe import sources

    permissive = {"MIT", "ISC", "Apache-2.0", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "public domain"}
    pretraining = (*sources.EMOJI, sources.FLAGS, *sources.ICON_SETS)
    packages = (*pretraining, sources.SIGNS, *sources.TASK_ICON_SETS, *sources.WHEELS)
    assert {one.licence for one in packages} <= permissive
