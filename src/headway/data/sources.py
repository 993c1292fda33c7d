"""Where text comes from: the standard library, files, folders, globs and Hugging Face datasets.

`listing` names what a source consists of without reading it (so that a prepared corpus can be found again at once);
`documents` reads it as a stream of texts. Everything that can be wrong with a source is one `DataError` of one line.
"""

from __future__ import annotations

import codecs
import errno
import glob
import hashlib
import io
import json
import logging
import os
import re
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TextIO

__all__ = ["SUFFIXES", "DataError", "FileEntry", "Listing", "documents", "listing"]

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
ACCEPTED = f"'stdlib', a file, folder or glob of {' '.join(SUFFIXES)}, or a Hugging Face dataset as 'hf:NAME[:CONFIG]'"

# A document holds at most about 1/64 of its source, so that a split by document can meet a small fraction even when
# everything is one file, and never more than what is comfortable to tokenise at once.
PIECES_PER_SOURCE = 64
SHORTEST_PIECE = 4 * 1024
LONGEST_PIECE = 256 * 1024
LONGEST_ROW = 64 * 1024 * 1024
PARQUET_ROWS = 256
SCAN_BYTES = 64 * 1024

NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
SURROGATES = re.compile("[\ud800-\udfff]")

logger = logging.getLogger("headway.data")


class DataError(ValueError):
    """A source, tokenizer or cache that cannot be used; the message is one line that says why."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class FileEntry(NamedTuple):
    """One file of a source: path relative to the source's root, size in bytes, time of last change in nanoseconds."""

    path: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Listing:
    """What a source consists of, in the fixed order in which it is read.

    Attributes:
        source: the source as it was named.
        root: the folder that the paths of `files` are relative to; None for a dataset on the hub.
        files: the files, sorted by path.
        dataset: name and configuration of a Hugging Face dataset; None for everything else.
    """

    source: str
    root: Path | None
    files: tuple[FileEntry, ...]
    dataset: tuple[str, str | None] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over paths, sizes and times of change; for a dataset on the hub, over its name and configuration."""
        identity = self.dataset if self.root is None else [self.dataset and self.dataset[1], self.files]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @property
    def text_bytes(self) -> int | None:
        """Bytes of text to be read, or None where the files' sizes do not tell."""
        if self.dataset is not None or any(not entry.path.lower().endswith(TEXT_SUFFIXES) for entry in self.files):
            return None
        return sum(entry.size for entry in self.files)

    @cached_property
    def piece_characters(self) -> int:
        """Length above which a document is cut at a line end: 1/64 of the source, within 4 Ki to 256 Ki characters."""
        if self.dataset is not None:
            return LONGEST_PIECE
        share = sum(entry.size for entry in self.files) // PIECES_PER_SOURCE
        return min(max(share, SHORTEST_PIECE), LONGEST_PIECE)


def listing(source: str | os.PathLike[str]) -> Listing:
    """List what `source` consists of, reading no file.

    Args:
        source: one of
            "stdlib": the Python files of the running interpreter's standard library without its tests and without
            installed packages (ten-odd megabytes; a folder of that name is written "./stdlib");
            a file; a folder, searched recursively without hidden folders and symbolic links to folders; a glob
            ("**" recursive) - suffixes .txt .md .py .jsonl .parquet, in any case, others in a folder are passed over;
            "hf:NAME[:CONFIG]": split "train" of a Hugging Face dataset, a local folder or on the hub. The prefix is
            required, so that a mistyped path never reaches the network.

    Raises:
        DataError: the source does not exist, cannot be read or holds no file of an accepted suffix.

    Example:
        >>> found = listing("stdlib")
        >>> found.files == tuple(sorted(found.files)) and found.text_bytes > 5e6
        True
        >>> listing("no/such/folder")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        headway.data.sources.DataError: source 'no/such/folder' does not exist; accepted: 'stdlib', a file, ...
    """
    if not isinstance(source, str | os.PathLike) or not isinstance(os.fspath(source), str):
        raise DataError(f"source must be {ACCEPTED}, got {source!r}")
    name = os.fspath(source)
    if not name.strip() or "\0" in name:
        raise DataError(f"source must be {ACCEPTED}, got {name!r}")
    if name == "stdlib":
        return _standard_library()
    if name.startswith("hf:"):
        return _dataset(name)
    path = Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown user
    try:
        status = path.stat()
    except UnicodeEncodeError as error:
        raise _unreadable(ascii(name), error) from error
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL):
            raise _unreadable(path, error) from error
        if glob.has_magic(name):
            return _glob(name, path)
        # Only a name that could be one on the hub is worth the hint.
        hub_like = re.fullmatch(HUB_NAME, name) and not name.lower().endswith(SUFFIXES)
        hint = f" (for a dataset on the Hugging Face hub write 'hf:{name}')" if hub_like else ""
        raise DataError(f"source {name!r} does not exist; accepted: {ACCEPTED}{hint}") from error
    if stat.S_ISDIR(status.st_mode):
        return Listing(name, path, _some(name, _walk(path, SUFFIXES)))
    if not stat.S_ISREG(status.st_mode) or path.suffix.lower() not in SUFFIXES:
        raise DataError(f"source {name!r} is not a file that can be read as text; accepted: {ACCEPTED}")
    return Listing(name, path.parent, (FileEntry(path.name, status.st_size, status.st_mtime_ns),))


