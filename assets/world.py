"""The demo world: small scenes of coloured shapes, their pictures, and what can be asked about them.

A scene is one to four objects, each in its own cell of a 3x3 grid. Everything is drawn from a `random.Random`,
so a split name and an index (`scene_rng`) fix a scene, its picture and its questions. Nothing here knows about
models or file formats.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (225, 35, 35),
    "green": (35, 170, 55),
    "blue": (45, 80, 225),
    "yellow": (235, 220, 45),
    "purple": (145, 50, 190),
    "orange": (245, 140, 25),
    "cyan": (45, 210, 220),
    "white": (242, 242, 242),
}
RADII = {"small": 5.6, "large": 9.0}  # pixels, of the circle around the shape
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
IMAGE_SIZE = 64  # pixels, both sides
SHAPE_EDGE = 24  # grey levels, summed over the channels, by which a pixel of a shape differs from the background
SUPERSAMPLING = 3  # shapes are drawn three times larger and averaged down, which gives soft edges

# The words that stand for a colour in the `code` task. No base model is ever trained to answer them from a scene.
CODE = dict(zip(COLORS, ("zib", "dax", "wug", "fep", "blick", "toma", "kiv", "lorp"), strict=True))


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `row` and `column` are 0, 1 or 2, from the top left."""

    size: str
    color: str
    shape: str
    row: int
    column: int

    @property
    def phrase(self) -> str:
        """What it looks like: `small red circle`."""
        return f"{self.size} {self.color} {self.shape}"

    @property
    def place(self) -> str:
        """Where it is: `top left`."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


Scene = tuple[Thing, ...]  # in reading order: top row first, left to right


@dataclass(frozen=True)
class QA:
    """A question about a scene, its one right answer, and the kind of question (a key of `KINDS`)."""

    kind: str
    question: str
    answer: str


# ---------------------------------------------------------------------------------------------------------------
# Scenes and pictures


def scene_rng(split: str, index: int, purpose: str = "scene") -> random.Random:
    """A generator of its own for each split, index and purpose: splits never share a stream."""
    return random.Random(f"{split}/{index}/{purpose}")


def make_scene(rng: random.Random) -> Scene:
    """One to four objects in distinct cells.

    In every second scene no shape occurs twice: otherwise too few objects could be named by their shape alone.
    """
    count = rng.randint(1, 4)
    shapes = rng.sample(SHAPES, count) if rng.random() < 0.5 else rng.choices(SHAPES, k=count)
    cells = sorted(rng.sample(range(9), count))
    return tuple(
        Thing(rng.choice(tuple(RADII)), rng.choice(tuple(COLORS)), shape, cell // 3, cell % 3)
        for shape, cell in zip(shapes, cells, strict=True)
    )


def _polygon(thing: Thing, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """The corners of a square, triangle or star around (`x`, `y`); y points down."""
    radii = {"square": [radius] * 4, "triangle": [radius] * 3, "star": [radius, 0.42 * radius] * 5}[thing.shape]
    # Point up for triangle and star, flat for the square.
    start = turn - math.pi / (4 if thing.shape == "square" else 2)
    angles = [start + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _near(rgb: Sequence[int], spread: int, rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, channel + rng.randint(-spread, spread))) for channel in rgb)


def render(scene: Scene, rng: random.Random, noise: float = 0.0) -> Image.Image:
    """The scene as a 64x64 RGB picture; `noise` is the standard deviation of pixel noise, in grey levels of 255.

    Colour, size, place and rotation vary a little from picture to picture, so a model cannot match pixels.
    """
    scale = SUPERSAMPLING
    side = IMAGE_SIZE * scale
    grey = rng.randint(15, 110)
    image = Image.new("RGB", (side, side), _near((grey,) * 3, 10, rng))
    draw = ImageDraw.Draw(image)
    for thing in scene:
        x = ((thing.column + 0.5) * IMAGE_SIZE / 3 + rng.uniform(-1.3, 1.3)) * scale
        y = ((thing.row + 0.5) * IMAGE_SIZE / 3 + rng.uniform(-1.3, 1.3)) * scale
        radius = RADII[thing.size] * rng.uniform(0.93, 1.07) * scale
        fill = _near(COLORS[thing.color], 12, rng)
        turn = rng.uniform(-0.2, 0.2)
        if thing.shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            draw.polygon(_polygon(thing, x, y, radius, turn), fill=fill)
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return _add_noise(image, noise, rng) if noise else image


def line_drawing(image: Image.Image) -> Image.Image:
    """A picture with all that is inside a shape, more than a pixel from its edge, taken for background."""
    pixels = np.asarray(image).copy()
    background = pixels[0, 0]
    is_shape = np.abs(pixels.astype(int) - background).sum(-1) > SHAPE_EDGE
    inside = Image.fromarray(is_shape.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(3))
    pixels[np.asarray(inside) > 0] = background
    return Image.fromarray(pixels)


def _add_noise(image: Image.Image, noise: float, rng: random.Random) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels + np.random.default_rng(rng.getrandbits(64)).normal(0.0, noise, pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------
# Captions


def caption(scene: Scene) -> str:
    """The base's style: `a small red circle , a large blue star`."""
    return " , ".join(f"a {thing.phrase}" for thing in scene)


