import io
import os
import sys
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import Compose

from clipweld.client._images import INTERPOLATIONS, RESIZE_MODES, Reading, as_images, name_of, preprocess
from clipweld.client.errors import BadImage

SIZE = 32
# What Python says of a path with a NUL.
NUL_IN_A_PATH = "stat: embedded null character in path" if sys.version_info >= (3, 13) else "embedded null byte"
MODES = (
    "RGB",
    "L",
    "LA",
    "P",
    "RGBA",
    "CMYK",
    "1",
    "YCbCr",
    "HSV",
    "LAB",
    "PA",
    "La",
    "RGBX",
    "RGBa",
)
SIZES = ((1, 1), (1, 9), (33, 32), (32, 32), (31, 33), (63, 64), (97, 101), (200, 3), (2, 331), (640, 480))


def random_image(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    width, height = size
    if mode == "1":
        return Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)).convert("1")
    if mode in ("LA", "La", "PA"):
        pixels = rng.integers(0, 256, (height, width, 2), dtype=np.uint8)
        return Image.frombytes(mode, size, pixels.tobytes())
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
        return image
    if mode == "RGBa":
        return random_image("RGBA", size, seed).convert(mode)
    if mode == "LAB":
        return Image.frombytes("LAB", size, image.tobytes())
    return image.convert(mode)


def open_clip_transform(size: int, resize_mode: str, interpolation: str) -> Compose:
    return open_clip.image_transform(size, is_train=False, resize_mode=resize_mode, interpolation=interpolation)


def ours(image, size=SIZE, resize_mode="shortest", interpolation="bicubic", **more):
    return preprocess(image, "it", size=size, resize_mode=resize_mode, interpolation=interpolation, **more)


def assert_equals_open_clip(image, size, resize_mode, interpolation):
    transform = open_clip_transform(size, resize_mode, interpolation)
    *spatial, to_tensor, normalize = transform.transforms
    try:
        expected = np.array(Compose(spatial)(image))
    except ValueError:  # a mode that Pillow cannot resize: refused by both
        with pytest.raises(BadImage, match=r"^it cannot be decoded"):
            ours(image, size, resize_mode, interpolation)
        return
    got = ours(image, size, resize_mode, interpolation)
    assert got.dtype == np.uint8
    assert got.shape == (size, size, 3)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(normalize(to_tensor(got)).numpy(), transform(image).numpy())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_pixels_equal_open_clip(mode, resize_mode, interpolation):
    for size in SIZES:
        assert_equals_open_clip(random_image(mode, size), SIZE, resize_mode, interpolation)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(("RGB", "L", "RGBA", "P")),
    st.integers(1, 120),
    st.integers(1, 120),
    st.integers(1, 65),
    st.sampled_from(RESIZE_MODES),
    st.sampled_from(sorted(INTERPOLATIONS)),
)
def test_pixels_equal_open_clip_for_any_size(mode, width, height, size, resize_mode, interpolation):
    assert_equals_open_clip(random_image(mode, (width, height)), size, resize_mode, interpolation)


def test_palette_with_transparency_equals_open_clip():
    image = random_image("P", (50, 40))
    image.info["transparency"] = 3
    assert_equals_open_clip(image, SIZE, "shortest", "bicubic")


