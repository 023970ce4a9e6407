"""`Manifest`: what one run did and when, in a file that is rewritten whole after each event."""

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("vlreft", "torch", "transformers", "datasets", "accelerate", "open_clip_torch", "tokenizers", "pillow")


class Manifest:
    """A run's record: settings, data, trials, what was selected, when the sealed test was opened, and the scores.

    Raises: ValueError where the folder holds a run of other settings, so that a run goes on only as what it began as.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / "manifest.json"
        settings = json.loads(json.dumps(settings))  # as they come back from the file
        if self.path.exists():
            self.data = _read(self.path)
            known = self.data["settings"]
            if known != settings:
                changed = [key for key in settings.keys() | known.keys() if settings.get(key) != known.get(key)]
                raise ValueError(
                    f"{folder} holds a run of other settings ({', '.join(sorted(changed))} differ); name another "
                    "`--output`, or remove it."
                )
            return
        packages = {name: version(name) for name in PACKAGES}
        self.data: dict[str, Any] = {
            "format": 1,
            "began": now(),
            "settings": settings,
            "versions": {"python": platform.python_version(), **packages},
            "data": {},
            "trials": [],
            "test": {"openings": [], "scores": {}},
        }  # first written when the data were found to be in order

    def write(self) -> None:
        """Replace the file at once, so that an interruption leaves the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".draft")
        with draft.open("w", encoding="utf-8") as out:
            out.write(json.dumps(self.data, indent=1) + "\n")
            out.flush()
            os.fsync(out.fileno())
        draft.replace(self.path)

    def record_data(self, part: str, found: Mapping[str, Any]) -> None:
        """Record what a part of the data was. Raises ValueError if it was something else when the run began."""
        known = self.data["data"].setdefault(part, dict(found))
        if known != found:
            raise ValueError(f"the data of {part!r} have changed since this run began; name another `--output`.")
        self.write()

    def trial(self, name: str) -> dict[str, Any] | None:
        """Return a finished trial's record."""
        return next((trial for trial in self.data["trials"] if trial["name"] == name), None)

    def add_trial(self, trial: Mapping[str, Any]) -> None:
        """Record a finished trial."""
        if self.is_final:
            raise ValueError("the selection of this run is final: no trial can join it; name another `--output`.")
        self.data["trials"].append(dict(trial))
        self.write()

    @property
    def is_final(self) -> bool:
        """Whether the selection is over."""
        return "selection" in self.data

    def select(self, chosen: Mapping[str, Any]) -> None:
        """Make the selection final. After this the test may be opened, and no trial is added."""
        if not self.is_final:
            self.data["selection"] = {**chosen, "final_at": now()}
            self.write()

    def open_test(self, reason: str | None) -> int:
        """Record that the sealed test is opened, before it is read, and return which opening it is, from 1.

        An opening that was interrupted goes on. Another one, after the first was finished, wants a reason, and stays on
        record. Raises: ValueError before the selection is final, or without a reason.
        """
        if not self.is_final:
            raise ValueError("the test is sealed until the selection is final")
        openings = self.data["test"]["openings"]
        if openings and "finished" not in openings[-1]:
            return len(openings)
        if openings and not reason:
            raise ValueError(
                f"the test was opened on {openings[-1]['opened']}; to look again, say why with `--reopen REASON`: it "
                "will stand in the manifest."
            )
        openings.append({"opened": now(), "reason": reason or "first"})
        self.write()
        return len(openings)

    def close_test(self, scores: Mapping[str, Any]) -> None:
        """Record the test's scores."""
        opening = self.data["test"]["openings"][-1]
        opening["finished"] = now()
        self.data["test"]["scores"] = dict(scores)
        self.write()


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); name another `--output`.") from error
