"""Pictures embedded in data files, written out once by their content, so that they are files like others."""

import hashlib
import os
import tempfile
from io import BytesIO
from pathlib import Path

from delo_llava.errors import DeloError

#: Formats that are written out, and the suffix each gets; the name in the data decides nothing.
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}

#: The largest embedded picture that is accepted, in bytes as stored.
MAX_BYTES = 64 * 1024 * 1024


class EmbeddedImages:
    """A folder of pictures named by the sha256 of their bytes; two processes may write the same one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, content: bytes, where: str) -> Path:
        """The file that holds `content`, written when it is not there yet.

        Raises:
            DeloError: no picture in one of the known formats, or too large; `where` names the record.
        """
        digest = hashlib.sha256(content).hexdigest()
        path = self.folder / digest[:2] / f"{digest}{_suffix(content, where)}"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".image-")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(draft, path)
        return path


def _suffix(content: bytes, where: str) -> str:
    """The suffix of the format that the bytes really have; only the header is decoded."""
    from PIL import Image

    if len(content) > MAX_BYTES:
        raise DeloError(f"{where}: the embedded image is too large.", given=f"{len(content)} bytes")
    try:
        with Image.open(BytesIO(content), formats=list(SUFFIXES)) as picture:
            return SUFFIXES[picture.format or ""]
    except (OSError, SyntaxError, ValueError, KeyError, Image.DecompressionBombError) as error:
        raise DeloError(f"{where}: the embedded image cannot be read: {error}", allowed=SUFFIXES) from error
