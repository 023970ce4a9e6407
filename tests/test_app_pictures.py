"""Pictures from strangers, as the page takes them: decoded to plain RGB, or refused with a reason."""

import random
import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from app_pictures import MAX_BYTES, MAX_SIDE, PictureRefusedError, decode_picture


def encoded(picture, kind, **options):
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def two_colours(mode="RGB"):
    picture = Image.new("RGB", (40, 20), (250, 10, 10))
    picture.paste((10, 10, 250), (0, 0, 20, 20))
    return picture.quantize(4) if mode == "P" else picture.convert(mode)


def see_through():
    picture = two_colours("RGBA")
    picture.paste((0, 0, 0, 0), (20, 0, 40, 20))
    return picture


def palette_with_a_hole():
    picture = two_colours("P")
    return encoded(picture, "PNG", transparency=picture.getpixel((30, 10)))


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: what is left of the file's picture is the top of what was seen
    return exif


def png(width, height, data, depth=1, colour=0):
    """Write a PNG file by hand, whatever its header claims."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def frames():
    return encoded(two_colours("P"), "GIF", save_all=True, append_images=[Image.new("P", (40, 20))] * 3)


SIXTEEN_BITS = Image.fromarray(np.repeat(np.array([[0, 128 * 257]], dtype=np.uint16), 20, axis=1).repeat(20, 0))


@pytest.mark.parametrize(
    ("data", "size", "left", "right"),
    [
        (encoded(two_colours(), "PNG"), (40, 20), (10, 10, 250), (250, 10, 10)),
        (encoded(two_colours(), "JPEG", quality=95), (40, 20), (10, 10, 250), (250, 10, 10)),
        (encoded(two_colours(), "WEBP", lossless=True), (40, 20), (10, 10, 250), (250, 10, 10)),
        (encoded(two_colours("CMYK"), "JPEG", quality=95), (40, 20), (10, 10, 250), (250, 10, 10)),
        (frames(), (40, 20), (10, 10, 250), (250, 10, 10)),
        (encoded(see_through(), "PNG"), (40, 20), (10, 10, 250), (255, 255, 255)),
        (encoded(see_through(), "WEBP", lossless=True), (40, 20), (10, 10, 250), (255, 255, 255)),
        (palette_with_a_hole(), (40, 20), (10, 10, 250), (255, 255, 255)),
        (encoded(two_colours("L"), "PNG"), (40, 20), (37, 37, 37), (82, 82, 82)),
        (encoded(SIXTEEN_BITS, "PNG"), (40, 20), (0, 0, 0), (128, 128, 128)),
        (encoded(Image.new("1", (1, 1), 1), "PNG"), (1, 1), (255, 255, 255), (255, 255, 255)),
        (encoded(Image.new("RGB", (4000, 1000)), "PNG"), (MAX_SIDE, MAX_SIDE // 4), (0, 0, 0), (0, 0, 0)),
    ],
    ids="png jpeg webp cmyk gif rgba webp-rgba palette grey sixteen-bits one-pixel large".split(),
)
def test_a_picture_is_decoded_to_plain_rgb(data, size, left, right):
    picture = decode_picture(data)
    assert (picture.mode, picture.size) == ("RGB", size)
    width, height = size
    for x, expected in ((width // 4, left), (width * 3 // 4, right)):
        assert np.abs(np.subtract(picture.getpixel((x, height // 2)), expected)).max() <= 12  # a palette's, a JPEG's


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_upright_and_loses_its_metadata(kind):
    picture = decode_picture(encoded(two_colours(), kind, exif=turned()))
    assert picture.size == (20, 40)
    assert picture.getpixel((10, 5))[2] > 200  # blue, which was left, is on top
    assert picture.getpixel((10, 35))[0] > 200
    assert not picture.getexif()
    assert not picture.info


HUNDRED_MEGAPIXELS = png(10_000, 10_000, zlib.compress(bytes(1251 * 10_000), 9))  # a real one, 1 bit a pixel: 12 kB
REFUSED = {
    "text": (b"this is no picture", "no PNG, JPEG, WebP or GIF"),
    "nothing": (b"", "no PNG, JPEG, WebP or GIF"),
    "svg": (b'<svg width="8" height="8"><script>alert(1)</script></svg>', "no PNG, JPEG, WebP or GIF"),
    "bmp": (encoded(two_colours(), "BMP"), "no PNG, JPEG, WebP or GIF"),
    "tiff": (encoded(two_colours(), "TIFF"), "no PNG, JPEG, WebP or GIF"),
    "eps": (encoded(two_colours(), "EPS"), "no PNG, JPEG, WebP or GIF"),
    "cut png": (encoded(Image.effect_noise((64, 64), 90), "PNG")[:-900], "broken"),
    "cut jpeg": (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:-900], "broken"),
    "header alone": (png(64, 64, b""), "broken"),
    "no pixels": (png(0, 64, zlib.compress(b"")), "broken|no pixels|no PNG"),
    "100 megapixels": (HUNDRED_MEGAPIXELS, "10000 x 10000, 100 million|more than 32 million"),
    "bomb": (png(60_000, 60_000, zlib.compress(bytes(10_000), 9)), "more than 32 million"),
    "endless line": (png(2**31 - 1, 1, zlib.compress(bytes(10_000), 9)), "more than 32 million"),
    "bytes": (encoded(two_colours(), "PNG") + bytes(MAX_BYTES), "16.0 MiB; at most 16 are taken"),
}


@pytest.mark.parametrize(("data", "why"), REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused_with_a_reason(data, why):
    with pytest.raises(PictureRefusedError, match=why):
        decode_picture(data)


@pytest.mark.parametrize("name", ["100 megapixels", "bomb", "endless line", "bytes"])
def test_what_is_too_large_is_refused_before_a_pixel_is_decoded(monkeypatch, name):
    def load(_):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(AssertionError, match="decoded"):  # the patch is in the way of decoding
        decode_picture(encoded(two_colours(), "PNG"))
    with pytest.raises(PictureRefusedError):
        decode_picture(REFUSED[name][0])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_damaged_files_are_decoded_or_refused_and_nothing_else(kind):
    rng, whole = random.Random(kind), encoded(Image.effect_noise((24, 24), 90).convert("RGB"), kind)
    num_refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 12)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            assert decode_picture(bytes(data[: rng.randint(len(data) // 2, len(data))])).mode == "RGB"
        except PictureRefusedError:
            num_refused += 1
    assert num_refused > 20
