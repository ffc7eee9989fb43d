"""Client and trainer read the same pixels in every format and mode: upright, and otherwise as open_clip."""

import io

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps

from clipweld.client._images import preprocess
from clipweld.client.errors import BadImage
from clipweld.trainer.errors import UnreadableImage
from clipweld.trainer.preprocessing import open_image, preprocessing
from clipweld.trainer.tasks import Images, sample
from evidence.trust.pictures import of_unknown_range, seeds

CONFIG = PreprocessCfg(size=48)
TRANSFORM = preprocessing(CONFIG)


def in_trainer(path):
    return Images([0], open=lambda _: open_image(path), name_of=lambda _: str(path)).pixels(0, TRANSFORM)


def in_client(path):
    return preprocess(path, str(path), size=48, resize_mode=CONFIG.resize_mode, interpolation=CONFIG.interpolation)


@pytest.fixture(scope="module")
def files():
    """Every format in every mode in which Pillow can write it; formats with Exif data are stored rotated."""
    return seeds(sample(60)[0])


def test_client_and_trainer_read_or_refuse_every_format_and_mode_alike(files, tmp_path):
    refused = []
    for number, (kind, data) in enumerate(files):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(data)
        opened = Image.open(io.BytesIO(data))
        if of_unknown_range(data):
            refused.append(kind)
            with pytest.raises(BadImage, match="of unknown range; save it with 8 or 16 bits"):
                in_client(path)
            with pytest.raises(UnreadableImage, match="of unknown range; save it with 8 or 16 bits"):
                in_trainer(path)
            continue
        ours, theirs = in_client(path), in_trainer(path)
        *spatial, to_tensor, normalize = image_transform_v2(CONFIG, is_train=False).transforms
        assert torch.equal(normalize(to_tensor(ours)), theirs), (kind, opened.mode)
        if not opened.mode.startswith("I"):  # open_clip reads 16-bit greyscale as white
            upright = ImageOps.exif_transpose(opened)
            for step in spatial:
                upright = step(upright)
            np.testing.assert_array_equal(ours, np.array(upright), err_msg=f"{kind} {opened.mode}")
    assert sorted(refused) == ["PPM", "TIFF", "TIFF", "TIFF"]


def test_client_and_trainer_read_sixteen_bit_greyscale_alike(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray((values >> 8).astype(np.uint8)).save(tmp_path / "eight.png")
    expected = in_trainer(tmp_path / "eight.png")
    for ending in ("png", "tif", "pgm"):
        Image.fromarray(values).save(tmp_path / f"sixteen.{ending}")
        assert torch.equal(in_trainer(tmp_path / f"sixteen.{ending}"), expected)
        np.testing.assert_array_equal(in_client(tmp_path / f"sixteen.{ending}"), in_client(tmp_path / "eight.png"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_client_and_trainer_read_photos_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / "photo.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "photo.jpg") as photo:
        ImageOps.exif_transpose(photo).save(tmp_path / "upright.png")
    np.testing.assert_array_equal(in_client(tmp_path / "photo.jpg"), in_client(tmp_path / "upright.png"))
    assert torch.equal(in_trainer(tmp_path / "photo.jpg"), in_trainer(tmp_path / "upright.png"))
