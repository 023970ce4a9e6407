"""Write assets/demo-clip-data: 32 classes of pictures, as an image folder a class, filled shapes and line drawings.

Run: python assets/make_clip_data.py            (a few seconds)

`lines` has train, dev and test; `filled`, the world that demo-clip was trained on, has the very scenes of the test
drawings. Every file is a pure function of the numbers below, so a second run writes the same bytes.
"""

import argparse
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from world import COLORS, SHAPES, Scene, Thing, make_scene, render, scene_rng

PER_CLASS = {"train": 24, "dev": 8, "test": 20}
SPLITS = {"lines": ("train", "dev", "test"), "filled": ("test",)}
SHAPE_EDGE = 24  # grey levels, summed over the channels, by which a pixel of a shape differs from the background


def scene_of(color: str, shape: str, rng: random.Random) -> Scene:
    """One object of that colour and shape; its size and place are those of an object of a random scene."""
    thing = rng.choice(make_scene(rng))
    return (Thing(thing.size, color, shape, thing.row, thing.column),)


def line_drawing(image: Image.Image) -> Image.Image:
    """The picture with all that is inside a shape, more than a pixel from its edge, taken for background."""
    pixels = np.asarray(image).copy()
    background = pixels[0, 0]
    is_shape = np.abs(pixels.astype(int) - background).sum(-1) > SHAPE_EDGE
    inside = Image.fromarray(is_shape.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(3))
    pixels[np.asarray(inside) > 0] = background
    return Image.fromarray(pixels)


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo-clip-data", help="folder to write")
    out = parser.parse_args().out
    for domain, splits in SPLITS.items():
        for split in splits:
            for color in COLORS:
                for shape in SHAPES:
                    folder = out / domain / split / f"{color}_{shape}"
                    folder.mkdir(parents=True, exist_ok=True)
                    for index in range(PER_CLASS[split]):
                        rng = scene_rng(f"clip-classes-{split}", index, f"{color} {shape}")
                        image = render(scene_of(color, shape, rng), rng)
                        image = line_drawing(image) if domain == "lines" else image
                        image.save(folder / f"{index:02}.png", optimize=True)


if __name__ == "__main__":
    main()
