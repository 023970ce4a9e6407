"""Draws how the cost of a training step grows, from results: `python -m tasks.bench.plot RESULTS PICTURE`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, StrMethodFormatter

LABELS = {
    "num_image_tokens": "image tokens in a row",
    "num_rows": "rows in a batch",
    "num_edited": "edited blocks (the last ones)",
    "rank": "rank (of LoRA: twice that)",
}
MUCH = 5.0


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one panel for each thing that grows: milliseconds of a step, medians with quartiles.

    Both scales are logarithmic; that of the milliseconds begins at 0 where nothing grows by more than `MUCH`.
    """
    grown = [record for record in records if "at" in record and "sides" in record]
    if not grown:
        raise ValueError(
            "the results hold no cell that grows; run `python -m tasks.bench --cells tokens rows layers rank`"
        )
    sweeps = list(dict.fromkeys(record["sweep"] for record in grown))
    figure, axes = plt.subplots(1, len(sweeps), figsize=(3.6 * len(sweeps), 3.2), squeeze=False, layout="constrained")
    for axis, sweep in zip(axes[0], sweeps, strict=True):
        panel = [record for record in grown if record["sweep"] == sweep]
        at = [record["at"] for record in panel]
        for name in panel[0]["sides"]:
            sides = [record["sides"][name] for record in panel]
            medians = [side["median"] for side in sides]
            below = [side["median"] - side["quartiles"][0] for side in sides]
            above = [side["quartiles"][1] - side["median"] for side in sides]
            axis.errorbar(at, medians, yerr=[below, above], marker="o", markersize=3, capsize=2, label=name)
        axis.set(xscale="log", xlabel=LABELS[sweep], xticks=at, xticklabels=at)
        medians = [side["median"] for record in panel for side in record["sides"].values()]
        if max(medians) > MUCH * min(medians):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        else:
            axis.set_ylim(0, 1.3 * max(medians))  # room for the legend
        axis.minorticks_off()
        axis.legend(fontsize=6)
    axes[0][0].set_ylabel("a training step, ms")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Read the results that are named first, write the picture that is named second."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tasks.bench.plot RESULTS.json PICTURE.png")
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    draw(results["records"], Path(sys.argv[2]))


if __name__ == "__main__":
    main()