def turned(image: Image.Image, orientation: int) -> tuple[Image.Image, bytes]:
    """Return the image as a camera held in that orientation stores it, and the Exif data that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    return (image.transpose(stored[orientation]) if orientation in stored else image), exif.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("ending", "settings"), [("png", {}), ("tif", {}), ("webp", {"lossless": True})])
def test_exif_orientation_is_applied_to_every_kind_of_input(tmp_path, orientation, ending, settings):
    upright = random_image("RGB", (60, 40))
    stored, exif = turned(upright, orientation)
    path = tmp_path / f"turned.{ending}"
    stored.save(path, exif=exif, **settings)
    with Image.open(path) as opened:
        for image in (path, path.read_bytes(), io.BytesIO(path.read_bytes()), opened):
            np.testing.assert_array_equal(ours(image), ours(upright))


def test_exif_orientation_can_be_switched_off_as_in_open_clip(tmp_path):
    stored, exif = turned(random_image("RGB", (60, 40)), 6)
    path = tmp_path / "turned.jpg"
    stored.save(path, exif=exif)
    expected = Compose(open_clip_transform(SIZE, "shortest", "bicubic").transforms[:-2])(Image.open(path))
    np.testing.assert_array_equal(ours(path, reading=Reading(exif_orientation=False)), np.array(expected))
    assert not np.array_equal(ours(path), np.array(expected))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\x08", b"Exif\0\0MM\0*" + b"\xff" * 40])
def test_an_image_with_damaged_exif_is_read(tmp_path, exif):
    path = tmp_path / "odd.png"
    random_image("RGB", (60, 40)).save(path, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(ours(path), ours(random_image("RGB", (60, 40))))


def ramp() -> np.ndarray:
    """Return every 16-bit value once, as uint16 (256, 256)."""
    return np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bit_greyscale_keeps_its_high_bytes(tmp_path, ending):
    path = tmp_path / f"ramp.{ending}"
    Image.fromarray(ramp()).save(path)
    expected = ours((ramp() >> 8).astype(np.uint8))
    assert len(np.unique(expected)) > 20
    for image in (path, path.read_bytes(), ramp(), ramp().astype(">u2"), Image.fromarray(ramp()), Image.open(path)):
        np.testing.assert_array_equal(ours(image), expected)


@pytest.mark.parametrize(("bits", "white"), [(12, "is high"), (16, "is high"), (16, "is zero")])
def test_scanner_tiffs_are_read_neither_too_dark_nor_inverted(tmp_path, bits, white):
    """Pillow writes neither packed 12-bit values nor 16-bit values with white as zero: the file is edited."""
    grey = np.tile(np.linspace(0, 255, 64).astype(np.uint16), (64, 1))
    values = (grey if white == "is high" else 255 - grey) << (bits - 8)
    even, odd = values[:, ::2], values[:, 1::2]
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], -1).astype(np.uint8).tobytes()
    path = tmp_path / "scan.tif"
    Image.fromarray(values).save(path)
    data = bytearray(path.read_bytes())
    entries = int.from_bytes(data[4:8], "little") + 2
    changes = {258: bits, 262: int(white == "is high"), **({279: len(packed)} if bits == 12 else {})}
    for place in range(entries, entries + 12 * int.from_bytes(data[entries - 2 : entries], "little"), 12):
        tag = int.from_bytes(data[place : place + 2], "little")
        if tag in changes:
            data[place + 8 : place + 12] = changes[tag].to_bytes(4, "little")
        if tag == 273 and bits == 12:
            start = int.from_bytes(data[place + 8 : place + 12], "little")
            data[start : start + len(packed)] = packed
    np.testing.assert_array_equal(ours(bytes(data)), ours(grey.astype(np.uint8)))


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit or signed integers"), (np.float32, "floats")])
def test_greyscale_of_unknown_range_is_refused_with_advice(tmp_path, dtype, kind):
    path = tmp_path / "depth.tif"
    Image.fromarray(np.ones((9, 9), dtype)).save(path)
    message = rf"grey values that are {kind}, of unknown range; save it with 8 or 16 bits, unsigned, or give a uint8"
    for image in (path, Image.open(path)):
        with pytest.raises(BadImage, match=message):
            ours(image)


def test_cmyk_and_ycck_jpegs_are_not_read_inverted():
    """A red square as a CMYK and as a YCCK JPEG; Adobe's programs store both inverted."""
    file = io.BytesIO()
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(file, "JPEG", quality=100)
    assert (np.abs(ours(file).astype(int) - (255, 0, 0)) < 6).all()
    # YCCK stores cyan, magenta and yellow in place of red, green and blue.
    y, cb, cr = Image.new("RGB", (1, 1), (0, 255, 255)).convert("YCbCr").getpixel((0, 0))
    file = io.BytesIO()  # Pillow inverts too, and sets byte 11 of Adobe's marker to "CMYK"
    Image.new("CMYK", (32, 32), (255 - y, 255 - cb, 255 - cr, 0)).save(file, "JPEG", quality=100)
    data = bytearray(file.getvalue())
    place = data.index(b"Adobe")
    assert data[place + 11] == 0
    data[place + 11] = 2
    assert (np.abs(ours(bytes(data)).astype(int) - (255, 0, 0)) < 6).all()


