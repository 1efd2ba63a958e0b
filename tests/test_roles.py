"""What a config key is for is said where it is declared; everything that treats keys differently follows it."""

import pytest

from ftcore.config.compose import load_config, of_run
from ftcore.config.options import options
from ftcore.config.roles import keys_of, may_stand_in_files, role_of, top_roles
from ftcore.config.tree import flatten
from ftcore.models.foundation import load_run
from ftcore.run_folder import Run
from ftcore.runs.stages import folder_of, stage_config
from ftcore.settings import CHOSEN, RULES
from tests.conftest import FAST

WORDS = [*FAST, "hardware=cpu", "checkpoints.every=2"]
# What makes a data option that needs a file of the user's own, or a source, compose.
NEEDS = {
    "jsonl": ["data.path=rows.jsonl"],
    "mixture": ["data.sources.a={path: rows.jsonl, columns: {}, weight: 1, max_rows: null}"],
}


def test_every_top_level_key_has_a_role():
    assert {key for key, role in top_roles().items() if role.kind not in RULES} == set()


@pytest.mark.parametrize("group", CHOSEN)
def test_every_key_of_every_option_has_a_role(group):
    for option in options(group):
        config = load_config(["model=tiny", f"{group}={option}", *NEEDS.get(option, [])])
        for key, _ in flatten(config):
            assert role_of(key, config).kind in RULES, key


@pytest.mark.parametrize(
    ("key", "kind", "path"),
    [
        ("hardware.precision", "result", None),
        ("hardware.devices", "machine", None),
        ("logger.project", "reporting", None),
        ("logger.entity", "place", None),
        ("data.path", "rows", "rows"),
        ("data.records.text.train", "rows", "rows"),
        ("data.max_length", "result", None),
        ("model.path", "result", "weights"),
        ("model.chat_template", "result", "text"),
        ("retention.text", "result", "text"),
        ("method.policy", "result", "weights"),
        ("export.format", "command", None),
    ],
)
def test_a_key_inside_a_group_has_the_role_of_the_group_unless_it_says_otherwise(key, kind, path):
    role = role_of(key, load_config(["model=tiny", "method=rlhf"]))
    assert (role.kind, role.path) == (kind, path)


def test_what_belongs_to_the_command_is_never_in_the_config_of_a_run(ftcore):
    config = load_config(["model=tiny"])
    assert set(config) - set(of_run(config)) == set(keys_of("command")) >= {"verb", "run", "resume", "export", "trust"}


def test_a_file_may_not_say_what_only_a_person_says():
    refused = ("verb", "run", "resume", "trust", "dry_run", "export.format", "output_dir", "choices.model")
    assert not any(map(may_stand_in_files, (*refused, "hardware.slurm.additional.constraint")))
    assert all(map(may_stand_in_files, ("seed", "method.lr", "logger.entity", "hardware.slurm.partition", "private")))


@pytest.fixture
def stopped(ftcore, monkeypatch):
    """A run that ended at its third step."""
    monkeypatch.setenv("FTCORE_FAULTS", "raise step=3")
    with pytest.raises(RuntimeError):
        ftcore(*WORDS, "max_steps=5")
    monkeypatch.delenv("FTCORE_FAULTS")


def test_another_precision_is_refused_when_a_run_goes_on(fails, stopped):
    message = fails(2, *WORDS, "max_steps=5", "resume=auto", "hardware.precision=bf16-true")
    assert "hardware.precision: 32-true -> bf16-true" in message


def test_a_profile_may_be_asked_for_when_a_run_goes_on(ftcore, stopped):
    outcome = ftcore(*WORDS, "max_steps=6", "resume=auto", "profile=true", "name=sft-medical-tiny", "hang_timeout=900")
    assert outcome.status == 0, outcome.err
    assert (outcome.folder / "profile.txt").is_file() and len(outcome.metrics) == 6


def test_precision_counts_in_the_key_of_a_stage_and_other_hardware_does_not():
    def folder(*words):
        config = load_config(["model=tiny", "method=rlhf", *words])
        return folder_of(stage_config(config, "policy", ["method=sft"]))

    made = folder("hardware=cpu")
    assert made == folder("hardware=ddp_2cpu") == folder("hardware=cpu", "logger=none", "name=other")
    assert made == folder("hardware=cpu", "model.shape={model_type: llama}")  # only planning reads it
    assert made != folder("hardware=cpu", "hardware.precision=bf16-mixed")


def test_a_run_from_before_there_was_a_later_key_goes_on_and_is_loaded(ftcore, stopped, tmp_path):
    run = Run.named(tmp_path / "runs" / "sft-medical-tiny")[0]
    config = {**run.config, "model": {key: value for key, value in run.config["model"].items() if key != "shape"}}
    run.write_config(config)
    assert ftcore(*WORDS, "max_steps=5", "resume=auto").status == 0
    run.write_config(config)
    assert load_run(run)[1] == config
    assert ftcore("eval", f"run={run}", "hardware=cpu").status == 0
