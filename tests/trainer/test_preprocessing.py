import os
import warnings

import pytest
from PIL import Image

from clipweld.client import _image_files
from clipweld.trainer.errors import UnreadableImage
from clipweld.trainer.preprocessing import FORMATS, open_image
from clipweld.trainer.tasks import Images


def pixels(path, mini):
    return Images([0], open=lambda index: open_image(path), name_of=lambda index: str(path)).pixels(0, mini.preprocess)


def test_client_and_trainer_accept_the_same_formats():
    assert _image_files.FORMATS == FORMATS


def test_pipes_and_devices_are_refused_without_waiting(tmp_path, mini):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "zero.jpg"):
        with pytest.raises(UnreadableImage, match=rf"{name} can't be read \(it is not a regular file\)"):
            pixels(tmp_path / name, mini)


def test_a_postscript_program_is_refused_as_an_image(tmp_path, mini):
    Image.new("RGB", (10, 10)).save(tmp_path / "program.jpg", "EPS")
    with pytest.raises(UnreadableImage, match="it is none of the formats"):
        pixels(tmp_path / "program.jpg", mini)


@pytest.mark.parametrize("size", [(12, 12), (20, 20)])  # Pillow warns above its limit, and raises above twice the limit
@pytest.mark.parametrize("warnings_are", ["error", "ignore"])
def test_an_image_with_more_pixels_than_the_limit_is_refused(tmp_path, mini, monkeypatch, size, warnings_are):
    Image.new("RGB", size).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter(warnings_are, Image.DecompressionBombWarning)
        with pytest.raises(UnreadableImage, match=r"large\.png can't be read \(.*pixels"):
            pixels(tmp_path / "large.png", mini)


def test_an_image_that_would_exceed_the_limit_after_resizing_is_refused(tmp_path, mini):
    Image.new("L", (1, 60_000)).save(tmp_path / "long.png")
    with pytest.raises(UnreadableImage, match=r"1 x 60000 pixels are more than 89,478,485 with a shortest side of 64"):
        pixels(tmp_path / "long.png", mini)


def test_a_jpeg_with_too_many_scans_is_refused(tmp_path, mini):
    path = tmp_path / "scans.jpg"
    Image.new("RGB", (50, 40)).save(path, progressive=True)
    data = path.read_bytes()
    last = data.rfind(b"\xff\xda")
    path.write_bytes(data[:last] + data[last:-2] * 101 + data[-2:])
    with pytest.raises(UnreadableImage, match=r"scans\.jpg can't be read \(it has more than 100 scans\)"):
        pixels(path, mini)
