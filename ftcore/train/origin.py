"""What a run was made from: earlier runs and people's votes, by hash, so that its summary says which cycle it is."""

from ftcore.data.votes import votes_file, votes_hash
from ftcore.models.weights import run_hash
from ftcore.run_folder import Run
from ftcore.settings import Config


def origin(config: Config, run: Run) -> dict[str, object]:
    """The `parents` of a run, with the hash of the weights that each gave, and the `votes` it trains on, if it does."""
    found: dict[str, object] = {"parents": [_parent(parent) for parent in run.parents]}
    if votes := votes_file(config["data"]):
        found["votes"] = {"path": str(votes), "sha256": votes_hash(votes)}
    return found


def _parent(run: Run) -> dict[str, object]:
    name = run.config["name"] if run.config else run.folder.parent.name
    return {"run": str(run), "name": name, "weights": run_hash(run)}
