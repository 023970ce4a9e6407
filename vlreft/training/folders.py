"""Checkpoint folders of a training run: whole or not there, and the last whole one found again.

A checkpoint is written in `.saving/` beside its place, flushed to disk, and renamed into it; one that is to be deleted
is renamed back first. Whatever ends the process leaves the checkpoints that were there, and the new one or none of it.
"""

import json
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

from vlreft.saving.checkpoint import read_checkpoint, sync_folder

logger = logging.getLogger("vlreft")

STAGING = ".saving"
REPLACED = "replaced-"
RETIRED = "retired-"
STATE_NAME = "trainer_state.json"


def start_staging(run_dir: Path) -> Path:
    """Return the empty folder that a checkpoint is written in; what a killed process left in it is gone."""
    clear_staging(run_dir)
    staging = run_dir / STAGING
    staging.mkdir(parents=True)
    return staging


def clear_staging(run_dir: Path) -> None:
    """Remove the staging folder, but for a checkpoint that was about to be replaced."""
    put_back(run_dir)
    shutil.rmtree(run_dir / STAGING, ignore_errors=True)


def put_in_place(run_dir: Path, name: str) -> None:
    """Flush a checkpoint in the staging folder to disk and give it its name; one of the same name goes."""
    written, target = run_dir / STAGING / name, run_dir / name
    for path in written.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    for folder in (*(path for path in written.rglob("*") if path.is_dir()), written):
        sync_folder(folder)
    if target.exists():
        target.replace(run_dir / STAGING / f"{REPLACED}{name}")
    written.replace(target)
    sync_folder(run_dir)
    shutil.rmtree(run_dir / STAGING / f"{REPLACED}{name}", ignore_errors=True)


def put_back(run_dir: Path) -> None:
    """Give a checkpoint its name back that was about to be replaced when the process ended."""
    for replaced in (run_dir / STAGING).glob(f"{REPLACED}*"):
        target = run_dir / replaced.name.removeprefix(REPLACED)
        if not target.exists():
            replaced.replace(target)


def retire(run_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete a run's oldest checkpoints beyond a limit, never the newest or the best, and the staging folder.

    Chooses as `transformers.trainer_utils.rotate_checkpoints` (5.24) does, by age. A folder that is left half deleted
    would be the youngest, changed just now, and a whole one would go in its place; so each is renamed first. One that
    cannot be stays, with a warning.
    """
    paths = sort_checkpoints(str(run_dir), use_mtime=True) if limit is not None and limit > 0 else []
    kept = {*paths[-1:], *([str(Path(best))] if best is not None else [])}
    num_old = max(len(paths) - max(limit or 0, len(kept)), 0)
    for path in [Path(path) for path in paths if path not in kept][:num_old]:
        try:
            (run_dir / STAGING).mkdir(exist_ok=True)
            path.replace(run_dir / STAGING / f"{RETIRED}{path.name}")
        except OSError as error:
            logger.warning("%s is beyond `save_total_limit`, and cannot be deleted: %s", path, error)
    clear_staging(run_dir)


def last_checkpoint(run_dir: str | os.PathLike[str]) -> str | None:
    """Return the path of a run's last whole checkpoint, None if there is none; half ones are skipped, with a warning.

    For `trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))`: go on, or start where there is nothing yet.
    """
    for path in _newest_first(Path(run_dir)):
        if (why := why_broken(path)) is None:
            return str(path)
        logger.warning("%s is skipped, it is no whole checkpoint: %s", path, why)
    return None


def all_broken(run_dir: str | os.PathLike[str]) -> list[str]:
    """Return what is wrong with each checkpoint of a run, of those that are not whole."""
    reasons = [(path, why_broken(path)) for path in _newest_first(Path(run_dir))]
    return [f"{path.name} ({why})" for path, why in reasons if why is not None]


def why_broken(folder: str | os.PathLike[str]) -> str | None:
    """Return why a training cannot go on from a checkpoint folder, None if it can.

    The adapter's hash and every checksum that torch wrote are compared.
    """
    path = Path(folder)
    try:
        read_checkpoint(path).tensors.check()
        state = json.loads((path / STATE_NAME).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"{STATE_NAME} is not JSON: {error}"
    except (OSError, ValueError) as error:
        return str(error)
    if not isinstance(state, dict) or type(state.get("global_step")) is not int:
        return f"{STATE_NAME} does not say its step"
    for kind in ("rng_state*.pth", "optimizer*", "scheduler*"):
        if not any(path.glob(kind)) and not any(path.glob("global_step*")):  # DeepSpeed's own folder
            return f"it has no {kind}, so training could not go on as if nothing had been"
    broken = [_why_broken_archive(file) for file in sorted((*path.glob("*.pt"), *path.glob("*.pth")))]
    return next((why for why in broken if why is not None), None)


def _why_broken_archive(path: Path) -> str | None:
    """Return what is wrong with a file that torch wrote, a zip archive; nothing in it is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        return f"{path.name} is damaged: {error}"
    return None if bad is None else f"{path.name} is damaged: {bad}"


def _newest_first(run_dir: Path) -> list[Path]:
    numbered = {path: re.fullmatch(r"checkpoint-([0-9]+)", path.name) for path in run_dir.glob("checkpoint-*")}
    steps = {path: int(match[1]) for path, match in numbered.items() if match and path.is_dir()}
    return sorted(steps, key=steps.__getitem__, reverse=True)
