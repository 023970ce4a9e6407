"""`steer`: interventions whose vectors are found in the frozen model's own states, without training.

Shape suffixes: B = rows, K = most tokens read of a row, N = pairs or tokens, D = hidden width.

A second adapter, there for the time of reading only, takes the states of two sets of rows down at the places that the
config edits, or at other positions. What is kept of them does not grow with the rows: sums in float64, and for
principal components the differences until there are D of them, then one D x D matrix. Each way to make a direction of
that is one function and one row of `WAYS`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any, Literal

import torch
from PIL import ImageStat
from torch import Tensor, nn

from vlreft.acting import Read
from vlreft.attaching import attach
from vlreft.config import Intervention, ReftConfig
from vlreft.data.collator import Collator
from vlreft.data.samples import open_image
from vlreft.interventions import VTI, Vector
from vlreft.positions import parse_positions
from vlreft.reft import Reft
from vlreft.reuse.rows import to_device

METHODS = ("vector", "vti")  # the interventions whose numbers are one vector
Rows = Sequence[Mapping[str, Any]]


# What is kept of the states -------------------------------------------------------------------------------------------


@dataclass
class Mean:
    """A mean over vectors that come a few at a time."""

    count: int = 0
    total_D: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x_ND: Tensor) -> None:
        """Take more."""
        self.count += len(x_ND)
        self.total_D = self.total_D.to(x_ND) + x_ND.sum(0)

    @property
    def value(self) -> Tensor:
        """The mean of all."""
        return self.total_D / self.count


@dataclass
class Spread(Mean):
    """A mean, and what the principal component needs: the vectors while they are fewer than D, then a D x D matrix."""

    kept: list[Tensor] = field(default_factory=list)
    scatter_DD: Tensor | None = None

    def add(self, x_ND: Tensor) -> None:
        """Take more."""
        super().add(x_ND)
        self.kept.append(x_ND)
        if sum(map(len, self.kept)) >= x_ND.shape[1]:
            kept_ND = torch.cat(self.kept)
            self.kept = []
            self.scatter_DD = kept_ND.T @ kept_ND + (0.0 if self.scatter_DD is None else self.scatter_DD)

    def component(self, *, centred: bool) -> Tensor:
        """Return the first principal component, about the mean or about zero: unit, on the mean's side; 0 if none."""
        mean_D = self.value
        shift_D = mean_D if centred else torch.zeros_like(mean_D)
        if self.scatter_DD is None:
            _, length_N, right_ND = torch.linalg.svd(torch.cat(self.kept) - shift_D, full_matrices=False)
            first_D, is_there = right_ND[0], length_N[0] > 0
        else:
            kept_ND = torch.cat(self.kept) if self.kept else mean_D.new_zeros(0, len(mean_D))
            scatter_DD = self.scatter_DD + kept_ND.T @ kept_ND - self.count * torch.outer(shift_D, shift_D)
            square_D, vectors_DD = torch.linalg.eigh(scatter_DD)
            first_D, is_there = vectors_DD[:, -1], square_D[-1] > 0
        return torch.where(first_D @ mean_D < 0, -first_D, first_D) * is_there


@dataclass
class Tally:
    """All that is kept of one place: of the positive states, the negative ones, and their differences pair by pair."""

    positive: Mean = field(default_factory=Mean)
    negative: Mean = field(default_factory=Mean)
    differences: Spread = field(default_factory=Spread)


# The ways -------------------------------------------------------------------------------------------------------------


def mean(tally: Tally) -> Tensor:
    """Return the mean of the positive states, every token counting once."""
    return tally.positive.value


def mean_difference(tally: Tally) -> Tensor:
    """Return the mean of the positive states minus that of the negative ones, every token counting once."""
    return tally.positive.value - tally.negative.value


