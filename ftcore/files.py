"""Where files are: conf/ and recipes/ beside ftcore/ in a checkout, inside it in a wheel; what is cached, in FTCORE_HOME."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).parent
SCHEME = "ftcore://"

HEAD = 512  # bytes that tell what a file is
# How files begin that stand for others -> what they are, and what to do.
PLACEHOLDERS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    ((b"version https://git-lfs",), "a Git LFS pointer, not the file", "git lfs pull fetches it"),
    (
        (b"/annex/objects", b"../.git/annex", b".git/annex"),
        "a git-annex pointer, not the file",
        "git annex get fetches it",
    ),
    ((b"<!doctype", b"<html", b"<?xml"), "a web page or XML, not data", "download the file itself"),
)


def placeholder(head: bytes) -> str:
    """What a file is that stands for another, by its first bytes, and what to do; "" when it is the file itself."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((f"{kind}: {advice}" for marks, kind, advice in PLACEHOLDERS if text.startswith(marks)), "")


def resources() -> Path:
    """Folder that holds conf/ and recipes/: the packaged copy if present, else the checkout."""
    packaged = PACKAGE / "resources"
    return packaged if packaged.is_dir() else PACKAGE.parent


def resolve(path: str) -> str:
    """`ftcore://medical/sft.train.jsonl` as the path of that file of ftcore/datasets; other paths with `~` expanded."""
    if path.startswith(SCHEME):
        return str(PACKAGE / "datasets" / path.removeprefix(SCHEME))
    return str(expanded(path))


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` expanded; `~x` stays as it is where nobody is called x, which `Path.expanduser` refuses."""
    return Path(os.path.expanduser(path))


def home() -> Path:
    """Folder of what is kept between runs (converted weights): `FTCORE_HOME`, by default ~/.cache/ftcore."""
    return expanded(os.environ.get("FTCORE_HOME") or "~/.cache/ftcore")


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to, which becomes `file` at the end: others find it whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(file)
    except OSError as error:
        error.filename = error.filename or str(file)  # a full disk names no file
        raise
    finally:
        beside.unlink(missing_ok=True)


def code_hash(folder: Path) -> str:
    """SHA-256 of the Python files in a folder: what they made before they were changed is not theirs."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.rglob("*.py")))).hexdigest()


def to_json(content: object, indent: int | None = None) -> str:
    """JSON of a value; a number that is not finite is null, since JSON has none."""
    try:
        return json.dumps(content, indent=indent, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(finite(content), indent=indent, ensure_ascii=False, default=str)


def finite(value: object) -> object:
    """The value, with null for numbers in it that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(file: Path, content: Mapping[str, object] | list[object]) -> None:
    """Write one JSON document."""
    write_text(file, to_json(content, indent=2) + "\n")


def write_lines(file: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object a line."""
    write_text(file, "".join(to_json(row) + "\n" for row in rows))


def write_text(file: Path, text: str) -> None:
    """Write a whole file. A link is replaced, not followed."""
    with whole_file(file) as beside:
        beside.write_text(text, encoding="utf-8")


def sha256(file: Path) -> str:
    """Hex SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def json_hash(content: object) -> str:
    """SHA-256 of a value as JSON, its keys sorted."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def short_hash(content: object) -> str:
    """First 16 hex digits of the SHA-256 of a JSON value, to name what is cached."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
