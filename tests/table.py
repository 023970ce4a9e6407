"""Print what works on every family of the zoo, site by site, and why the rest does not.

    python tests/table.py              # the table
    python tests/table.py --summary    # the lines that the README shows

A site works if an edit there is heard in what the model says and goes away with `reft.disabled()`. A site that is not
there, or cannot be edited, has the sentence that `vlreft.attach` says. What is neither is a silent miss.
"""

import argparse
import importlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from family import Family
from rich.console import Console
from rich.table import Table
from test_families import FILES, attached, heard, loreft
from zoo import FAMILIES

SITES = ("text", "text_encoder", "vision", "connector")
GROUPS = {
    **dict.fromkeys(("rows", "packed", "special"), "vision-language"),
    **{"text": "text-only", "dual": "dual encoders", "open_clip": "open_clip"},
}


@dataclass(frozen=True)
class Result:
    """What came of one site of one family: "works", "refused" with a reason, or "silent miss"."""

    outcome: str
    reason: str = ""


def groups() -> dict[str, list[Family]]:
    """Return the families by what they are."""

    found: dict[str, list[Family]] = {}
    for name in FILES:
        found.setdefault(GROUPS[name], []).extend(importlib.import_module(f"families_{name}").ROWS)
    for family in FAMILIES.values():
        found["vision-language" if family.has_image else "text-only"].append(family)
    return found


def try_site(family: Family, model: torch.nn.Module, site: str) -> Result:
    """Edit at a site, and listen."""
    batch = family.batch(family.samples)
    with torch.no_grad():
        base = heard(model(**batch))
        try:
            reft = attached(model, loreft(family, site))
        except ValueError as error:
            return Result("refused", str(error))
        try:
            edited = heard(model(**batch))
            with reft.disabled():
                is_back = heard(model(**batch)).equal(base)
        except ValueError as error:
            return Result("refused", str(error))
        finally:
            reft.detach()
    return Result("works" if is_back and not edited.equal(base) else "silent miss")


def results_of(family: Family) -> dict[str, Result]:
    """Try all sites of a family."""
    model = family.build().requires_grad_(False)  # torch convolves frozen weights by another kernel
    return {site: try_site(family, model, site) for site in SITES}


def summary(by_group: dict[str, dict[str, dict[str, Result]]]) -> list[str]:
    """Return one line of a Markdown table for each group."""
    lines = ["| families | " + " | ".join(f"`{site}`" for site in SITES) + " | silent misses |", "|---|" + "---:|" * 5]
    for group, families in by_group.items():
        counts = Counter((site, r.outcome) for results in families.values() for site, r in results.items())
        cells = [str(counts[site, "works"]) for site in SITES]
        misses = sum(number for (_, outcome), number in counts.items() if outcome == "silent miss")
        lines.append(f"| {len(families)} {group} | " + " | ".join(cells) + f" | {misses} |")
    return lines


def everything() -> dict[str, dict[str, dict[str, Result]]]:
    """Try all sites of all families."""
    return {group: {family.name: results_of(family) for family in rows} for group, rows in groups().items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or its summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", action="store_true")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    by_group = everything()
    if parser.parse_args(arguments).summary:
        print("\n".join(summary(by_group)))
        return
    console = Console()
    for group, families in by_group.items():
        table = Table("family", *SITES, "why not", title=group)
        for name, results in families.items():
            reasons = {result.reason.partition("; it has")[0] for result in results.values() if result.reason}
            table.add_row(name, *(result.outcome for result in results.values()), "\n".join(sorted(reasons)))
        console.print(table)


if __name__ == "__main__":
    main()
