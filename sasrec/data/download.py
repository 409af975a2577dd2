"""Downloads that continue where they stopped, checked by sha256."""

import sys
import time
from pathlib import Path

import requests
import urllib3
from tqdm import tqdm

from sasrec.errors import UserError
from sasrec.files import sha256 as hash_file

ATTEMPTS = 5
PAUSE = 1.0  # seconds before the second attempt, doubled each time
TIMEOUT = (20.0, 60.0)  # seconds to connect, and between two pieces of data
CHUNK = 1 << 18


def obtain(url: str, target: Path, sha256: str | None, key: str) -> Path:
    """Have the file of `url` at `target` with the given hash, downloading only what is missing; returns `target`.

    `key` names the data set in messages. Without a hash the file is downloaded once and then refused with the line to
    put into params.yaml; the next run, with that line, uses the file that is already there.
    Raises UserError for no connection, a refused request, an unknown hash, or one that does not match.
    """
    if not target.exists():
        download(url, target)
    found = hash_file(target)
    if sha256 is None:
        raise UserError(
            f"the sha256 of {url} ({key}) is not known to this project, so nothing can vouch for the file; it was "
            f"downloaded to {target}. If you trust it, put this line under `dataset:` in params.yaml and run again "
            f"(there is no second download): sha256: {found}"
        )
    if found != sha256:
        target.unlink()
        raise UserError(
            f"{target.name} from {url} has sha256 {found}, expected {sha256}; the file was removed. Run again to "
            f"download it anew; if the hash stays and you trust the file, set dataset.sha256 to it in params.yaml"
        )
    return target


def download(url: str, target: Path) -> None:
    """Download `url` to `target`. What arrived stays in `<target>.part` and the next attempt, or run, continues it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    advice = f"Run again to continue, or get the file by other means and set dataset.path to it ({url})"
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            _attempt(url, part)
        except requests.HTTPError as error:
            status = error.response.status_code
            if status < 500 and status != 429:
                raise UserError(f"cannot download {url}: the server answers {status} {error.response.reason}") from None
            reason = f"the server answers {status}"
        except requests.RequestException as error:
            reason = _short(error)
        else:
            part.replace(target)
            _tag(part).unlink(missing_ok=True)
            return
    raise UserError(f"cannot download {url}: {reason} ({ATTEMPTS} attempts). {advice}")


def _short(error: Exception) -> str:
    """The innermost reason; requests wraps it in several layers of text."""
    inner: object = error
    while isinstance(inner, Exception) and inner.args and isinstance(inner.args[-1], Exception):
        inner = inner.args[-1]
    reason = getattr(inner, "reason", inner)
    return " ".join(str(reason).split())[:200]


def _tag(part: Path) -> Path:
    """Where the server's name for this version of the file is kept, so that two versions are never joined."""
    return part.with_name(part.name + ".etag")


def _attempt(url: str, part: Path) -> None:
    """One request; appends to `part` where the server allows. Raises requests.RequestException when cut off."""
    have = part.stat().st_size if part.exists() else 0
    # The bytes as stored: a server that compresses on the fly would change lengths and hashes.
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if _tag(part).exists():
            headers["If-Range"] = _tag(part).read_text(encoding="utf-8")
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(have):
                return
            part.unlink()
            raise requests.ConnectionError("the partial file did not fit and was removed")
        response.raise_for_status()
        if response.status_code != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0
        etag = response.headers.get("ETag", "")
        if etag and not etag.startswith("W/"):
            _tag(part).write_text(etag, encoding="utf-8")
        else:
            _tag(part).unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        total_size = have + int(length) if length else None
        _receive(response, part, have, total_size)
    if total_size is not None and part.stat().st_size != total_size:
        raise requests.ConnectionError(f"the connection was cut at {part.stat().st_size} of {total_size} bytes")


def _receive(response: requests.Response, part: Path, have: int, total: int | None) -> None:
    terminal = sys.stderr.isatty()
    name = part.name.removesuffix(".part")
    if not terminal:
        size = f"{total / 1e6:.1f} MB" if total else "size unknown"
        print(f"downloading {name} ({size})" + (f", continuing at {have / 1e6:.1f} MB" if have else ""), flush=True)
    with (
        open(part, "ab" if have else "wb") as file,
        tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name, disable=not terminal) as bar,
    ):
        try:
            # Not iter_content: some servers call a .gz file an encoding, and it would be unpacked on the way.
            for piece in response.raw.stream(CHUNK, decode_content=False):
                file.write(piece)
                bar.update(len(piece))
        except urllib3.exceptions.HTTPError as error:
            raise requests.ConnectionError(f"the connection was cut: {_short(error)}") from None
