"""Pictures from strangers: bytes to an RGB picture, or a sentence that says why not.

What a file is, is told by its content; its name is never looked at. The header is read first, and a picture that is too
large is refused before a pixel of it is decoded.
"""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_BYTES = 16 * 2**20
MAX_PIXELS = 32_000_000
MAX_SIDE = 1536  # pixels; what is larger is made smaller, as a visitor's picture is kept in memory

# What PIL's decoders raise on files that are broken, cut short or made to hurt.
_BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, ZeroDivisionError),
    *(NotImplementedError, struct.error, zlib.error),
)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # a warning only where warnings are errors


class PictureRefusedError(ValueError):
    """A file that is no picture this page takes; the message is for the visitor."""


def decode_picture(data: bytes) -> Image.Image:
    """Return the (first) picture in a PNG, JPEG, WebP or GIF file: RGB, upright, at most `MAX_SIDE` pixels a side.

    What is see-through is put on white. Nothing but pixels is kept of the file. Raises PictureRefusedError for more
    than `MAX_BYTES` or `MAX_PIXELS`, for another format, and for a file that is broken.
    """
    if len(data) > MAX_BYTES:
        raise PictureRefusedError(f"The file has {len(data) / 2**20:.1f} MiB; at most {MAX_BYTES // 2**20} are taken.")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as file:
            _check_size(*file.size)
            file.load()
            return _upright_rgb(file)
    except PictureRefusedError:
        raise
    except Image.UnidentifiedImageError as error:
        raise PictureRefusedError("This is no PNG, JPEG, WebP or GIF picture, whatever its name says.") from error
    except _BOMBS as error:
        raise PictureRefusedError(f"The picture has far more than {MAX_PIXELS / 1e6:.0f} million pixels.") from error
    except _BROKEN as error:
        raise PictureRefusedError("The picture is broken or cut short: it cannot be decoded.") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise PictureRefusedError(
            f"The picture is {width} x {height}, {width * height / 1e6:.0f} million pixels; at most "
            f"{MAX_PIXELS / 1e6:.0f} million are taken."
        )
    if min(width, height) < 1:
        raise PictureRefusedError("The picture has no pixels.")


def _upright_rgb(picture: Image.Image) -> Image.Image:
    orientation = picture.getexif().get(0x0112, 1)
    if picture.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip instead of scale
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        see_through = picture.convert("RGBA")
        picture = Image.new("RGBA", picture.size, "white")
        picture.alpha_composite(see_through)
    picture = picture.convert("RGB")
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    picture.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(picture)
    return Image.fromarray(np.asarray(upright))  # pixels alone: no metadata goes on