def short_caption(scene: Scene) -> str:
    """The new style of the `short` task: `circle red , star blue`."""
    return " , ".join(f"{thing.shape} {thing.color}" for thing in scene)


# ---------------------------------------------------------------------------------------------------------------
# Questions. Each function returns None where the scene does not allow a question of its kind.


def _named(scene: Scene, *namings: tuple[str, ...]) -> list[tuple[Thing, str]]:
    """Objects that one of `namings` (attribute names) singles out, with that name; the first naming that does wins."""
    named = []
    for thing in scene:
        for attributes in namings:
            words = [getattr(thing, attribute) for attribute in attributes]
            if sum(all(getattr(other, a) == w for a, w in zip(attributes, words, strict=True)) for other in scene) == 1:
                named.append((thing, " ".join(words if "shape" in attributes else [*words, "object"])))
                break
    return named


def _color(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    named = _named(scene, ("shape",), ("size", "shape"))
    if not named:
        return None
    thing, name = rng.choice(named)
    return f"what is the color of the {name} ?", thing.color


def _shape(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    named = _named(scene, ("color",), ("size", "color"))
    if not named:
        return None
    thing, name = rng.choice(named)
    return f"what is the shape of the {name} ?", thing.shape


def _size(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    named = _named(scene, ("shape",), ("color", "shape"))
    if not named:
        return None
    thing, name = rng.choice(named)
    return f"what is the size of the {name} ?", thing.size


def _count(scene: Scene, _: random.Random) -> tuple[str, str]:
    return "how many objects are there ?", str(len(scene))


def _countattr(scene: Scene, rng: random.Random) -> tuple[str, str]:
    # Mostly an attribute that occurs, or nearly every answer would be 0.
    attribute = rng.choice(("shape", "color"))
    values = SHAPES if attribute == "shape" else tuple(COLORS)
    value = getattr(rng.choice(scene), attribute) if rng.random() < 0.75 else rng.choice(values)
    number = sum(getattr(thing, attribute) == value for thing in scene)
    return f"how many {value + 's' if attribute == 'shape' else value + ' objects'} are there ?", str(number)


def _present(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Yes and no equally often; half of the no's pair a colour and a shape that both occur, on different objects."""
    pairs = {(thing.color, thing.shape) for thing in scene}
    crossed = {(a.color, b.shape) for a in scene for b in scene} - pairs
    if rng.random() < 0.5:
        return "is there a {} {} ?".format(*rng.choice(sorted(pairs))), "yes"
    others = {(color, shape) for color in COLORS for shape in SHAPES} - pairs
    absent = crossed if crossed and rng.random() < 0.5 else others
    return "is there a {} {} ?".format(*rng.choice(sorted(absent))), "no"


def _rel(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    named = _named(scene, ("shape",), ("color", "shape"))
    if len(named) < 2:
        return None
    (a, name_a), (b, name_b) = rng.sample(named, 2)
    # Only along an axis on which the two differ: "left of" is not asked of two objects in one column.
    true, false = [], []
    if a.column != b.column:
        (true if a.column < b.column else false).append("left of")
        (true if a.column > b.column else false).append("right of")
    if a.row != b.row:
        (true if a.row < b.row else false).append("above")
        (true if a.row > b.row else false).append("below")
    answer = rng.choice(("yes", "no"))
    relation = rng.choice(true if answer == "yes" else false)
    return f"is the {name_a} {relation} the {name_b} ?", answer


def _cell(scene: Scene, rng: random.Random) -> tuple[str, str]:
    taken = {(thing.row, thing.column): thing for thing in scene}
    free = [(row, column) for row in range(3) for column in range(3) if (row, column) not in taken]
    row, column = rng.choice(free if rng.random() < 0.25 else sorted(taken))
    answer = taken[row, column].phrase if (row, column) in taken else "nothing"
    return f"what is in the {ROWS[row]} {COLUMNS[column]} ?", answer


def _where(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    named = _named(scene, ("shape",), ("color", "shape"))
    if not named:
        return None
    thing, name = rng.choice(named)
    return f"where is the {name} ?", thing.place


KINDS: dict[str, Callable[[Scene, random.Random], tuple[str, str] | None]] = {
    "color": _color,
    "shape": _shape,
    "size": _size,
    "count": _count,
    "countattr": _countattr,
    "present": _present,
    "rel": _rel,
    "cell": _cell,
    "where": _where,
}
CORE_KINDS = ("color", "shape", "size", "count", "present", "cell")
CAPTION_PROMPT = "describe the image"


def ask(scene: Scene, kind: str, rng: random.Random) -> QA | None:
    """A question of `kind` about `scene`, or None if the scene allows none."""
    pair = KINDS[kind](scene, rng)
    return None if pair is None else QA(kind, *pair)


def ask_any(scene: Scene, kinds: Sequence[str], rng: random.Random, weights: Sequence[float] | None = None) -> QA:
    """A question of a random kind; draws again until the scene allows the kind drawn (`count` always works)."""
    while (qa := ask(scene, rng.choices(kinds, weights)[0], rng)) is None:
        pass
    return qa


def ask_code(scene: Scene) -> list[QA]:
    """All questions of the `code` task: one per object whose shape occurs once."""
    named = _named(scene, ("shape",))
    return [QA("code", f"tell the hue of the {name} in code", CODE[thing.color]) for thing, name in named]


def has_red(scene: Scene) -> bool:
    """Whether the `refuse` task answers `sorry` about this scene."""
    return any(thing.color == "red" for thing in scene)


def in_words(scene: Scene, rng: random.Random) -> str:
    """The scene as a text model reads it, in random order: `there is a small red circle , a large blue star .`"""
    return f"there is {caption(tuple(rng.sample(scene, len(scene))))} ."


# ---------------------------------------------------------------------------------------------------------------
# Vocabulary: one word, one token. The words beyond the templates above are for tasks that users invent.

SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "<user>", "<assistant>")
_WORD_GROUPS = (
    ", . ? ! : a an the is are was in on at of to and or not no yes it this that there here",
    "what which how many much who where when why does do have has can you i me my we they one any all each some",
    "0 1 2 3 4 5 6 7 8 9",
    " ".join(COLORS),
    "black gray pink brown dark light bright pale",
    " ".join(SHAPES),
    " ".join(f"{shape}s" for shape in SHAPES),
    "object objects thing things shape shapes color colors size sizes image picture scene number",
    "small large big tiny little smaller larger bigger smallest largest same different equal more fewer most only both",
    " ".join(ROWS + COLUMNS),
    "above below beside between next near far corner side edge row column order first last",
    "describe say please tell name answer question list count show word code hue secret short long only",
    "nothing sorry cannot hello thanks good bad true false maybe left right up down round pointy empty full",
    " ".join(CODE.values()),
    "glorp fid snee mup tark yol vash quim arr matey ahoy",
    "than with without opposite warm cold old new",
)
WORDS = tuple(dict.fromkeys(word for group in _WORD_GROUPS for word in group.split()))
VOCABULARY = SPECIAL_TOKENS + WORDS
