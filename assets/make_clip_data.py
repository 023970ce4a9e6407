"""Write assets/demo-clip-data: 32 classes of pictures, as an image folder a class, filled shapes and line drawings.

Run: python assets/make_clip_data.py            (a few seconds)

`lines` has train, dev and test; `filled`, the world that demo-clip was trained on, has the very scenes of the test
drawings. Every file is a pure function of the numbers below, so a second run writes the same bytes.
"""

import argparse
import random
from pathlib import Path

from world import COLORS, SHAPES, Scene, Thing, line_drawing, make_scene, render, scene_rng

PER_CLASS = {"train": 24, "dev": 8, "test": 20}
SPLITS = {"lines": ("train", "dev", "test"), "filled": ("test",)}


def scene_of(color: str, shape: str, rng: random.Random) -> Scene:
    """One object of that colour and shape; its size and place are those of an object of a random scene."""
    thing = rng.choice(make_scene(rng))
    return (Thing(thing.size, color, shape, thing.row, thing.column),)


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
