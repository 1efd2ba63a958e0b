"""The planned network, without weights: config.json and tokenizer where they can be had, else the shape of the model option."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from ftcore.config.yaml_source import read
from ftcore.errors import ModelError
from ftcore.files import resolve, resources
from ftcore.models.foundation import architecture_of
from ftcore.models.weights import CONFIG, from_hub, package_folder
from ftcore.run_folder import Run
from ftcore.settings import Config, Model

STAND_IN = "the model's own tokenizer is not here, so rows are counted with a small one, by which they are longer"


@contextmanager
def without_weights(config: Config) -> Iterator[tuple[Model, list[str]]]:
    """The model node to build the network from, and what has to be known about it.

    Raises `ModelError` when neither config.json nor shape can be had.
    """
    model = _started_from(config["model"])
    with tempfile.TemporaryDirectory(prefix="ftcore-plan-") as folder:
        found, notes = _folder(model), []
        if not found:
            tokenizer = "tiny_encoder" if architecture_of(config) == "MaskedLM" else "tiny"
            found, notes = _stand_in(_shape(config, model), tokenizer, Path(folder)), [STAND_IN]
        yield {**model, "path": str(found), "package": None, "random_weights": True}, notes


def _started_from(model: Model) -> Model:
    """Of an earlier run, the model that its result is one of."""
    if run := Run.at(model["path"]):
        path = {"path": str(run.model)} if (run.model / CONFIG).is_file() else {}
        assert run.config
        return _started_from(cast(Model, {**run.config["model"], **path}))
    return model


def _folder(model: Model) -> Path | None:
    """A folder with config.json and tokenizer; None when they are not here and cannot be fetched."""
    path, package = model["path"], model["package"]
    folder = Path(resolve(path)) if path else package_folder(package) if package else None
    if folder and folder.is_dir():
        return folder
    try:
        return from_hub(path, model["revision"], weights=False) if path else None
    except ModelError:
        return None


def _shape(config: Config, model: Model) -> dict[str, object]:
    """The shape that ships with the chosen option, unless another model is named. Raises `ModelError` when there is none."""
    shape, option = model.get("shape"), resources() / "conf" / "model" / f"{config['choices']['model']}.yaml"
    if shape and (not option.is_file() or read(option).value("path") == model["path"]):
        return shape
    if path := model["path"]:
        from_hub(path, model["revision"], weights=False)  # says why it cannot be had
    raise ModelError("There is nothing to plan from: give model.path=<folder with config.json and tokenizer>.")


def _stand_in(shape: dict[str, object], tokenizer: str, folder: Path) -> Path:
    """A folder with a config.json of that shape and a tokenizer that ships with the project, for rows of any length."""
    shutil.copytree(resolve(f"ftcore://{tokenizer}"), folder, dirs_exist_ok=True)
    file, settings = folder / CONFIG, folder / "tokenizer_config.json"
    ids = {key: value for key, value in json.loads(file.read_text()).items() if key.endswith("_token_id")}
    file.write_text(json.dumps({**shape, **ids}))
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 10**9}))
    return folder