@pytest.mark.parametrize("size", [(1, 1), (20_000, 30), (30, 20_000)])
@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
def test_extreme_sizes_equal_open_clip(size, resize_mode):
    assert_equals_open_clip(random_image("RGB", size), SIZE, resize_mode, "bicubic")


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_the_first_frame_of_an_animation_is_used_as_in_open_clip(tmp_path, ending):
    path = tmp_path / f"moving.{ending}"
    first, second = random_image("RGB", (50, 40)), Image.new("RGB", (50, 40), "red")
    first.save(
        path,
        save_all=True,
        append_images=[second, Image.new("RGB", (50, 40), "blue")],
        **({"lossless": True} if ending == "webp" else {}),
    )
    with Image.open(path) as image:
        assert image.n_frames == 3
        expected = Compose(open_clip_transform(SIZE, "shortest", "bicubic").transforms[:-2])(image)
    np.testing.assert_array_equal(ours(path), np.array(expected))


def test_every_kind_of_image_gives_the_same_pixels(tmp_path):
    image = random_image("RGB", (50, 40))
    path = tmp_path / "image.png"
    image.save(path)
    kinds = (path, str(path), path.read_bytes(), image, np.asarray(image), np.asarray(image)[:, ::-1][:, ::-1])
    for kind in kinds:
        np.testing.assert_array_equal(ours(kind), ours(image))


def test_grey_array_equals_grey_image():
    image = random_image("L", (50, 40))
    np.testing.assert_array_equal(ours(np.asarray(image)), ours(image))


def test_one_image_and_several_images_are_both_iterated():
    array = np.zeros((4, 5, 3), np.uint8)
    image = Image.fromarray(array)
    for one in ("a.png", Path("a.png"), b"bytes", image, array, array[..., 0]):
        assert next(as_images(one)) is one
    assert len(list(as_images(np.stack([array, array])))) == 2
    assert list(as_images(name for name in ("a", "b"))) == ["a", "b"]
    assert list(as_images([])) == []
    with pytest.raises(BadImage, match="images is a int; expected a path"):
        as_images(3)


def test_a_folder_yields_its_image_files_in_order(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a.webp", "c/notes.txt", ".hidden/3.png", "c/.thumb.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    left_out = []
    found = [str(path.relative_to(tmp_path)) for path in as_images(tmp_path, left_out.append)]
    assert found == ["a.webp", "b/1.png", "b/2.JPG"]
    assert list(as_images(str(tmp_path), left_out.append)) == list(as_images(tmp_path, left_out.append))
    with pytest.raises(BadImage, match=r"c has no images; expected files such as \.jpg"):
        next(as_images(tmp_path / "c"))


def test_an_image_is_named_by_its_path_or_its_position():
    assert name_of(Path("a/b.png"), 3) == "a/b.png"
    assert name_of(b"", 3) == "image 3 (bytes)"
    assert name_of(Image.new("RGB", (1, 1)), 0) == "image 0 (PIL image)"
    assert name_of(np.zeros(1), 2) == "image 2 (ndarray)"


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "it (0 bytes) is no image; expected AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP"),
        (b"GIF89a", "it (6 bytes) is no image; expected AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP"),
        (png(random_image("RGB", (50, 40)))[:-300], "it cannot be decoded"),
        ("missing.png", "it cannot be read: No such file or directory"),
        ("nul\0.png", f"it cannot be read: {NUL_IN_A_PATH}"),
        (
            np.full((4, 4, 3), 255.0, np.float32),
            "it is float32 of shape (4, 4, 3) with values from 255 to 255; expected",
        ),
        (
            np.full((4, 4, 3), np.nan),
            "it is float64 of shape (4, 4, 3) with values from nan to nan; expected floats in",
        ),
        (np.zeros((4, 4, 3), np.int64), "it is int64 of shape (4, 4, 3); expected (height, width[, channels]) or"),
        (np.zeros((4, 4, 3), complex), "it is complex128 of shape (4, 4, 3); expected"),
        (
            np.zeros((4, 4, 4), np.uint8),
            "it is uint8 of shape (4, 4, 4), whose channels may be first or last; expected",
        ),
        (
            np.zeros((4, 9, 4), np.uint8),
            "it is uint8 of shape (4, 9, 4), whose channels may be first or last; expected",
        ),
        (np.zeros((9, 28, 28), np.uint8), "it is uint8 of shape (9, 28, 28); expected"),
        (np.zeros((2, 3, 9, 9), np.uint8), "it is uint8 of shape (2, 3, 9, 9); expected"),
        (np.zeros((0, 4, 3), np.uint8), "it is uint8 of shape (0, 4, 3); expected (height, width[, channels])"),
        (np.zeros(4, np.uint8), "it is uint8 of shape (4,); expected"),
        ("", "it is an empty text; name an image file"),
        ("s3://bucket/a.png", "it is a URL of scheme 's3'; expected a path"),
        (io.StringIO("text"), "it is open as text; expected a file opened with 'rb', or its bytes"),
        (Image.new("RGB", (0, 4)), "it is empty: 0 x 4 pixels"),
        (Image.new("L", (1, 1_000_000)), "it is too large: 1 x 1000000 pixels, resized 32 x 32000000"),
        (None, "it: expected a path"),
    ],
)
def test_a_bad_image_is_refused_with_its_name_and_the_reason(image, message):
    with pytest.raises(BadImage) as caught:
        ours(image)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_directory_is_refused_by_name(tmp_path):
    with pytest.raises(BadImage, match="is a directory; name the image files in it"):
        preprocess(tmp_path, str(tmp_path), size=SIZE, resize_mode="shortest", interpolation="bicubic")


