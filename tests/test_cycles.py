"""Cycles of fine-tuning, each on the run before and on people's votes: what a summary says of them, packed and replayed."""

import hashlib
import json
import shutil

import pytest

from ftcore.cli.command import run_command
from ftcore.data.feedback import Feedback
from ftcore.data.votes import as_lines
from ftcore.files import PACKAGE, write_lines
from ftcore.models.weights import weights_hashes
from ftcore.run_folder import Run
from ftcore.sharing.cycles import load_cycle, read_cycles, words_of_each
from tests.conftest import FAST, latest

MEDICAL = PACKAGE / "datasets/medical"
TINY = [*FAST, "hardware=cpu", "max_steps=2", "global_batch_size=4", "retention.weight=0", "evaluate.max_rows=2"]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def votes(count):
    """Votes on answers to training questions, the right one now on the left and now on the right."""
    for number, pair in enumerate(lines(MEDICAL / "preference.train.jsonl")[:count]):
        choice = ("left", "right")[number % 2]
        left, right = [pair["chosen"], pair["rejected"]][:: 1 if choice == "left" else -1]
        yield {
            "id": f"{number:04x}", "time": float(number), "rater": "ann", "purpose": "teach", "prompt": pair["prompt"],
            "left": left, "right": right, "authors": ["sft", "sft/base"], "choice": choice, "text": None, "note": None,
        }  # fmt: skip


def train(*words):
    """The folder of a new run."""
    before = {run.folder for run in Run.below(Run("runs").folder)}
    assert run_command(latest(*TINY, *words)) == 0
    (made,) = {run.folder for run in Run.below(Run("runs").folder)} - before
    return made.resolve()


@pytest.fixture(scope="module")
def cycles(tmp_path_factory):
    """Three runs, each on the one before: on shipped rows, and twice on votes."""
    folder = tmp_path_factory.mktemp("cycles")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for name, count in (("first", 12), ("second", 24)):
            write_lines(folder / f"{name}.jsonl", votes(count))
        shutil.copyfile(MEDICAL / "preference.test.jsonl", folder / "held_out.jsonl")
        made = [train("method=sft")]
        for name in ("first", "second"):
            rows = ["data=feedback", f"data.path={name}.jsonl", "data.splits.test=held_out.jsonl"]
            made.append(train("method=dpo", *rows, f"name={name} votes", f"model.path={made[-1]}"))
        assert run_command(["pack", f"run={made[-1]}", "output_dir=packed"]) == 0
    return made


@pytest.fixture
def place(cycles):
    """The folder that they were made in."""
    return cycles[0].parents[2]


@pytest.fixture
def packed(place, tmp_path):
    """A copy of their package that a test may change."""
    return shutil.copytree(place / "packed", tmp_path / "received")


def test_a_summary_says_what_a_run_was_made_from(cycles, place):
    base, first, second = (Run(folder).summary for folder in cycles)
    assert base["parents"] == [] and "votes" not in base
    (parent,) = second["parents"]
    assert (parent["run"], parent["name"]) == (str(cycles[1]), "first votes")
    assert first["parents"][0]["name"] == "sft-medical-tiny"
    assert parent["weights"] != first["parents"][0]["weights"]
    file = place / "second.jsonl"
    assert second["votes"] == {"path": str(file), "sha256": sha256(file)}


def test_a_package_holds_every_cycle_with_its_votes_and_no_place_of_this_machine(place, packed):
    names = {str(file.relative_to(packed)) for file in packed.rglob("*") if file.is_file()}
    recipe, rows = ["recipe.yaml", "recipe.lock.json"], ["votes.jsonl", "held_out.jsonl"]
    first = [f"1-sft-medical-tiny/{name}" for name in recipe]
    assert names == {*first, *(f"2-first-votes/{name}" for name in recipe + rows), *recipe, *rows, "cycles.json"}
    listed = json.loads((packed / "cycles.json").read_text())["cycles"]
    assert [cycle["folder"] for cycle in listed] == ["1-sft-medical-tiny", "2-first-votes", "."]
    assert listed[1]["files"]["votes.jsonl"] == sha256(place / "first.jsonl")
    text = (packed / "recipe.yaml").read_text()
    assert "# Own: the run of 2-first-votes, SHA-256 " in text and 'give model.path=<path>.\n  path: "???"' in text
    assert "# python -m ftcore replay recipe=recipe.yaml expect=true" in text  # nothing is left to give
    assert not any(str(place) in file.read_text() for file in packed.rglob("recipe*"))


