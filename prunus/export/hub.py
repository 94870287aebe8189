"""Uploading a checkpoint, only when asked; the token is the Hugging Face library's own affair and is never looked at here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..errors import UserError
from .card import NAME


def push(folder: Path, repo: str, *, private: bool, online: bool) -> dict[str, Any]:
    """Upload a folder that has a card and, where prunus wrote it, verifies."""
    if not online:
        raise UserError("push: this leaves the machine; say so with --online")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"push: {repo!r} is no name on the hub; give ORG/NAME")
    if not folder.is_dir():
        raise UserError(f"push: {folder}: no such file or folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"push: {folder} has no config.json; give a checkpoint folder")
    if not (folder / NAME).is_file():
        raise UserError(f"push: {folder} has no {NAME}; prunus card {folder} writes one")
    if link := next((path for path in sorted(folder.rglob("*")) if path.is_symlink()), None):
        raise UserError(f"push: {link} is a link, and what it leads to may be no part of the model; put a file there")
    if (folder / checkpoint.MANIFEST).is_file():
        checkpoint.verify(folder)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        found = api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=[".*"])
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"push: the hub refused ({first}); hf auth login gives it a token") from None
    return {"repo": repo, "url": str(found)}