def principal(tally: Tally) -> Tensor:
    """Return the mean difference's share along the first principal component of the differences about zero.

    About zero, because about their mean they have lost what they have in common. RepE (arXiv 2310.01405) and repeng
    centre, RepE after turning every second difference round, which comes to the same in expectation.
    """
    component_D = tally.differences.component(centred=False)
    return component_D * (component_D @ tally.differences.value)


def vti(tally: Tally) -> Tensor:
    """Return the first principal component of the differences about their mean, plus that mean, at unit length.

    Source: visual and textual intervention, arXiv 2410.15778, and its code (shengliu66/VTI, `utils.py`). Differs: a
    component for each layer, where the code takes one of all layers together; signed by the mean, where the code's
    sign is the decomposition's.
    """
    return _unit(tally.differences.component(centred=True) + tally.differences.value)


@dataclass(frozen=True)
class Way:
    """A way to find a direction. `pairs`: what has to match, row by row, of the two sets, each row's tokens too."""

    find: Callable[[Tally], Tensor]
    has_negative: bool = True
    pairs: Literal["", "rows", "tokens"] = ""
    num_least: int = 1


WAYS: dict[str, Way] = {
    "mean": Way(mean, has_negative=False),
    "mean_difference": Way(mean_difference),
    "pairs": Way(mean_difference, pairs="tokens"),
    "pca": Way(principal, pairs="rows"),
    "vti": Way(vti, pairs="rows", num_least=2),
}


# The call -------------------------------------------------------------------------------------------------------------


def steer(
    model: nn.Module,
    config: ReftConfig | Intervention | Sequence[Intervention],
    collator: Collator | Callable[[Rows], Mapping[str, Any]],
    *,
    positive: Rows,
    negative: Rows | None = None,
    how: str = "mean_difference",
    read: str | Sequence[str | None] | None = None,
    read_component: str | None = None,
    batch_size: int = 8,
    name: str = "default",
) -> Reft:
    """Attach interventions of method "vector" or "vti" that lead from the states of some rows to those of others.

    collator: a `vlreft.Collator`, for rows as it takes them (by their prompts; with their answers where `read` says
        `response`); or any function from rows to a batch of model inputs. Rows are anything with a length and an index.
    how: a row of `WAYS`. "mean_difference": mean of positive minus mean of negative, as many of each as there are.
        "pairs": the same, with as many rows of both and as many tokens in each two: activation addition's contrastive
        pairs (arXiv 2308.10248), one or a few; positions such as "[0:1]+[1:2]" give each place a vector of its own.
        "pca": the mean difference along the principal component of the paired differences. "vti": that component about
        the mean, plus the mean. "mean": of positive alone, without negative.
    read: at which positions states are read; by default where the interventions act. One string, or one for each
        intervention. Required for interventions at `response`: generated tokens are not there to be read. A read of one
        part serves all parts of an intervention.
    read_component: of what of the block, by default of what is edited. VTI's code reads the "output" and edits the
        "mlp".

    The vectors are in units of the states, those of method "vti" of length 1; `reft.scaled(...)` turns them up and
    down, and the config's `scale`. They are parameters: saved, loaded and trained on like any. The model runs in
    evaluation mode, a batch of each set at a time; other adapters on it act. Raises ValueError, after which nothing
    stays attached: another method, no rows, sets that are no pairs where pairs are needed, rows without a token to
    read, states that are not finite, or that do not differ.
    """
    config = config if isinstance(config, ReftConfig) else ReftConfig(config)
    way = _check(config, how, positive, negative, batch_size)
    with ExitStack() as undo:
        reft = attach(model, config, name)
        undo.callback(reft.detach)
        readings = _readings(reft, read, read_component)
        distinct = list(dict.fromkeys(readings))  # interventions that read the same get the same direction
        with reft.disabled():
            reader = attach(model, ReftConfig(distinct), f"{name}-reader")
            undo.callback(reader.detach)
            make = _batches(collator, distinct)
            tallies = _collect(reader, make, (positive, () if negative is None else negative), way, batch_size)
        directions = iter([_direction(way, place, tally) for place, tally in tallies])
        found = {item: list(islice(directions, num)) for item, num in zip(distinct, _num_edits(reader), strict=True)}
        vectors = []
        for item, reading, num_edits in zip(config.interventions, readings, _num_edits(reft), strict=True):
            read_D = [_unit(found_D) if item.method == "vti" else found_D for found_D in found[reading]]
            copies = num_edits // len(read_D)  # a read of one part serves all parts of its place
            vectors += [direction_D for direction_D in read_D for _ in range(copies)]
        set_directions(reft, vectors)
        reader.detach()
        undo.pop_all()
    return reft


