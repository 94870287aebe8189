"""Nothing is reached over a network unless the user asked for it."""

from __future__ import annotations

import os


def offline(online: bool) -> None:
    """Tell the Hugging Face libraries whether they may use the network; they read it when they are imported."""
    value = "0" if online else "1"
    os.environ["HF_HUB_OFFLINE"] = value
    os.environ["HF_DATASETS_OFFLINE"] = value
    os.environ.setdefault("TQDM_DISABLE", "1")  # GGUF conversion draws a bar of its own; ours says more
