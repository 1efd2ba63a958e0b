"""What a model was made from, in words that others can use: names of the hub, of a package or of a folder, never a path."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ftcore.errors import printable
from ftcore.files import SCHEME
from ftcore.models.weights import weights_folder
from ftcore.run_folder import Run
from ftcore.settings import Model


@dataclass(frozen=True)
class Base:
    """The weights that a model was made from, as others can find them; never a path of this machine.

    Args:
        name: of the hub, the package (`name==version`), the folder, or what ships with ftcore.
        revision: the commit of the hub.
        kind: where it comes from: hub, package, folder or ftcore.
        license: what its own card says: `license`, `license_name`, `license_link`.
    """

    name: str
    revision: str | None = None
    kind: str = "folder"
    license: dict[str, str] = field(default_factory=dict)


def base_of(model: Model) -> Base:
    """What a model node begins with. Of an earlier run, it is what that run began with."""
    if (run := Run.at(model["path"])) and run.config:
        return base_of(run.config["model"])
    folder, package = weights_folder(model).resolve(), model["package"]
    if model["path"] is None and package:
        terms = {"license": package["license"]} if "license" in package else {}
        return Base(package["requirement"], None, "package", terms)
    if str(model["path"]).startswith(SCHEME):
        return Base(str(model["path"]), None, "ftcore")
    if folder.parent.name == "snapshots":  # of the hub's cache: models--<owner>--<name>/snapshots/<commit>
        name = folder.parents[1].name.removeprefix("models--").replace("--", "/")
        return Base(name, folder.name, "hub", _license_of(folder))
    run = next(
        filter(None, (Run.at(str(above)) for above in folder.parents[:2])), None
    )  # <run>/model, <run>/export/merged
    return Base(run.name if run else folder.name, None, "folder", _license_of(folder))


def _license_of(folder: Path) -> dict[str, str]:
    """What the model card in a folder of weights says of its licence; {} when it says nothing."""
    from huggingface_hub import metadata_load

    with suppress(Exception):  # anybody may have written it
        terms = metadata_load(folder / "README.md") or {}
        return {key: printable(str(terms[key])) for key in ("license", "license_name", "license_link") if key in terms}
    return {}
