"""The one folder for what is made once and can be made again: built data, stored records, checked images."""

import os
from pathlib import Path


def cache_root() -> Path:
    """$DELO_LLAVA_CACHE, else ~/.cache/delo_llava."""
    return Path(os.environ.get("DELO_LLAVA_CACHE") or Path.home() / ".cache" / "delo_llava")
