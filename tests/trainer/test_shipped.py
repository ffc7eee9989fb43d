"""The shipped weights, tasks and licences agree with each other."""

import json
from collections import Counter

import pytest
import torch

from evidence.mini_recipe import measure, tasks

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


def test_licences_name_every_package_of_the_recipe():
    from evidence.mini_recipe import sources

    text = (measure.MINI / "LICENSES.md").read_text(encoding="utf-8")
    packages = [one.package for one in (*sources.EMOJI, sources.FLAGS, *sources.ICON_SETS, *sources.FONTS)]
    assert [package for package in packages if package.rsplit("/", 1)[-1] not in text] == []


def test_recipe_takes_only_permissive_licences():
    from evidence.mini_recipe import sources

    permissive = {"MIT", "Apache-2.0", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "public domain"}
    assert {one.licence for one in (*sources.EMOJI, sources.FLAGS, *sources.ICON_SETS)} <= permissive