def test_a_lock_names_parents_and_votes_by_hash(cycles, packed):
    lock, summary = json.loads((packed / "recipe.lock.json").read_text()), Run(cycles[-1]).summary
    assert lock["parents"] == [summary["parents"][0]["weights"]] and lock["votes"] == summary["votes"]["sha256"]
    assert lock["model"]["weights"] == weights_hashes({"path": str(cycles[1]), "random_weights": False})
    first = json.loads((packed / "1-sft-medical-tiny/recipe.lock.json").read_text())
    assert (first["parents"], first["votes"]) == ([], None)


def test_a_replay_elsewhere_makes_all_runs_again_with_the_same_scores(
    cycles, place, packed, ftcore, tmp_path, monkeypatch
):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path / "home"))
    (place / "runs").rename(place / "away")
    try:
        outcome = ftcore("replay", f"recipe={packed / 'recipe.yaml'}", "expect=true", "output_dir=again")
    finally:
        (place / "away").rename(place / "runs")
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("The scores are those of the lock.") == 3 and "Cycle 3 of 3" in outcome.out
    again = [next(iter(Run.below(tmp_path / "again" / Run(folder).config["name"]))) for folder in cycles]
    for before, now in zip(map(Run, cycles), again, strict=True):
        assert [before.summary[side] for side in ("base", "tuned")] == [now.summary[side] for side in ("base", "tuned")]
        assert [p["weights"] for p in before.summary["parents"]] == [p["weights"] for p in now.summary["parents"]]
    assert again[2].config["model"]["path"] == str(again[1].folder)
    assert again[2].config["data"]["path"] == str(packed / "votes.jsonl")


def test_what_was_changed_in_a_package_is_refused_by_name(packed, fails):
    words = ["replay", f"recipe={packed / 'recipe.yaml'}"]
    for name in ("2-first-votes/votes.jsonl", "1-sft-medical-tiny/recipe.yaml", "held_out.jsonl"):
        content = (packed / name).read_bytes()
        (packed / name).write_bytes(content + b"\n")
        assert f"{packed / name} has changed" in fails(2, *words)
        (packed / name).write_bytes(content)
    (packed / "votes.jsonl").rename(packed / "elsewhere.jsonl")
    assert "votes.jsonl is not there" in fails(2, *words)
    (packed / "votes.jsonl").symlink_to("elsewhere.jsonl")
    assert "votes.jsonl is a link" in fails(2, *words)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["cycles"][0].update(folder="../outside"),
        lambda found: found["cycles"][0].update(folder="/1-outside"),
        lambda found: found["cycles"][0].update(folder="2-first-votes"),
        lambda found: found["cycles"][-1].update(folder=".."),
        lambda found: found["cycles"][0]["files"].update({"../votes.jsonl": "0" * 64}),
        lambda found: found["cycles"][0]["files"].update({"recipe.yaml": "no hash"}),
        lambda found: found["cycles"][0].pop("files"),
        lambda found: found["cycles"][0].update(more=1),
        lambda found: found.update(cycles=found["cycles"][-1:]),
        lambda found: found.update(cycles="all"),
        lambda found: found.update(cycles=[1, 2]),
        lambda found: found.update(format=2),
        lambda found: found["cycles"][0]["files"].update({"recipe.yaml": " " * 100_000}),
    ],
)
def test_a_list_of_cycles_that_is_none_or_leads_elsewhere_is_refused(packed, fails, change):
    found = json.loads((packed / "cycles.json").read_text())
    change(found)
    (packed / "cycles.json").write_text(json.dumps(found))
    assert "is not the cycles.json of a package" in fails(2, "replay", f"recipe={packed / 'recipe.yaml'}")


