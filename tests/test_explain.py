"""Why a key has its value: who set it, what it replaced, what it may be."""

import subprocess
import sys

import pytest

from ftcore.files import resources


def line_of(file, text):
    lines = (resources() / file).read_text().splitlines()
    return next(k for k, line in enumerate(lines, 1) if line.startswith(text))


def test_value_source_replaced_type_and_meaning(ftcore):
    outcome = ftcore("explain", "key=method.beta", "method=dpo", "method.beta=0.3")
    line = line_of("conf/method/_preference.yaml", "beta:")
    assert outcome.out.splitlines()[:4] == [
        "method.beta = 0.3",
        "  set by     command line, method.beta=0.3",
        f"  replaced   0.1, conf/method/_preference.yaml:{line}",
        "  type       a number above 0",
    ]
    assert "meaning    How strongly" in outcome.out


def test_an_option_replaces_its_base_and_a_recipe_both(ftcore, tmp_path, monkeypatch):
    monkeypatch.setenv("FTCORE_RECIPES", str(tmp_path))
    text = "# @package _global_\ndefaults:\n  - override /method: dpo\nmethod:\n  # Ours.\n  lr: 2.0e-4\n"
    (tmp_path / "ours.yaml").write_text(text)
    told = ftcore("explain", "key=method.lr", "recipes=ours").out
    assert f"set by     {tmp_path / 'ours.yaml'}:6" in told
    sources = [told.index(f"conf/method/{name}.yaml") for name in ("_preference", "_method")]
    assert sources == sorted(sources)
    assert "said there Ours." in told


def test_a_group_is_a_table_of_its_keys(ftcore):
    told = ftcore("explain", "key=checkpoints", "checkpoints.every=7").out
    assert "checkpoints.keep" in told
    assert "checkpoints.every=7" in told


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["key=method.lrr"], "did you mean 'method.lr'?"),
        ([], "explain key=method.lr"),
        (["key=seed", "seed=-1"], "seed must be"),
    ],
)
def test_a_wrong_question_is_answered_with_a_way_out(fails, words, part):
    assert part in fails(2, "explain", *words)


def test_a_key_of_a_run_comes_from_its_config(ftcore, tmp_path):
    import yaml

    from ftcore.config.compose import load_config

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(load_config(["model=tiny", "seed=41"])))
    told = ftcore("explain", "key=seed", f"run={tmp_path}").out
    assert "seed = 41" in told
    assert f"set by     {tmp_path / 'config.yaml'}:" in told


def test_what_the_command_line_chooses_is_not_said_to_come_from_the_run(ftcore, tmp_path):
    import yaml

    from ftcore.config.compose import load_config

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(load_config(["model=tiny", "method=dpo", "adapter.rank=3"])))
    words = ["key=[adapter.rank,method.lr,choices.method,seed]", f"run={tmp_path}", "adapter=rslora", "seed=2"]
    rank, lr, choice, seed = ftcore("explain", *words).out.split("\n\n")
    assert str(tmp_path) not in rank
    assert "set by     conf/adapter/_lora.yaml:" in rank
    assert f"set by     {tmp_path / 'config.yaml'}:" in lr
    assert "conf/method/_preference.yaml:" in lr  # the run's method, not the default one
    assert f"choices.method = dpo\n  set by     {tmp_path / 'config.yaml'}:" in choice
    assert "set by     command line, seed=2" in seed
    assert f"replaced   0, {tmp_path / 'config.yaml'}:" in seed


def test_a_group_says_who_chose_its_option(ftcore):
    line = line_of("recipes/medical_dpo.yaml", "  - override /method")
    told = ftcore("explain", "key=method", "recipes=medical_dpo").out
    assert told.startswith(f"method=dpo  (recipes/medical_dpo.yaml:{line})\n    Direct preference optimisation")
    assert f"conf/method/_preference.yaml:{line_of('conf/method/_preference.yaml', 'lr:')}" in told


def test_null_is_told_as_the_mapping_that_replaced_it(ftcore):
    hub = "data.hub={name: a/b, config: null, revision: main, splits: {}, columns: {}, values: {}}"
    told = ftcore("explain", "key=data.hub.name", hub).out
    assert "data.hub.name = a/b" in told
    assert f"replaced   null, conf/data/_data.yaml:{line_of('conf/data/_data.yaml', 'hub:')}" in told
    assert "type       text" in told


def test_options_of_a_config_dir_are_named_by_their_file(ftcore, tmp_path):
    (tmp_path / "ours" / "method").mkdir(parents=True)
    file = tmp_path / "ours" / "method" / "gentle.yaml"
    file.write_text("defaults: [dpo, _self_]\n\n# Half of it.\nlr: 1.0e-4\n")
    told = ftcore("explain", "key=method.lr", "method=gentle", f"--config-dir={tmp_path / 'ours'}").out
    assert f"set by     {file}:4" in told
    assert "replaced   0.0003, conf/method/_preference.yaml:" in told
    assert "meaning    Half of it." in told


def test_what_ftcore_fills_in_is_said_to_be_its_own(ftcore):
    told = ftcore("explain", "key=name", "model=tiny").out
    assert "name = sft-medical-tiny\n  set by     ftcore" in told


@pytest.mark.parametrize("group", ["model", "adapter", "data", "method", "hardware"])
def test_every_key_has_a_source_and_a_type(ftcore, group):
    from ftcore.config.compose import load_config

    keys = [
        f"{group}.{key}" for key, value in load_config([])[group].items() if not (value and isinstance(value, dict))
    ]
    told = ftcore("explain", f"key=[{','.join(keys)}]").out
    assert told.count("  set by     conf/") == told.count("  type       ") == len(keys)
    assert "anything" not in told
    assert "another value" not in told


def test_it_needs_no_torch():
    code = "import sys; from ftcore.__main__ import run_command as r; r(['explain', 'key=seed']); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()[-1] == "False"
