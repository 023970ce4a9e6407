"""`Budget`: what a search may spend; `Meter`: what was spent, measured while it is spent.

Seconds are those of this process' processor time on a CPU, so that other programs do not count, and of the clock on a
GPU. Operations are floating-point operations, forward and backward, counted by torch's own counter where they are run.
"""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch.utils.flop_counter import FlopCounterMode

Unit = Literal["seconds", "operations", "trials"]
FACTORS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """How much of what may be spent. Raises ValueError for nothing, or less."""

    amount: float
    unit: Unit

    def __post_init__(self) -> None:
        """Refuse what allows nothing."""
        if not self.amount > 0:
            raise ValueError(f"the budget ({self}) must be more than nothing")

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.amount:g} {self.unit}"


def parse_time(text: str) -> Budget:
    """Read a time as "30m", "90s" or "1.5h". Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if found is None:
        raise ValueError(f"`budget` (={text!r}) must be a number with s, m or h behind it, as '30m'")
    return Budget(float(found[1]) * FACTORS[found[2]], "seconds")


class Meter(ABC):
    """Measures what is spent inside `running()`; `spent` is what was spent so far, also while it runs."""

    unit: Unit

    @abstractmethod
    def now(self) -> float:
        """Return the reading of a counter that only grows."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what happens inside, from nothing."""
        self.start = self.now()
        yield

    @property
    def spent(self) -> float:
        """What was spent since the start."""
        return self.now() - self.start


class Seconds(Meter):
    """Processor time on a CPU, else the clock's."""

    unit: Unit = "seconds"

    def __init__(self, device: str) -> None:
        self.clock = time.process_time if device == "cpu" else time.perf_counter

    def now(self) -> float:
        """Read the clock."""
        return self.clock()


class Operations(Meter):
    """Floating-point operations of what torch runs inside."""

    unit: Unit = "operations"

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)

    def now(self) -> float:
        """Return the operations that were counted since the start."""
        return float(self.counter.get_total_flops())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what runs inside."""
        self.counter = FlopCounterMode(display=False)
        with self.counter:
            self.start = 0.0
            yield


def meter_of(budget: Budget, device: str) -> Meter:
    """Return what measures a budget; trials are counted, and measured in seconds."""
    return Operations() if budget.unit == "operations" else Seconds(device)