def test_a_list_of_cycles_that_is_no_mapping_or_a_link_is_refused(packed, fails):
    file = packed / "cycles.json"
    for content in ("", "[]", "[" * 100_000, "null", "1"):
        file.write_text(content)
        assert "is not the cycles.json" in fails(2, "replay", f"recipe={packed / 'recipe.yaml'}")
    file.rename(packed / "other.json")
    file.symlink_to("other.json")
    assert "is not the cycles.json" in fails(2, "replay", f"recipe={packed / 'recipe.yaml'}")


def test_what_is_wrong_is_said_before_the_first_cycle_trains(packed, fails, tmp_path):
    words = ["replay", f"recipe={packed / 'recipe.yaml'}", "expect=true"]
    assert "needs scores" in fails(2, *words, "evaluate.enabled=false")
    assert "choose other hardware" in fails(2, *words, "hardware=slurm")
    assert not (tmp_path / "runs").exists()


def test_check_looks_at_every_cycle_with_what_the_package_gives(packed, ftcore, fails):
    outcome = ftcore("check", f"recipe={packed / 'recipe.yaml'}")
    assert outcome.status == 0 and "method=dpo" in outcome.out and str(packed / "votes.jsonl") in outcome.out
    assert "method.beta is not a key" in fails(
        2, "check", f"recipe={packed / 'recipe.yaml'}", "method.beta=1"
    )  # of sft


def test_a_cycle_takes_of_the_command_line_what_the_package_and_no_other_cycle_has(packed):
    cycles = read_cycles(packed / "recipe.yaml")
    base, votes, test, seed = "model.path=base", "data.path=x", "data.splits.test=x", "seed=5"
    assert words_of_each(cycles, [base, seed]) == [[base, seed], [seed], [seed]]
    del cycles[1].files["held_out.jsonl"]  # then its recipe asks for them
    assert words_of_each(cycles, [votes, test]) == [[votes], [test], []]
    config = load_cycle(cycles[1].recipe, cycles[1].given(Run("before")), [test, seed], ())
    assert (config["model"]["path"], config["data"]["splits"]["test"], config["seed"]) == ("before", "x", 5)
    assert config["data"]["path"] == str(packed / "2-first-votes/votes.jsonl")


def test_a_run_that_came_to_other_weights_is_told_before_the_next_begins(packed, ftcore):
    file = packed / "2-first-votes/recipe.lock.json"
    lock = json.loads(file.read_text())
    lock["model"]["weights"] = dict.fromkeys(lock["model"]["weights"], "0" * 64)
    file.write_text(json.dumps(lock))
    listed = json.loads((packed / "cycles.json").read_text())
    listed["cycles"][1]["files"][file.name] = sha256(file)
    (packed / "cycles.json").write_text(json.dumps(listed))
    words = ["replay", f"recipe={packed / 'recipe.yaml'}", "expect=true"]
    refused = ftcore(*words)
    assert refused.status == 4 and "these weights differ: model.weights." in refused.err
    assert ftcore(*words, "tolerance=1e-2").status == 0  # rounding may make them others


def test_private_votes_are_not_packed(cycles, fails, tmp_path):
    run = shutil.copytree(cycles[-1], tmp_path / "private")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("private: false", "private: true"))
    message = fails(2, "pack", f"run={run}", "output_dir=out")
    assert "is private=true and was trained on votes" in message and not (tmp_path / "out").exists()


def test_cycles_that_ask_for_other_files_under_one_key_are_not_packed(ftcore, rows):
    files = [
        rows(*({"prompt": f"What is {k}?", "completion": word} for k in range(40)), name=f"{word}.jsonl")
        for word in ("one", "two")
    ]
    runs = []
    for file in files:
        before = [f"model.path={runs[-1]}", "name=second"] if runs else []
        runs.append(ftcore(*TINY, "data=jsonl", f"data.path={file}", "evaluate.enabled=false", *before).folder)
    refused = ftcore("pack", f"run={runs[-1]}", "output_dir=out")
    assert refused.status == 2 and "data.path is one.jsonl in one cycle and two.jsonl in another" in refused.err


def test_votes_of_a_store_are_hashed_and_packed_as_their_export(tmp_path):
    store = Feedback(tmp_path)
    store.take_in(votes(3))
    write_lines(tmp_path / "export.jsonl", store.exported())
    assert as_lines(store.file) == (tmp_path / "export.jsonl").read_bytes()
    assert len(lines(tmp_path / "export.jsonl")) == 3