@pytest.mark.parametrize("side", [12, 20])  # Pillow warns above its limit, and raises above twice the limit
@pytest.mark.parametrize("warnings_are", ["error", "ignore"])
def test_decompression_bomb_is_a_bad_image(monkeypatch, side, warnings_are):
    data = png(random_image("RGB", (side, side)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter(warnings_are, Image.DecompressionBombWarning)
        with pytest.raises(BadImage, match=r"^it (is too large|cannot be decoded)"):
            ours(data, size=4)


def test_a_file_with_too_many_bytes_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "long.png"
    path.write_bytes(png(random_image("RGB", (10, 10))) + bytes(1000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match=r"^it is too large: [\d,]+ bytes, expected at most 800"):
        ours(path)


def test_pipes_and_devices_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "zero.jpg"):
        with pytest.raises(BadImage, match=r"^it is not a regular file"):
            ours(tmp_path / name)


def test_a_postscript_program_is_refused_as_an_image(tmp_path):
    path = tmp_path / "program.jpg"
    random_image("RGB", (10, 10)).save(path, "EPS")
    with pytest.raises(BadImage, match=r"is no image; expected AVIF, "):
        ours(path)


def progressive(scans: int) -> bytes:
    """Return a JPEG that repeats its last scan until it has so many scans."""
    file = io.BytesIO()
    random_image("RGB", (50, 40)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rfind(b"\xff\xda")
    return data[:last] + data[last:-2] * (scans - data[:last].count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_with_too_many_scans_is_refused():
    with pytest.raises(BadImage, match="it has more than 100 scans; save it anew"):
        ours(progressive(101))
    ours(progressive(100))


def test_scan_markers_in_comments_and_after_the_end_are_not_counted():
    data = progressive(10)
    comment = b"\xff\xfe\x02\x02" + b"\xff\xda" * 256
    np.testing.assert_array_equal(ours(data[:2] + comment + data[2:] + b"\xff\xda" * 200), ours(data))


def array(dtype="uint8", channels=3):
    """Return pixels (40, 50, channels) whose high bytes are the same for every dtype."""
    values = np.random.default_rng(5).integers(0, 256, (40, 50, channels), dtype=np.uint8)
    return {
        "uint8": lambda: values,
        "uint16": lambda: values.astype(np.uint16) << 8 | 77,
        "bool": lambda: values > 127,
        **{f"float{bits}": lambda bits=bits: (values / 255).astype(f"float{bits}") for bits in (16, 32, 64)},
    }[dtype]()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64", "bool"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("first", [False, True])
def test_arrays_may_have_their_channels_first_or_last(dtype, channels, first):
    given = array(dtype, channels)
    meant = (array("bool", channels) * 255).astype(np.uint8) if dtype == "bool" else array("uint8", channels)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    expected = ours(Image.frombytes(mode, (50, 40), meant.tobytes()))
    np.testing.assert_array_equal(ours(given.transpose(2, 0, 1) if first else given), expected)


def test_an_ambiguous_array_is_read_with_its_channels_last():
    values = np.random.default_rng(1).integers(0, 256, (3, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(ours(values), ours(Image.fromarray(values)))


def test_values_slightly_outside_the_range_are_taken_as_rounding():
    values = np.array([[0.0, 1.0], [1 + 1e-7, -1e-7]], np.float32)
    np.testing.assert_array_equal(ours(values), ours(np.array([[0, 255], [255, 0]], np.uint8)))
    with pytest.raises(
        BadImage, match=r"with values from 0 to 1\.2; expected floats in \[0, 1\]: divide by what white is"
    ):
        ours(np.array([[0.0, 1.2]]))


def test_tensors_are_read_as_arrays_or_refused_with_the_next_step():
    import torch

    values = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(ours(values), ours(values.numpy()))
    np.testing.assert_array_equal(ours((values * 255).to(torch.uint8)), ours((values * 255).to(torch.uint8).numpy()))
    batch = torch.stack([values, values / 2])
    assert [ours(image).mean() for image in as_images(batch)] == [ours(values).mean(), ours(values / 2).mean()]
    with pytest.raises(BadImage, match=r"^it is a Tensor that needs gradients; give detach\(\) of it"):
        ours(values.clone().requires_grad_())
    with pytest.raises(BadImage, match=r"^it is a Tensor that is on device 'meta'; give cpu\(\) of it"):
        ours(values.to("meta"))
    with pytest.raises(BadImage, match=r"^it is a Tensor that is no array \(.*; expected \(height"):
        ours(values.to(torch.bfloat16))
    with pytest.raises(BadImage, match=r"with values from -\d\S* to \d\S*; .* undo normalization by mean and std"):
        ours((values - 0.5) / 0.25)


@pytest.mark.parametrize("kind", [bytearray, memoryview, io.BytesIO, lambda data: io.BufferedReader(io.BytesIO(data))])
def test_encoded_images_may_come_in_any_bytes_like_object_or_stream(kind):
    data = png(random_image("RGB", (50, 40)))
    np.testing.assert_array_equal(ours(kind(data)), ours(data))


def test_an_open_file_is_read_once_from_its_start_and_named_by_its_path(tmp_path):
    path = tmp_path / "open.png"
    random_image("RGB", (50, 40)).save(path)
    with path.open("rb") as file:
        file.seek(9)
        (stream,) = as_images(file)
        assert name_of(stream, 0) == str(path)
        np.testing.assert_array_equal(ours(stream), ours(path))
    np.testing.assert_array_equal(ours(stream), ours(path))
    (closed,) = as_images([file])
    with pytest.raises(BadImage, match=r"^it cannot be read: .*closed file"):
        ours(closed)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(path, "in.png")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive, archive.open("in.png") as file:
        np.testing.assert_array_equal(ours(file), ours(path))


def test_a_stream_that_cannot_seek_can_be_used_twice():
    data = png(random_image("RGB", (50, 40)))
    read, write = os.pipe()
    threading.Thread(target=lambda: (os.write(write, data), os.close(write))).start()
    with open(read, "rb") as file:
        (stream,) = as_images(file)
        for _ in range(2):
            np.testing.assert_array_equal(ours(stream), ours(data))


def test_a_file_object_with_asynchronous_read_is_refused():
    class Upload:
        async def read(self, size=-1):
            return b""

    with pytest.raises(BadImage, match=r"^it gives coroutine; expected a file opened with 'rb', or its bytes"):
        ours(Upload())


def test_several_images_may_come_in_any_container():
    paths = ["a.png", "b.png"]
    for several in (tuple(paths), np.array(paths), np.array(paths, object), np.array(paths, "S"), iter(paths)):
        assert list(as_images(several)) == paths
    assert list(as_images(np.array("a.png"))) == ["a.png"]
    assert [image.shape for image in as_images(np.zeros((5, 3, 8, 9), np.float32))] == [(3, 8, 9)] * 5
    for wrong in ({"a.png": 1}, np.zeros((1, 2, 3, 4, 5)), np.array([paths])):
        with pytest.raises(BadImage, match=r"^images is an? (dict|array of .*); expected"):
            as_images(wrong)


class Table:
    """A column of paths, as in pandas."""

    def __array__(self, dtype=None, copy=None):
        return np.array(["a.png", "b.png"], object)


def test_a_column_of_paths_yields_several_images():
    assert list(as_images(Table())) == ["a.png", "b.png"]


def test_any_path_like_object_names_an_image(tmp_path):
    random_image("RGB", (50, 40)).save(tmp_path / "a.png")
    (entry,) = os.scandir(tmp_path)
    assert name_of(entry, 0) == str(tmp_path / "a.png")
    np.testing.assert_array_equal(ours(entry), ours(tmp_path / "a.png"))
    (entry,) = os.scandir(os.fsencode(tmp_path))
    np.testing.assert_array_equal(ours(entry), ours(tmp_path / "a.png"))
