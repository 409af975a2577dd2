"""What an exported folder says of itself, and whether it is true."""

import hashlib
import json
from pathlib import Path
from typing import Any

FORMAT = 5


class ArtefactError(Exception):
    """A folder that cannot be used; the message names the file and says what to do."""


def digest(manifest: dict[str, Any]) -> str:
    """What the manifest says of itself under `digest`: the sha256 of the rest of it."""
    content = json.dumps({k: v for k, v in manifest.items() if k != "digest"}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are all as it describes them. Raises ArtefactError."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror}); name a folder that `dvc repro` exported") from None
    except ValueError:
        raise ArtefactError(f"{path} is not valid JSON; export the model again with `dvc repro`") from None
    if not isinstance(manifest, dict) or "format" not in manifest or not isinstance(manifest.get("files"), dict):
        raise ArtefactError(f"{path} is not the manifest of an exported model")
    if manifest["format"] != FORMAT:
        raise ArtefactError(
            f"{path} is of format {manifest['format']}, and this runtime reads {FORMAT}; use the runtime beside it, "
            "or export the model again with `dvc repro`"
        )
    if manifest.get("digest") != digest(manifest):
        raise ArtefactError(f"{path} was changed after the export; export the model again with `dvc repro`")
    for name, facts in manifest["files"].items():
        file = folder / name
        place = Path(name)
        if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
            raise ArtefactError(f"{path} does not say what {name} is; export the model again with `dvc repro`")
        if place.anchor or ".." in place.parts or not file.is_file():
            raise ArtefactError(f"{file} is missing; copy the whole folder again")
        if file.stat().st_size != facts["bytes"]:
            raise ArtefactError(f"{file} has {file.stat().st_size} bytes, not {facts['bytes']}; copy the whole folder again")
        with open(file, "rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != facts["sha256"]:
                raise ArtefactError(f"{file} is not the file its manifest describes; copy the whole folder again")
    return manifest
