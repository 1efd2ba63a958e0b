"""Tokenised rows on disk, cached under a hash of everything they depend on and memory-mapped by every process and later run.

A cache is a folder of Arrow IPC files, one from each process that tokenised. Examples are dataclasses: each of their fields is
a column, and `chosen.input_ids` is the field of a field. Every record batch carries the encoder's counts up to there.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from filelock import FileLock

from ftcore import __version__
from ftcore.data.formats import Row
from ftcore.data.tokens import Encoder
from ftcore.errors import StorageError
from ftcore.files import PACKAGE, code_hash, home
from ftcore.machine.processes import in_processes

# With fewer rows, tokenising is quicker than looking for the cache.
WORTH_KEEPING = 2000
CHUNK = 1000
# With fewer rows for each, another process takes longer to start than it saves.
ROWS_OF_A_WORKER = 10_000
Encode = Callable[[list[Row]], list[Any]]


class Stored(Sequence[Any]):
    """The examples of a folder, each made when it is asked for. `counts` are those of the encoder that tokenised them.

    Raises `StorageError` when the folder is damaged.
    """

    def __init__(self, folder: Path, kind: type) -> None:
        self.table, self.counts = _read(folder, kind)
        self.make_example = _maker(kind, self.table)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[number] for number in range(*k.indices(len(self)))]
        if not 0 <= k < len(self):
            raise IndexError(k)
        return self.make_example(k)

    def lengths(self) -> list[int]:
        """Number of tokens of each example."""
        sides = [self.table[path] for path in self.table.column_names if path.rpartition(".")[2] == "input_ids"]
        return np.max([np.concatenate([np.diff(part.offsets) for part in side.chunks]) for side in sides], 0).tolist()


def stored(rows: list[Row], encode: Encode, encoder: Encoder, settings: Any) -> Sequence[Any]:
    """`encode(rows)`, read from disk when it was computed before. `settings`: what else it depends on, as JSON."""
    fast = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if len(rows) < WORTH_KEEPING or fast is None:
        return encode(rows)
    folder, before = home() / "rows" / _key(rows, encoder, fast.to_str(), settings), encoder.counts.copy()
    first = encode(rows[:CHUNK])
    encoder.counts.clear()
    if not first:  # no example that tells the type
        return encode(rows)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # of processes that start together, one tokenises for all
        if not folder.is_dir():
            _make(folder, type(first[0]), rows, encode, encoder)
    found = Stored(folder, type(first[0]))
    encoder.counts.clear()
    encoder.counts.update(before + found.counts)
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
    """Write beside the target, then rename. Several processes divide many rows among them, where there are cores for it."""
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix="partial-"))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    count = max(1, min(cores, len(rows) // ROWS_OF_A_WORKER))

    def write(k: int) -> None:
        encoder.counts.clear()
        own = rows[len(rows) * k // count : len(rows) * (k + 1) // count]
        _write(partial / f"{k}-of-{count}.arrow", kind, own, encode, encoder)

    try:
        in_processes(write, count) if count > 1 else write(0)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(file: Path, kind: type, rows: list[Row], encode: Encode, encoder: Encoder) -> None:
    import pyarrow  # not at the top: it starts a thread, and a sweep's jobs are forked from a process without threads

    schema = _schema(kind)
    with file.open("wb") as content, pyarrow.ipc.new_file(content, schema) as writer:
        for k in range(0, len(rows), CHUNK):
            chunk = encode(rows[k : k + CHUNK])
            columns = [list(map(_text_of_dict, map(attrgetter(path), chunk))) for path in schema.names]
            writer.write_batch(pyarrow.record_batch(columns, schema), {"counts": json.dumps(encoder.counts)})


def _text_of_dict(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value


def _read(folder: Path, kind: type) -> tuple[Any, Counter[str]]:
    """All files as one Arrow table, and what the encoder counted. Raises `StorageError` for damage."""
    import pyarrow

    count = len(os.listdir(folder))
    try:
        paths = [str(folder / f"{k}-of-{count}.arrow") for k in range(count)]
        files = [pyarrow.ipc.open_file(pyarrow.memory_map(path)) for path in paths]
        table = pyarrow.concat_tables([file.read_all() for file in files])
        table.validate(full=True)  # otherwise a wrong offset would be read beyond the file
        if table.schema != _schema(kind):
            raise ValueError
        return table, sum(map(_counts, files), Counter())
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        # An error of the operating system is no damage. Arrow's own OSErrors have no number.
        if getattr(error, "errno", None) not in (None, errno.ENOENT):
            raise
        raise StorageError(f"{folder} is damaged. Delete it; its rows will be tokenised again.") from None


def _counts(file: Any) -> Counter[str]:
    """What the encoder had counted when it wrote a file's last batch."""
    last = file.get_batch_with_custom_metadata(file.num_record_batches - 1)
    return Counter(json.loads(last.custom_metadata[b"counts"]))


def _schema(kind: type) -> Any:
    """The Arrow schema of a class of examples."""
    import pyarrow as pa

    types: dict[Any, Any] = {
        str: pa.string(),
        dict: pa.string(),
        int: pa.int64(),
        float: pa.float64(),
        bool: pa.bool_(),
    }
    types |= {list[int]: pa.list_(pa.int32()), list[bool]: pa.list_(pa.bool_())}
    return pa.schema([(path, types[hint]) for path, hint in _fields(kind).items()])


def _fields(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type, for each field that is not a dataclass itself."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found |= _fields(hint, f"{prefix}{name}.") if is_dataclass(hint) else {prefix + name: _plain(hint)}
    return found


def _plain(hint: Any) -> Any:
    """A type without None, and dict without the types of its keys and values.

    >>> _plain(list[int] | None), _plain(dict[str, str])
    (list[int], <class 'dict'>)
    """
    if NoneType in get_args(hint):
        (hint,) = (option for option in get_args(hint) if option is not NoneType)
    return dict if get_origin(hint) is dict else hint


def _maker(kind: Any, table: Any, prefix: str = "") -> Callable[[int], Any]:
    """A function that makes example `k` of a table."""
    values: dict[str, Callable[[int], Any]] = {}
    for name, hint in get_type_hints(kind).items():
        inner, path = is_dataclass(hint), prefix + name
        values[name] = _maker(hint, table, f"{path}.") if inner else _reader(table[path], _plain(hint))
    return lambda k: kind(**{name: value(k) for name, value in values.items()})


def _reader(column: Any, hint: Any) -> Callable[[int], Any]:
    if hint is dict:
        return lambda k: (text := column[k].as_py()) and json.loads(text)
    return lambda k: column[k].as_py()