def documents(
    source: str | os.PathLike[str] | Listing,
    text_field: str = "text",
    *,
    report: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Read the documents of `source` one after another, in a fixed order and in bounded memory.

    A text file is a document, and so is the field `text_field` of every row of a .jsonl or .parquet file or of a
    dataset. Longer ones than `Listing.piece_characters` are cut at line ends into several. Documents of white space
    only and rows whose text is null are left out; lone surrogates, which are not text, become U+FFFD. Files that
    are not UTF-8 or contain NUL bytes are skipped and their number is reported once at the end.

    Args:
        source: see `listing`; or a listing made before.
        text_field: the field that holds the text of a row.
        report: receives the line about skipped files; default the logger "headway.data".

    Raises:
        DataError: see `listing`; a file cannot be read or parsed; a row has no such field; nothing of it is text.

    Example:
        >>> next(documents("stdlib"))[3:22]
        'Record of phased-in'
    """
    found = source if isinstance(source, Listing) else listing(source)
    skipped: list[str] = []
    empty = True
    for text in _texts(found, text_field, skipped):
        for piece in _pieces(_without_surrogates(text), found.piece_characters):
            if not piece.isspace():
                empty = False
                yield piece
    if empty and skipped and len(skipped) == len(found.files):
        what = f"{skipped[0]!r} is" if len(skipped) == 1 else f"all of its {len(skipped)} files are"
        raise DataError(f"source {found.source!r} holds no text: {what} binary or not UTF-8")
    if empty:
        raise DataError(f"source {found.source!r} holds no text: it is empty")
    if skipped:
        message = f"skipped {len(skipped)} of {len(found.files)} files that are not UTF-8 text (first: {skipped[0]!r})"
        (report or logger.warning)(message)


def _unreadable(path: str | os.PathLike[str], error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return DataError(f"cannot read {os.fspath(path)!r}: {reason}")


def _some(name: str, files: Iterable[FileEntry]) -> tuple[FileEntry, ...]:
    found = tuple(sorted(files))
    if not found:
        raise DataError(f"source {name!r} holds no file of {' '.join(SUFFIXES)}")
    return found


def _walk(
    root: Path, suffixes: tuple[str, ...], without: frozenset[str] = frozenset(), inside: str = ""
) -> Iterator[FileEntry]:
    try:
        with os.scandir(root / inside) as entries:
            for entry in entries:
                path = inside + entry.name
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith(".") and entry.name not in without:
                        yield from _walk(root, suffixes, without, path + "/")
                elif entry.name.lower().endswith(suffixes) and entry.is_file():
                    status = entry.stat()
                    yield FileEntry(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise _unreadable(root / inside, error) from error


def _standard_library() -> Listing:
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(sorted(_walk(root, (".py",), NOT_THE_LIBRARY))) if root.is_dir() else ()
    if not files:
        raise DataError(f"source 'stdlib': this interpreter has no Python files in {str(root)!r}; name another source")
    return Listing("stdlib", root, files)


def _glob(name: str, pattern: Path) -> Listing:
    root = Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    files = []
    for match in glob.iglob(str(pattern), recursive=True):
        if match.lower().endswith(SUFFIXES) and os.path.isfile(match):
            try:
                status = os.stat(match)
            except OSError as error:
                raise _unreadable(match, error) from error
            files.append(FileEntry(Path(match).relative_to(root).as_posix(), status.st_size, status.st_mtime_ns))
    return Listing(name, root, _some(name, files))


def _dataset(name: str) -> Listing:
    reference = name[len("hf:") :]
    for dataset, config in ((reference, None), tuple(reference.rpartition(":")[::2])):
        root = Path(os.path.expanduser(dataset))
        if dataset and os.path.isdir(root):
            files = tuple(sorted(_walk(root, ("",))))
            if not files:
                raise DataError(f"source {name!r}: the folder {dataset!r} is empty")
            return Listing(name, root, files, (str(root), config))
    dataset, _, config = reference.partition(":")
    if not re.fullmatch(HUB_NAME, dataset):
        raise DataError(f"source {name!r} names neither a folder nor a dataset on the hub; accepted: {ACCEPTED}")
    return Listing(name, None, (), (dataset, config or None))


def _texts(found: Listing, text_field: str, skipped: list[str]) -> Iterator[str]:
    if found.dataset is not None:
        yield from _dataset_texts(found, text_field)
        return
    assert found.root is not None
    for entry in found.files:
        path = found.root / entry.path
        try:
            if path.suffix.lower() == ".parquet":
                yield from _parquet_texts(path, text_field)
            elif not _is_utf8(path):
                skipped.append(entry.path)
            elif path.suffix.lower() == ".jsonl":
                yield from _jsonl_texts(path, text_field)
            else:
                with path.open(encoding="utf-8-sig", newline="") as file:
                    yield from _read_pieces(file, found.piece_characters)
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(path, error) from error


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while block := file.read(SCAN_BYTES):
                if b"\0" in block:
                    return False
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _read_pieces(file: TextIO, characters: int) -> Iterator[str]:
    # The rest of the line is bounded too: a file may be a single line.
    while piece := file.read(characters) + file.readline(characters):
        yield piece


def _pieces(text: str, characters: int) -> Iterator[str]:
    # A piece of a text file comes back as it is: it may exceed the length by the rest of its line.
    if len(text) <= 2 * characters:
        if text:
            yield text
    else:
        yield from _read_pieces(io.StringIO(text, newline=""), characters)


def _without_surrogates(text: str) -> str:
    return text if text.isascii() else SURROGATES.sub("\ufffd", text)


def _field(row: Any, text_field: str, where: str) -> str | None:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object with a field {text_field!r}, got {_shortened(row)}")
    if text_field not in row:
        names = ", ".join(_shortened(name) for name in list(row)[:8]) or "none"
        raise DataError(f"{where}: no field {text_field!r}; the row's fields: {names}; name one with text_field")
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: the field {text_field!r} must be a string, got {_shortened(text)}")
    return text


def _shortened(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _jsonl_texts(path: Path, text_field: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        number = 0
        while line := file.readline(LONGEST_ROW):
            number += 1
            where = f"{str(path)!r} line {number}"
            if len(line) == LONGEST_ROW:
                raise DataError(f"{where}: a row must be shorter than {LONGEST_ROW >> 20} Mi characters")
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {error}") from error
            text = _field(row, text_field, where)
            if text is not None:
                yield text


def _parquet_texts(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f'reading {str(path)!r} needs pyarrow: pip install "headway[data]"') from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                _field(dict.fromkeys(names), text_field, repr(str(path)))
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
                for row in batch.to_pylist():
                    text = _field(row, text_field, repr(str(path)))
                    if text is not None:
                        yield text
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError, NotImplementedError) as error:
        raise DataError(f"cannot read {str(path)!r} as parquet: {error}") from error


def _dataset_texts(found: Listing, text_field: str) -> Iterator[str]:
    assert found.dataset is not None
    try:
        import datasets
    except ImportError as error:
        raise DataError(f'reading {found.source!r} needs datasets: pip install "headway[data]"') from error
    name, config = found.dataset
    try:
        rows = iter(datasets.load_dataset(name, config, split="train", streaming=True))
    except Exception as error:  # the loaders of datasets raise whatever their formats raise
        raise DataError(f"cannot load split 'train' of {found.source!r}: {error or type(error).__name__}") from error
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(f"cannot read {found.source!r}: {error or type(error).__name__}") from error
        text = _field(row, text_field, repr(found.source))
        if text is not None:
            yield text
