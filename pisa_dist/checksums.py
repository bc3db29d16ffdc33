"""A folder of files that vouches for itself: checksums written last, checked before anything is believed."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

CHECKSUMS = "checksums.json"


def seal(folder: Path) -> None:
    """Write the checksums of all files in a folder, on disk when this returns.

    Raises:
        OSError: a file cannot be read or written.
    """
    sums = {file.name: _digest(file) for file in sorted(folder.iterdir())}
    with (folder / CHECKSUMS).open("w") as stream:
        stream.write(json.dumps(sums))
        stream.flush()
        os.fsync(stream.fileno())


def damage(folder: Path, *, required: Sequence[str]) -> str | None:
    """What is wrong with the files of a sealed folder; None if nothing is.

    Args:
        folder: the folder.
        required: names of files that must be among those that are vouched for.
    """
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        for name in required:
            if name not in sums:
                return f"{CHECKSUMS} has no line for {name}"
        for name, expected in sums.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if _digest(file) != expected:
                return f"{name} is damaged ({file.stat().st_size} bytes, its checksum differs)"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
