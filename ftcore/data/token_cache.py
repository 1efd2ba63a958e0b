"""Tokenised rows on disk: made once, mapped into memory by every process and later run, kept by all that they depend on.

Examples are dataclasses; each of their fields becomes one flat array with the places where its values end.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass
from itertools import accumulate, chain
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
from filelock import FileLock

from ftcore import __version__
from ftcore.data.formats import Row
from ftcore.data.tokens import Encoder
from ftcore.errors import StorageError
from ftcore.files import PACKAGE, code_hash, home
from ftcore.machine.processes import in_processes

# With fewer rows, tokenising is quicker than looking for it.
WORTH_KEEPING = 2000


CHUNK = 1000


# With fewer rows, another process takes longer to start than it saves.
ROWS_OF_A_WORKER = 10_000


INDEX = "index.json"


Encode = Callable[[list[Row]], list[Any]]


# How a field's values are stored, by its type: array code for writing, dtype for reading.
CODES = {str: ("B", np.uint8), int: ("q", np.int64), float: ("d", np.float64), bool: ("b", np.bool_)}


ITEMS: dict[Any, Callable[[Any], Any]] = {str: str.encode, dict: lambda v: json.dumps(v).encode(), list: lambda v: v}


LISTS = {int: ("i", np.int32), bool: ("b", np.bool_)}


class Stored(Sequence[Any]):
    """Examples of a folder, made when they are asked for. `counts` are those of the encoder that made them."""

    def __init__(self, folder: Path, kind: type) -> None:
        index = json.loads((folder / INDEX).read_text())
        self.kind, self.size, self.counts = kind, index["size"], index["counts"]
        self.fields = (
            {path: _Read(folder, path, hint, self.size) for path, hint in _leaves(kind).items()} if self.size else {}
        )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[number] for number in range(*k.indices(self.size))]
        if not 0 <= k < self.size:
            raise IndexError(k)
        return self._made(self.kind, "", k)

    def lengths(self) -> list[int]:
        """Number of tokens of each example."""
        sides = [path for path in self.fields if path.rpartition(".")[2] == "input_ids"]
        return np.max([np.diff(self.fields[path].ends, prepend=0) for path in sides], axis=0).tolist()

    def _made(self, kind: Any, prefix: str, k: int) -> Any:
        hints = get_type_hints(kind)
        return kind(
            **{
                field.name: self._made(hints[field.name], f"{prefix}{field.name}.", k)
                if is_dataclass(hints[field.name])
                else self.fields[prefix + field.name].value(hints[field.name], k)
                for field in fields(kind)
            }
        )


def stored(rows: list[Row], encode: Encode, encoder: Encoder, settings: Any) -> Sequence[Any]:
    """`encode(rows)`, from disk where it was made before. `settings`: what else it depends on, as JSON."""
    fast = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if len(rows) < WORTH_KEEPING or fast is None:
        return encode(rows)
    folder, before = home() / "rows" / _key(rows, encoder, fast.to_str(), settings), encoder.counts.copy()
    first = encode(rows[:CHUNK])
    encoder.counts.clear()
    if not first:  # nothing to know the type by
        return encode(rows)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # of several processes that start together one tokenises, for all
        if not (folder / INDEX).is_file():
            _make(folder, type(first[0]), rows, encode, encoder)
    try:
        found = Stored(folder, type(first[0]))
    except (ValueError, LookupError, TypeError):
        raise StorageError(f"{folder} is damaged. Delete it: its rows are tokenised again.") from None
    encoder.counts.clear()
    encoder.counts.update(before + Counter(found.counts))
    return found


def lengths(examples: Sequence[Any]) -> list[int]:
    """Number of tokens of each example."""
    return examples.lengths() if isinstance(examples, Stored) else [len(example) for example in examples]


def _key(rows: list[Row], encoder: Encoder, vocabulary: str, settings: Any) -> str:
    tokenizer, digest = encoder.tokenizer, hashlib.sha256()
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length]
    shape = [asdict(encoder.data)[key] for key in ("max_length", "too_long", "chat")]
    code = code_hash(PACKAGE / "data")
    for part in (__version__, code, vocabulary, tokenizer.chat_template, ids, shape, settings):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()[:32]


def _make(folder: Path, kind: type, rows: list[Row], encode: Encode, encoder: Encoder) -> None:
    """Write beside the target, then rename. Processes share the rows where there are many and cores for it."""
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix="partial-"))
    workers = min(len(os.sched_getaffinity(0)), len(rows) // ROWS_OF_A_WORKER) if sys.platform == "linux" else 1
    bounds = [len(rows) * k // max(workers, 1) for k in range(max(workers, 1) + 1)]

    def write(k: int) -> None:
        (partial / str(k)).mkdir()
        encoder.counts.clear()
        _write(partial / str(k), kind, rows[bounds[k] : bounds[k + 1]], encode, encoder)

    try:
        in_processes(write, workers) if workers > 1 else write(0)
        _joined(partial, [partial / str(k) for k in range(len(bounds) - 1)], kind)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, kind: type, rows: list[Row], encode: Encode, encoder: Encoder) -> None:
    columns = {path: _Written(folder, path, hint) for path, hint in _leaves(kind).items()}
    size = 0
    for k in range(0, len(rows), CHUNK):
        chunk = encode(rows[k : k + CHUNK])
        size += len(chunk)
        for path, column in columns.items():
            column.add(list(map(attrgetter(path), chunk)))
    for column in columns.values():
        column.close()
    (folder / INDEX).write_text(json.dumps({"size": size, "counts": encoder.counts}))


def _joined(folder: Path, parts: list[Path], kind: type) -> None:
    """One folder of several: values one after the other, and where they end counted on."""
    for path in _leaves(kind):
        end = 0
        with (folder / f"{path}.values").open("wb") as values, (folder / f"{path}.ends").open("wb") as ends:
            for part in parts:
                with (part / f"{path}.values").open("rb") as own:
                    shutil.copyfileobj(own, values)
                marked = np.fromfile(part / f"{path}.ends", np.int64)
                ends.write(np.where(marked < 0, marked - end, marked + end).tobytes())
                end += max(-marked[-1] - 1, marked[-1]) if len(marked) else 0
    found = [json.loads((part / INDEX).read_text()) for part in parts]
    counts = sum((Counter(one["counts"]) for one in found), Counter())
    (folder / INDEX).write_text(json.dumps({"size": sum(one["size"] for one in found), "counts": counts}))
    for part in parts:
        shutil.rmtree(part)


class _Written:
    """One field's values on their way to a file."""

    def __init__(self, folder: Path, path: str, hint: Any) -> None:
        self.values, self.code, self.kind = (folder / f"{path}.values").open("wb"), _code(hint)[0], _plain(hint)
        self.ends, self.file, self.end = array("q"), folder / f"{path}.ends", 0

    def add(self, values: list[Any]) -> None:
        """Append values; None takes no room and is told from an empty one by its negative end."""
        as_items = ITEMS.get(self.kind, lambda value: (value,))
        items = [() if value is None else as_items(value) for value in values]
        if self.code in "bB":
            self.values.write(b"".join(map(bytes, items)))
        else:
            array(self.code, chain.from_iterable(items)).tofile(self.values)
        ends = list(accumulate(map(len, items), initial=self.end))
        self.ends.extend(-end - 1 if value is None else end for value, end in zip(values, ends[1:], strict=True))
        self.end = ends[-1]

    def close(self) -> None:
        """Write where the values end."""
        self.values.close()
        self.file.write_bytes(self.ends.tobytes())


