"""The raw folder: the file of interactions as it was given, files with titles where there are any, and source.json."""

import gzip
import shutil
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from sasrec.config import NO_FILE, DatasetParams, SampleParams
from sasrec.data import catalogue, sample
from sasrec.data.download import obtain
from sasrec.data.source import Source
from sasrec.errors import UserError
from sasrec.files import atomic_folder, sha256, write_json

WORKBOOK = "is a workbook of Excel, or another document of Office; save the table as csv"


def fetch(params: DatasetParams, simulated: SampleParams, raw: Path, downloads: Path) -> Source:
    """Fill the folder `raw`; downloads are kept in `downloads`. Raises UserError for anything that cannot be had."""
    entry = catalogue.dataset(params.name)
    if params.format is not None and params.format not in catalogue.FORMATS:
        catalogue.format_of(params, "")  # raises with the nearest name
    local = params.path != NO_FILE
    wanted = _checked_hash(params.sha256)
    if params.name == "sample":
        of_file = {"path": local, **{key: getattr(params, key) is not None for key in ("sha256", "format", "separator")}}
        if (given := next((key for key, is_set in of_file.items() if is_set), None)) is not None:
            raise UserError(
                f"dataset.{given} is set, but the data set 'sample' is simulated; set dataset.name to the name of "
                "the file's data set, or to 'file' for a file of your own"
            )
        with atomic_folder(raw) as folder:
            sample.write(folder, simulated.users, simulated.items, simulated.seed)
            file = "ratings.dat"
            digest = sha256(folder / file)
            return _finish(folder, Source("sample", "movielens-dat", file, ["movies.dat"], file, digest, False, entry.times))
    if local:
        path = _local(params.path)
        digest = sha256(path)
        if wanted is not None and digest != wanted:
            raise UserError(
                f"{path} has sha256 {digest}, but dataset.sha256 is {wanted}; give the right file, or set "
                f"dataset.sha256 to null to take the file as it is"
            )
    elif entry.url is None:
        raise UserError(f"the data set '{params.name}' needs a local file: set dataset.path to it")
    else:
        wanted = wanted or entry.sha256
        path = obtain(entry.url, downloads / entry.url.rpartition("/")[2], wanted, f"dataset.name={params.name}")
        digest = sha256(path)
    with atomic_folder(raw) as folder:
        file, extras, format_name = _unpack(path, params, folder)
        return _finish(folder, Source(params.name, format_name, file, extras, path.name, digest, local, entry.times))


def _finish(folder: Path, source: Source) -> Source:
    note = folder / "source.json"
    if note.exists():
        raise UserError(f"{source.original}: a data file cannot be called source.json, as the note beside it is; rename it")
    write_json(note, asdict(source))
    return source


def _checked_hash(value: str | None) -> str | None:
    if value is None:
        return None
    value = value.strip().lower()
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise UserError(f"params.yaml: dataset.sha256 must be 64 hexadecimal digits, not '{value}'")
    return value


def _local(text: str) -> Path:
    path = Path(text).expanduser()
    if path.is_dir():
        raise UserError(f"dataset.path: {text} is a directory; give the file itself (data file, .zip or .gz)")
    if not path.exists():
        if path.is_absolute():
            raise UserError(f"dataset.path: {text} does not exist; correct the path")
        raise UserError(
            f"dataset.path: {text} does not exist in {Path.cwd()}; correct the path. Under `dvc exp run --queue` and "
            f"`--temp` the run happens in another folder, so there the path must be absolute"
        )
    if path.stat().st_size == 0:
        raise UserError(f"dataset.path: {text} is empty")
    return path


def _unpack(path: Path, params: DatasetParams, folder: Path) -> tuple[str, list[str], str]:
    """Copy or extract what is needed into `folder`; returns file of interactions, extras, format."""
    name = path.name
    if zipfile.is_zipfile(path) and not name.endswith((".parquet", ".pq")):
        return _unzip(path, params, folder)
    if name.lower().endswith(".zip"):
        raise UserError(f"{path} is not a zip archive, or is damaged; get it again")
    if name.lower().endswith((".tar", ".tgz", ".tar.gz", ".7z", ".rar", ".bz2", ".xz", ".zst")):
        raise UserError(f"{path}: archives of this kind are not read; give a .zip, a .gz or the plain file")
    format_name = catalogue.format_of(params, name.removesuffix(".gz"))
    _refuse_disguised(path, format_name)
    if name.lower().endswith(".gz"):
        _check_gzip(path)
    shutil.copyfile(path, folder / name)
    return name, [], format_name


def _refuse_disguised(path: Path, format_name: str) -> None:
    """Raise UserError for a file whose first bytes say that it is of another kind than its name does."""
    with open(path, "rb") as file:
        begin = file.read(8)
    if begin.startswith(b"\x1f\x8b") and not path.name.lower().endswith(".gz"):
        raise UserError(f"{path} is compressed by gzip, which its name does not say; rename it to {path.name}.gz")
    if begin.startswith(b"PAR1") and format_name != "parquet":
        raise UserError(f"{path} is a parquet file; set dataset.name to file and dataset.format to parquet")
    if begin == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":
        raise UserError(f"{path} {WORKBOOK}")


def _check_gzip(path: Path) -> None:
    """Read it to the end: a cut file or a wrong checksum shows only there."""
    try:
        with gzip.open(path, "rb") as file:
            empty = not file.read(1)
            while file.read(1 << 20):
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); get it again") from None
    if empty:
        raise UserError(f"{path} is empty")


def _unzip(path: Path, params: DatasetParams, folder: Path) -> tuple[str, list[str], str]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info.filename for info in archive.infolist() if not info.is_dir()]
            if "[Content_Types].xml" in members:
                raise UserError(f"{path} {WORKBOOK}")
            main = _main_member(path, members, params)
            base = PurePosixPath(main)
            format_name = catalogue.format_of(params, base.name)
            beside = {PurePosixPath(m).name: m for m in members if PurePosixPath(m).parent == base.parent}
            extras = [extra for extra in catalogue.FORMATS[format_name].extras if extra in beside]
            for member in [main, *(beside[extra] for extra in extras)]:
                target = folder / PurePosixPath(member).name
                # Reading to the end checks the member's checksum.
                with archive.open(member) as packed, open(target, "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
            if base.name.lower().endswith(".gz"):
                _check_gzip(folder / base.name)
            return base.name, extras, format_name
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        # RuntimeError: a password is needed; NotImplementedError: an unknown compression.
        raise UserError(f"{path}: the archive cannot be unpacked ({error}); get it again") from None


def _main_member(path: Path, members: list[str], params: DatasetParams) -> str:
    """The member with the interactions: the catalogue's own path, a usual name, or the only data file there is."""
    entry = catalogue.dataset(params.name)
    if entry.member in members:
        return str(entry.member)
    wanted = params.format or entry.format
    usual = {name for key, known in catalogue.FORMATS.items() if wanted in (None, key) for name in known.main}
    found = [member for member in members if PurePosixPath(member).name in usual]
    if not found:
        found = [m for m in members if catalogue.ending(m) in catalogue.ENDINGS and not PurePosixPath(m).name.startswith(".")]
        found = [m for m in found if "__MACOSX" not in m and not PurePosixPath(m).name.lower().startswith("readme")]
    if len(found) != 1:
        listed = ", ".join(members[:10]) or "nothing"
        problem = "no data file" if not found else "more than one data file"
        raise UserError(f"{path}: {problem} in the archive (it holds: {listed}); unpack it and give the file itself")
    return found[0]
