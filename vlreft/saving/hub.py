"""Adapters on the Hugging Face hub: fetched by name, pushed with their model card; nothing but the three files."""

import os
import re
from pathlib import Path

from vlreft.saving.card import FOLDER
from vlreft.saving.checkpoint import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME

FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)
NAME = r"[\w.-]+/[\w.-]+"


def folder_of(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the folder of an adapter: a local one, or one fetched from the hub for a name such as "user/name".

    revision: a branch, tag or commit on the hub. Without a network, or with HF_HUB_OFFLINE=1, what was fetched before
    is used. Raises ValueError for what is neither, and for a repository that cannot be had, with the hub's reason.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"`revision` (={revision!r}) is for names on the hub; {path} is a local folder")
        return path
    if not isinstance(source, str) or not re.fullmatch(NAME, source) or ".." in source:
        raise ValueError(
            f"no vlreft checkpoint in {source}: there is no such folder, and a name on the hub is like 'user/name'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(FILES)))
    except (OSError, HTTPError, HFValidationError) as error:  # HTTPError: a connection that breaks off is no OSError
        at = "" if revision is None else f" at revision '{revision}'"
        raise ValueError(f"the adapter '{source}'{at} cannot be had from the hub: {error}") from error


def check_name(name: str) -> None:
    """Raise ValueError for what is no name of a repository."""
    if not isinstance(name, str) or not re.fullmatch(NAME, name) or ".." in name:
        raise ValueError(f"`name` (={name!r}) must be like 'user/name'")


def push(folder: str | Path, name: str, *, private: bool, message: str, token: str | None) -> str:
    """Upload an adapter's folder to the hub, in one commit; return its address there. Its card gets the address too.

    What the hub answers to a missing login or right is raised as it comes.
    """
    check_name(name)
    from huggingface_hub import HfApi

    card = Path(folder) / CARD_NAME
    card.write_text(card.read_text(encoding="utf-8").replace(FOLDER, name), encoding="utf-8")
    api = HfApi(token=token)
    api.create_repo(name, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=name,
        folder_path=folder,
        allow_patterns=list(FILES),
        commit_message=message or "An adapter made with vlreft",
    )
    return str(commit.repo_url)
