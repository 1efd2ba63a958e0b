"""Where the files of the package are: conf/ and recipes/ lie beside ftcore/ in a checkout, inside it in a wheel."""

import hashlib
import os
from pathlib import Path

PACKAGE = Path(__file__).parent
SCHEME = "ftcore://"


def resources() -> Path:
    """Folder that holds conf/ and recipes/: the packaged copy if present, else the checkout."""
    packaged = PACKAGE / "resources"
    return packaged if packaged.is_dir() else PACKAGE.parent


def resolve(path: str) -> str:
    """`ftcore://medical/sft.train.jsonl` as the path of that file of ftcore/datasets; other paths with `~` expanded."""
    if path.startswith(SCHEME):
        return str(PACKAGE / "datasets" / path.removeprefix(SCHEME))
    return str(Path(path).expanduser())


def home() -> Path:
    """Folder of what is kept between runs (converted weights): `FTCORE_HOME`, by default ~/.cache/ftcore."""
    return Path(os.environ.get("FTCORE_HOME") or "~/.cache/ftcore").expanduser()


def code_hash(folder: Path) -> str:
    """SHA-256 of the Python files in a folder: what they made before they were changed is not theirs."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