@torch.no_grad()
def set_directions(reft: Reft, directions: Sequence[Tensor]) -> None:
    """Set the vectors of an adapter of "vector" and "vti" interventions, in place: a tensor_D for each of its edits.

    In the order of `reft.edits`. Raises ValueError for another number or width, for another method, and for numbers
    that are not finite; then nothing was set.
    """
    _check_methods(reft.config)
    edits = dict(reft.edits.items())
    if len(directions) != len(edits):
        raise ValueError(f"{len(directions)} directions were given for {len(edits)} vectors, {list(edits)}")
    for (key, edit), direction_D in zip(edits.items(), directions, strict=True):
        assert isinstance(edit, Vector | VTI)
        if direction_D.shape != edit.vector.shape:
            raise ValueError(
                f"the direction for '{key}' has shape {tuple(direction_D.shape)} and the states there have width "
                f"{len(edit.vector)}; give one of that width"
            )
        if not bool(torch.isfinite(direction_D).all()):
            raise ValueError(f"the direction for '{key}' has numbers that are not finite")
    for edit, direction_D in zip(edits.values(), directions, strict=True):
        assert isinstance(edit, Vector | VTI)
        edit.vector.copy_(direction_D)


class Masked(Sequence[Mapping[str, Any]]):
    """Rows, `num` copies of each, with all but a few patches of its picture painted over with the picture's mean.

    VTI's positive rows for the tower; the negative ones are the same with share=0. A copy is made when it is asked for,
    and is always the same. share: of the patches that are painted over. side: patches per side of the picture, as the
    tower has them. Differs: the code averages the copies' states before the component is taken, here each is a pair.
    Raises ValueError for a share outside [0, 1], counts below 1, and rows without an `image`.
    """

    def __init__(self, rows: Rows, *, side: int, share: float = 0.99, num: int = 50, seed: int = 0) -> None:
        if not 0.0 <= share <= 1.0 or side < 1 or num < 1:
            raise ValueError(f"`share` (={share}) must be from 0 to 1, `side` (={side}) and `num` (={num}) at least 1")
        self.rows, self.side, self.share, self.num, self.seed = rows, side, share, num, seed

    def __len__(self) -> int:
        """Copies in all."""
        return len(self.rows) * self.num

    def __getitem__(self, index: Any) -> Any:
        """Return one copy, those of a row one after the other."""
        if not 0 <= index < len(self):
            raise IndexError(f"copy {index} of {len(self)}")
        row = self.rows[index // self.num]
        if row.get("image") is None:
            raise ValueError(f"row {index // self.num} has no `image` to mask; leave such rows out")
        picture = open_image(row["image"], f"row {index // self.num}").copy()
        places = random.Random(f"{self.seed}/{index}").sample(range(self.side**2), int(self.share * self.side**2))
        color = tuple(round(channel) for channel in ImageStat.Stat(picture).mean)
        for place in places:
            (top, bottom), (left, right) = (
                (number * size // self.side, (number + 1) * size // self.side)
                for number, size in zip(divmod(place, self.side), (picture.height, picture.width), strict=True)
            )
            picture.paste(color, (left, top, right, bottom))
        return {**row, "image": picture}


# Checks ---------------------------------------------------------------------------------------------------------------


def _check(config: ReftConfig, how: str, positive: Rows, negative: Rows | None, batch_size: int) -> Way:
    _check_methods(config)
    if how not in WAYS:
        raise ValueError(f"`how` (={how!r}) must be one of {', '.join(map(repr, WAYS))}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` (={batch_size}) must be at least 1")
    way = WAYS[how]
    if way.has_negative and negative is None:
        raise ValueError(f"how='{how}' leads away from something: give `negative` rows too, or how='mean'")
    if not way.has_negative and negative is not None:
        raise ValueError(f"how='{how}' is of the positive rows alone: leave `negative` out, or how='mean_difference'")
    sides = {"positive": positive} | ({"negative": negative} if negative is not None else {})
    for side, rows in sides.items():
        if isinstance(rows, Mapping | str):
            raise ValueError(f"`{side}` must be a list of rows, got one {type(rows).__name__}")
        if len(rows) < way.num_least:
            raise ValueError(f"`{side}` has {len(rows)} rows; how='{how}' needs at least {way.num_least}")
    if way.pairs and negative is not None and len(positive) != len(negative):
        raise ValueError(
            f"how='{how}' takes pairs, and there are {len(positive)} positive and {len(negative)} negative rows; give "
            "as many of both, each two a pair, or how='mean_difference'"
        )
    return way


def _check_methods(config: ReftConfig) -> None:
    for number, item in enumerate(config.interventions):
        if item.method not in METHODS:
            raise ValueError(
                f"intervention {number} has method '{item.method}', whose numbers are no direction; use 'vector' or "
                "'vti', or train it"
            )


def _readings(reft: Reft, read: str | Sequence[str | None] | None, component: str | None) -> list[Intervention]:
    """Return, for each intervention of a config, one that selects what is read for it, at the same layers."""
    items = reft.config.interventions
    reads = [read] * len(items) if read is None or isinstance(read, str) else list(read)
    if len(reads) != len(items):
        raise ValueError(f"`read` has {len(reads)} entries for {len(items)} interventions; give one for all, or each")
    readings = []
    for number, (item, text) in enumerate(zip(items, reads, strict=True)):
        if text is None and item.parsed_positions.segment == "response":
            raise ValueError(
                f"intervention {number} acts at '{item.positions}', on tokens that are yet to be generated: say where "
                "to read its direction, e.g. read='prompt:l1', or read='response' for the answers of the rows"
            )
        positions = item.parsed_positions if text is None else parse_positions(text)
        num_own, num_read = len(item.parts), len(positions.selects)
        if num_own > 1 and num_read not in (1, num_own):
            raise ValueError(
                f"`read` '{positions.text}' has {num_read} parts and the '{item.positions}' of intervention {number} "
                f"{num_own}, each with a vector of its own; give one for all, or as many"
            )
        if component is not None and item.heads is not None:
            raise ValueError(f"intervention {number} edits heads: they have no `read_component` (='{component}')")
        prefix = f"{number}:"
        layers = [int(key.split(":")[2]) for key in reft.edits.keys() if key.startswith(prefix)]
        readings.append(
            Intervention(
                "vector",
                site=item.site,
                layers=list(dict.fromkeys(layers)),
                component=component or item.component,
                heads=item.heads,
                positions=positions.text,
                tied=num_own == 1,
            )
        )
    return readings


def _num_edits(reft: Reft) -> list[int]:
    """Return how many edits each of a config's interventions has."""
    keys = list(reft.edits.keys())
    return [sum(key.startswith(f"{number}:") for key in keys) for number in range(len(reft.config.interventions))]


# Reading --------------------------------------------------------------------------------------------------------------


def _batches(
    collator: Collator | Callable[[Rows], Mapping[str, Any]], readings: Sequence[Intervention]
) -> Callable[[Rows], Mapping[str, Any]]:
    """Return what makes a batch of rows: with their answers only where these are read."""
    with_answers = any(item.parsed_positions.segment == "response" for item in readings)
    return collator.prompts if isinstance(collator, Collator) and not with_answers else collator


def _collect(
    reader: Reft, make: Callable[[Rows], Mapping[str, Any]], sides: tuple[Rows, Rows], way: Way, batch_size: int
) -> list[tuple[str, Tally]]:
    """Return, for each of the reader's edits, where it is and what is kept of it after one pass over both sets."""
    device = next(reader.model.parameters()).device
    tallies = [Tally() for _ in reader.edits]
    places = ["" for _ in tallies]
    for start in range(0, max(map(len, sides)), batch_size):
        both: list[list[Read]] = []
        for side, rows in zip(("positive", "negative"), sides, strict=True):
            batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
            reads = reader.read(to_device(make(batch), device)) if batch else []
            for read in reads:
                _check_read(read, len(batch), f"{side} rows {start} to {start + len(batch) - 1}", way)
            both.append(reads)
        for index, (up, down) in enumerate(zip_longest(*both)):
            tally, places[index] = tallies[index], _place(up or down)
            if way.pairs:
                _add_pairs(tally, up, down, way, start)
                continue
            for side, read in ((tally.positive, up), (tally.negative, down)):
                if read is not None:
                    side.add(_precise(read.states_BKD)[read.valid_BK])
    return list(zip(places, tallies, strict=True))


def _add_pairs(tally: Tally, up: Read, down: Read, way: Way, start: int) -> None:
    """Add a batch of pairs. Raises ValueError where the two are not as many."""
    place, counts_B, others_B = _place(up), up.valid_BK.sum(1), down.valid_BK.sum(1)
    if len(counts_B) != len(others_B):
        raise ValueError(
            f"{place} has {len(counts_B)} positive and {len(others_B)} negative pictures in the batch of pairs from "
            f"{start} on; give the two rows of a pair as many pictures"
        )
    if way.pairs == "tokens":
        if not torch.equal(counts_B, others_B):
            row = int((counts_B != others_B).nonzero()[0])
            raise ValueError(
                f"pair {start + row} has {int(counts_B[row])} positive and {int(others_B[row])} negative tokens to "
                f"read at {place}; give prompts of one length or read fewer, e.g. read='prompt:l1'"
            )
        tally.positive.add(_precise(up.states_BKD)[up.valid_BK])
        tally.negative.add(_precise(down.states_BKD)[down.valid_BK])
        return
    means_BD = [_precise(read.states_BKD).sum(1) / read.valid_BK.sum(1, keepdim=True) for read in (up, down)]
    tally.differences.add(means_BD[0] - means_BD[1])


def _check_read(read: Read, num_rows: int, rows: str, way: Way) -> None:
    has_B = read.valid_BK.any(1)
    if not bool(has_B.all()):
        raise ValueError(f"{rows}: number {int((~has_B).nonzero()[0])} of these has no token to read at {_place(read)}")
    if way.pairs == "rows" and len(has_B) == 1 < num_rows:
        raise ValueError(
            f"{_place(read)} sees the pictures of a batch as one row, where pairs are not told apart; use batch_size=1"
        )


def _precise(states: Tensor) -> Tensor:
    """Return states in float64, or float32 where there is no float64."""
    return states.to(torch.float32 if states.device.type == "mps" else torch.float64)


def _place(read: Read) -> str:
    component = "" if read.component == "output" else f" {read.component}"
    return f"site '{read.site}' layer {read.layer}{component}"


def _direction(way: Way, place: str, tally: Tally) -> Tensor:
    """Return a direction. Raises ValueError for one that is no direction."""
    direction_D = way.find(tally)
    if not bool(torch.isfinite(direction_D).all()):
        raise ValueError(f"the states read at {place} are not finite, so there is no direction")
    if not bool(direction_D.any()):
        raise ValueError(f"the states read at {place} do not differ, so there is no direction; read other positions")
    return direction_D


def _unit(direction_D: Tensor) -> Tensor:
    return direction_D / direction_D.norm().clamp_min(torch.finfo(direction_D.dtype).tiny)
