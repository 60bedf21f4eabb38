"""The manifest that closes a published folder: size and sha256 of every file in it."""

from pathlib import Path

from delo_llava.errors import DeloError
from delo_llava.files import fsync, sha256_file, write_json_atomic
from delo_llava.strict import parse_json

MANIFEST = "manifest.json"
SCHEMA = 1


def folder_files(folder: Path) -> list[Path]:
    """Every regular file below `folder` except the manifest, sorted."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def write_manifest(folder: Path) -> None:
    """Record size and sha256 of every file of `folder`, after flushing them; the manifest is written last.

    Whoever may read the folder may read its files (safetensors writes them for their owner alone).

    Raises:
        DeloError: the folder is empty.
    """
    files = folder_files(folder)
    if not files:
        raise DeloError("Nothing was written into a folder that was to be published", given=folder)
    for file in files:
        file.chmod(file.parent.stat().st_mode & 0o666)
        fsync(file)
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in files
    }
    write_json_atomic(folder / MANIFEST, {"schema": SCHEMA, "files": entries})


def manifest_faults(folder: Path) -> list[str]:
    """What differs between `folder` and its manifest, one line per file; empty when all is well."""
    try:
        entries = parse_json((folder / MANIFEST).read_bytes())["files"]
        hashes = {str(name): str(entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / MANIFEST}: missing or unreadable ({error.__class__.__name__})"]
    present = {file.relative_to(folder).as_posix() for file in folder_files(folder)}
    faults = [f"{folder / name}: not in the manifest" for name in sorted(present - set(hashes))]
    for name, expected in sorted(hashes.items()):
        if name not in present:
            faults.append(f"{folder / name}: missing")
        elif sha256_file(folder / name) != expected:
            faults.append(f"{folder / name}: its bytes differ from the published ones")
    return faults