class _Read:
    """One field's values, mapped into memory."""

    def __init__(self, folder: Path, path: str, hint: Any, size: int) -> None:
        marked = np.fromfile(folder / f"{path}.ends", np.int64)
        self.none, self.ends = marked < 0, np.where(marked < 0, -marked - 1, marked)
        self.folder, self.path = folder, path
        held = (folder / f"{path}.values").stat().st_size // np.dtype(_code(hint)[1]).itemsize
        if len(marked) != size or (np.diff(self.ends, prepend=0) < 0).any() or self.ends[-1] != held:
            raise ValueError(path)
        self.values: np.ndarray | None = None

    def value(self, hint: Any, k: int) -> Any:
        """Value `k` as the type that the field has."""
        if self.none[k]:
            return None
        if self.values is None:
            file, dtype = self.folder / f"{self.path}.values", _code(hint)[1]
            self.values = np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)
        found = self.values[(self.ends[k - 1] if k else 0) : self.ends[k]]
        kind = _plain(hint)
        if kind in (str, dict):
            text = found.tobytes().decode()
            return text if kind is str else json.loads(text)
        return found.tolist() if kind is list else found[0].item()


def _leaves(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of each field that is no dataclass itself."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found |= _leaves(hint, f"{prefix}{name}.") if is_dataclass(hint) else {prefix + name: hint}
    return found


def _plain(hint: Any) -> Any:
    """`list` of `list[int] | None`."""
    options = [option for option in get_args(hint) if option is not type(None)]
    inner = options[0] if type(None) in get_args(hint) else hint
    return getattr(inner, "__origin__", inner)


def _code(hint: Any) -> tuple[str, Any]:
    kind = _plain(hint)
    if kind is not list:
        return CODES[str if kind is dict else kind]
    inner = next(option for option in (hint, *get_args(hint)) if getattr(option, "__origin__", None) is list)
    return LISTS[get_args(inner)[0]]
