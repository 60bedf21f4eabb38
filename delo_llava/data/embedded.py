"""Pictures embedded in data files, written out once by their content, so that they are files like others."""

import hashlib
import os
import tempfile
from io import BytesIO
from pathlib import Path

from delo_llava.cache import writable
from delo_llava.data.faults import BadEntry

#: The largest embedded picture that is accepted, in bytes as stored.
MAX_BYTES = 64 * 1024 * 1024


class EmbeddedImages:
    """A folder of pictures named by the sha256 of their bytes; two processes may write the same one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, content: bytes) -> Path:
        """The file that holds `content`, written when it is not there yet.

        Raises:
            BadEntry: no picture in one of the known formats, or too large.
        """
        digest = hashlib.sha256(content).hexdigest()
        path = self.folder / digest[:2] / f"{digest}{_suffix(content)}"
        if not path.is_file():
            writable(path.parent)
            handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".image-")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(draft, path)
        return path


def _suffix(content: bytes) -> str:
    """The suffix of the format that the bytes really have, by any name; only the header is read."""
    from PIL import Image

    from delo_llava.data.images import FORMATS

    if len(content) > MAX_BYTES:
        raise BadEntry("image_too_large", "the embedded image is too large.", given=f"{len(content)} bytes")
    try:
        with Image.open(BytesIO(content), formats=list(FORMATS)) as picture:
            return FORMATS["JPEG" if picture.format == "MPO" else picture.format or ""]
    except (OSError, SyntaxError, ValueError, KeyError, Image.DecompressionBombError) as error:
        told = f"the embedded image cannot be read: {error}"
        raise BadEntry("image_undecodable", told, allowed=FORMATS) from error
