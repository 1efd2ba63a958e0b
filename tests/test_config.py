"""The config is checked before anything heavy is imported, and every problem is named with its path and a way out."""

import json
import subprocess
import sys
import time

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from jsonschema import Draft202012Validator

from ftcore.cli.command import run_command
from ftcore.cli.words import read_line
from ftcore.config import editor_schema, schema
from ftcore.config.compose import load_config, read_overrides
from ftcore.config.options import options
from ftcore.config.words import words_of
from ftcore.errors import ConfigError
from ftcore.files import PACKAGE, resources
from ftcore.settings import FILES, GROUPS

CONF = resources() / "conf"
PATHS = {name: ["data.path=x.jsonl"] for name in ("jsonl", "own_jsonl", "qlora_8b_single_gpu", "full_8b_fsdp")}


@pytest.mark.parametrize(
    ("words", "status", "parts"),
    [
        (["method.lrr=3"], 2, ["method.lrr", "did you mean 'lr'"]),
        (["hardware=fsdp_8gpus"], 2, ["did you mean 'fsdp_8gpu'", "Options:"]),
        (["hardwar=cpu"], 2, ["did you mean 'hardware'"]),
        (["method.lr=abc"], 2, ["method.lr", "a number above 0", "'abc'"]),
        (["method.lr=0", "method.betta=1", "seed=-1"], 2, ["3 problems", "method.lr", "method.betta", "seed"]),
        (["data=jsonl"], 2, ["data.path=..."]),
        (["hardware=fsdp_8gpu"], 5, ["needs 8 CUDA devices", "has 0", "hardware=cpu"]),
        (["micro_batch_size=5"], 2, ["5 x 1 = 5", "15 or 20", "1, 2, 4, 8, 16"]),
        (["hardware=ddp_2cpu", "micro_batch_size=16"], 2, ["16 x 2 = 32"]),
        (["name=${nme}"], 2, ["nme", "(at name)"]),
        (["name=${output_dir}", "output_dir=${name}"], 2, ["Recursive"]),
        (["trainer.max_steps=3"], 2, ["trainer.max_steps", "set by ftcore"]),
        (["trainer.devices=2"], 2, ["trainer.devices", "hardware group"]),
        (["model.api_key=abc"], 2, ["model.api_key", "secret"]),
        (["trainer.foo=1"], 2, ["trainer.foo", "lightning.Trainer"]),
        (["global_batch_size=1e1"], 2, ["global_batch_size", "whole number"]),
        (["method.lr=nan"], 2, ["method.lr"]),
        (["max_epochs=inf"], 2, ["max_epochs"]),
        (["seed=99999999999"], 2, ["seed"]),
        (["name=../../x"], 2, ["output_dir"]),
        (["name=."], 2, ["output_dir"]),
        (["name=./"], 2, ["output_dir"]),
        (["global_batch_size=1000000000"], 2, ["at most 1,048,576"]),
        (["max_epochs=1e300"], 2, ["at most 1,000,000"]),
        (["hang_timeout=1e300"], 2, ["at most 100,000,000"]),
        (["method=grpo", "method.clip_high=1e300"], 2, ["method.clip_high", "at most 1e+30"]),
        (["evaluate.max_new_tokens=1000000000"], 2, ["at most 1,048,576"]),
        (["evaluate.max_new_tokens=9000", "model=tiny", "logger=none"], 2, ["the model has room for", "question and answer"]),
        (["adapter.rank=1000000000", "model=tiny", "logger=none"], 2, ["adapter.rank=1,000,000,000", "the highest rank"]),
        (["hydra.run.dir=x"], 2, ["hydra.*"]),
        (["logger=null"], 2, ["Options: mlflow, none"]),
        (["logger=[wandb,tensorboard]"], 2, ["one option", "did you mean logger=wandb_tensorboard?"]),
        (["method=[sft,dpo]", "data={a: 1}"], 2, ["method takes the name of one option. Options: cpo", "data takes"]),
        (["evaluate.probe=nowhere.jsonl"], 2, ["evaluate.probe", "nowhere.jsonl"]),
        (["name=a\udcff"], 2, [r"'name=a\udcff' holds bytes that are no text", "UTF-8"]),
        (["patience=2"], 2, ["keep_best=val/loss"]),
        (["trian"], 2, ["did you mean 'train'"]),
        (["verb=evall"], 2, ["did you mean 'eval'"]),
        (["model=tiny", "chat"], 2, ["'chat' is a verb: it comes first"]),
        (["eval", "chat"], 2, ["'chat' is a verb", "there is one"]),
        (["--multi"], 2, ["--cfg job"]),
        (["--config-dir=/missing"], 2, ["--config-dir=/missing is not a folder"]),
        (["inspect", "jsn=true"], 2, ["inspect has no argument 'jsn'", "did you mean 'json'"]),
        (["check", "recipes=medical_sftt"], 2, ["did you mean 'medical_sft'"]),
        (["seed=1,2"], 2, ["sweep"]),
        (["max_epochs=null", "max_steps=null", "model=tiny", "logger=none"], 2, ["max_steps"]),
        (["hardware.precision=16-mixed", "hardware=cpu"], 5, ["32-true"]),
        (["eval"], 2, ["run="]),
        (["eval", "run=nowhere"], 2, ["nowhere", "config.yaml"]),
        (["keep_best=val/nll", "model=tiny", "logger=none"], 2, ["validate_every"]),
    ],
)  # fmt: skip
def test_a_wrong_command_gets_its_exit_code_and_a_way_out(fails, words, status, parts):
    message = fails(status, *words)
    assert all(part in message for part in parts), message


def test_all_problems_come_at_once_with_where_they_were_set(fails):
    message = fails(2, "method.lrr=1", "adapter.rank=0", "evaluate.max_rowz=3")
    assert message.count("command line") == 3


def test_a_config_error_needs_no_torch_and_comes_quickly():
    code = "import sys; from ftcore.__main__ import run_command as run; print(run(['method.lrr=1']), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["2", "False"]


@pytest.mark.parametrize(
    ("words", "both"),
    [
        (["method.lr=1", "seed=1", "method.lr=2"], ["method.lr=1", "method.lr=2"]),
        (["method.lr=1", "+method.lr=1"], ["method.lr=1", "+method.lr=1"]),
        (["method=sft", "method=dpo"], ["method=sft", "method=dpo"]),
        (["chat", "prompt=a", "chat.prompt=b"], ["prompt=a", "chat.prompt=b"]),
    ],
)
def test_a_key_given_twice_is_refused_with_both_words(capfd, words, both):
    assert run_command([*words, "model=tiny", "dry_run=true"]) == 2
    assert f"{both[0]} and {both[1]} are two values of one key" in capfd.readouterr().err


TEXTS = [
    "a b (1)",
    "it's",
    "[v1]",
    "x[/y]",
    "a, b=c",
    "{a,b}",
    "~/x",
    "#1 %",
    "1e3",
    "true",
    'say "x"',
    "a\\b",
    " a",
    "é 你",
    "x:y",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "key", ["data.path", "data.splits.test", "output_dir", "run", "data.columns.prompt", "model.path"]
)
def test_text_is_taken_as_the_shell_gives_it(key, text):
    (word,) = read_line([f"{key}={text}"]).overrides
    assert [(o.key_or_group, o.value()) for o in read_overrides([word])] == [(key, text)]
    assert read_line([word]).overrides == [word]  # a job of a sweep gets it like this


def test_quotes_around_text_and_null_are_those_of_hydra():
    words = read_line(["data.path='a b'", 'run="c,d"', "model.path=null", "name=${seed}-x"]).overrides
    assert [o.value() for o in read_overrides(words)] == ["a b", "c,d", None, "${seed}-x"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a (1),b", ["a (1)", "b"]),
        ("'a,b', c", ["a,b", "c"]),
        ("choice(a,b)", ["a", "b"]),
        ("a b", None),
        ("[1]", None),
    ],
)
def test_in_a_sweep_commas_outside_of_quotes_separate_texts(text, values):
    (word,) = read_line(["-m", f"data.path={text}"]).overrides
    override = OverridesParser.create().parse_override(word)
    if values is None:
        assert override.value() == text
    else:
        assert [
            json.loads(value) if '"' in value else value.strip("'") for value in override.sweep_string_iterator()
        ] == values


def test_help_lists_every_group_and_option(ftcore):
    outcome = ftcore("--help")
    assert outcome.status == 0
    for group in GROUPS:
        assert all(name in outcome.out for name in options(group))


def compositions():
    """A method with one option of every other group, in turn, until every option has met every method.

    Each takes 0.4 s. The first turns have all but some models and data (others for every second method), the rest is slow.
    """
    others = {group: options(group) for group in GROUPS if group not in ("method", *FILES)}
    turns = max(map(len, others.values()))
    fast = max(len(names) for group, names in others.items() if group not in ("model", "data"))
    for number, method in enumerate(options("method")):
        for turn in range(turns):
            place = turn + number % 2 * (turns // 2)
            chosen = {group: names[place % len(names)] for group, names in others.items()}
            marks = [pytest.mark.slow] if turn >= fast else []
            yield pytest.param(method, chosen, id=f"{method}-{turn}", marks=marks)


@pytest.mark.parametrize(("method", "chosen"), list(compositions()))
def test_every_option_of_every_group_composes_with_every_method(method, chosen):
    words = [f"{group}={option}" for group, option in chosen.items()]
    paths = {word for option in chosen.values() for word in PATHS.get(option, [])}
    config = load_config([f"method={method}", *words, *paths])
    assert config["choices"] == {**dict.fromkeys(FILES), **chosen, "method": method}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model=tiny", "method=dpo", "seed=3", "data=jsonl", "data.path=x.jsonl"],
        ["adapter=full", "evaluate.probe=null"],
    ],
)
def test_the_words_of_a_config_compose_to_it(words):
    config = load_config(words)
    assert load_config(words_of(config)) == config


def test_the_first_compositions_leave_nothing_but_models_and_data_to_the_slow_ones():
    fast = [param.values for param in compositions() if not param.marks]
    met = {(method, group, option) for method, chosen in fast for group, option in chosen.items()}
    others = [group for group in GROUPS if group not in ("method", "model", "data", *FILES)]
    assert met >= {(m, group, option) for m in options("method") for group in others for option in options(group)}
    for group in ("model", "data"):
        assert {option for _, named, option in met if named == group} == set(options(group))


@pytest.mark.parametrize("name", options("recipes"))
def test_a_recipe_composes_by_itself(name):
    config = load_config([f"recipes={name}", *PATHS.get(name, [])])
    assert config["choices"]["recipes"] == name


def test_schema_file_is_what_the_signatures_say():
    assert (PACKAGE / "schema.json").read_text() == schema.build(), "run `make schema`"


def test_editors_accept_every_shipped_file_and_mark_what_is_wrong():
    written = editor_schema.FILE.read_text()
    assert written == editor_schema.build(json.loads(schema.build())), "run `make schema`"
    validator = Draft202012Validator(json.loads(written))
    for group in FILES:
        for file in (resources() / group).glob("*.yaml"):
            assert not list(validator.iter_errors(yaml.safe_load(file.read_text()))), file.name
    for wrong in (
        {"method": {"lrr": 1}},
        {"max_stepz": 3},
        {"adapter": {"rank": 0}},
        {"defaults": [{"override /method": "sftt"}]},
    ):
        assert list(validator.iter_errors(wrong)), wrong


def test_every_field_of_conf_has_a_comment_above_it():
    for file in [*CONF.glob("*.yaml"), *CONF.glob("*/*.yaml")]:
        lines = file.read_text().splitlines()
        for number, line in enumerate(lines):
            key = line.strip().split(":")[0]
            if not line.strip() or line.strip().startswith(("#", "- ")) or key in ("defaults", "_target_"):
                continue
            if lines[number - 1].endswith(","):  # it goes on with what braces hold: one value
                continue
            assert lines[number - 1].strip().startswith("#"), f"{file.name}:{number + 1} has no comment above it"


def test_cfg_job_prints_the_composed_config(ftcore):
    config = yaml.safe_load(ftcore("model=tiny", "seed=7", "--cfg", "job").out)
    assert (config["seed"], config["model"]["random_weights"]) == (7, True)


# Recipes are data.


def recipe(tmp_path, text, name="mine"):
    folder = tmp_path / "a team's, [1]" / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(text)
    return (folder.parent,)


def test_a_teams_recipe_changes_groups_and_values(tmp_path):
    folder = recipe(tmp_path, "# @package _global_\ndefaults:\n  - override /adapter: full\nmethod:\n  lr: 5.0e-5\n")
    config = load_config(["recipes=mine"], folder)
    assert (config["adapter"]["_target_"], config["method"]["lr"]) == ("ftcore.models.adapters.full", 5e-5)


def test_a_misspelt_key_in_a_recipe_is_named_with_its_line(tmp_path):
    folder = recipe(tmp_path, "# @package _global_\nmethod:\n  lrr: 3\n")
    with pytest.raises(ConfigError, match=r"method.lrr is not a key; did you mean 'lr'\?.*mine.yaml:3"):
        load_config(["recipes=mine"], folder)


@pytest.mark.parametrize(
    "text",
    [
        "method:\n  lr: 1\n",
        "# @package _global_\nmethod:\n  _target_: os.system\n",
        "# @package _global_\nmethod: {sub: [{_target_: os.system}]}\n",
        "# @package _global_\nhydra:\n  job: {env_set: {LD_PRELOAD: x}}\n",
        "# @package _global_\ndefaults:\n  - /evil@hydra.job_logging: y\n",
        "# @package _global_\ndefaults:\n  - override /hydra/launcher: joblib\n",
        "# @package _global_\ndefaults:\n  - override /logger: ../../../../tmp/evil\n",
        "# @package _global_\ndefaults: 3\n",
        "# @package _global_\ndefaults:\n  - {1: 2}\n",
        "# @package _global_\n? [a, b]\n: 1\n",
        "# @package hydra.callbacks\nx: 1\n",
        "# @package _global_\nname: ${oc.env:HOME}\n",
        "# @package _global_\nprompt: oc.env\nname: ${${prompt}:HOME}\n",
        "# @package _global_\na: &a [1]\nb: [*a, *a]\n",
        "# @package _global_\na: " + "[" * 1000 + "]" * 1000 + "\n",
        "# @package _global_\nname: " + "x" * 200_000 + "\n",
        "# @package _global_\nname: [\n",
        "# @package _global_\nname: !!python/object/apply:os.system ['touch evil']\n",
    ],
)
def test_a_recipe_that_is_more_than_data_is_refused_within_a_second(tmp_path, text):
    folder = recipe(tmp_path, text)
    started = time.process_time()  # of this process: a busy machine is no failure
    with pytest.raises(ConfigError):
        load_config(["recipes=mine"], folder)
    assert time.process_time() - started < 1
    assert not (tmp_path / "evil").exists()


def test_what_was_checked_is_what_is_composed(tmp_path, monkeypatch):
    (team,) = recipe(tmp_path, "# @package _global_\nmethod: {_target_: os.system}\n")
    good = tmp_path / "good"
    good.mkdir()
    (good / "mine.yaml").write_text("# @package _global_\nseed: 4\n")
    monkeypatch.setenv("FTCORE_RECIPES", str(good))
    config = load_config(["recipes=mine"], (team,))
    assert config["seed"] == 4 and config["method"]["_target_"] == "ftcore.methods.sft.SFT"


def test_a_secret_is_refused_and_not_repeated(fails):
    assert "SUPERSECRET" not in fails(2, "logger.entity=sk-SUPERSECRET0123456789abc", "model.api_key=SUPERSECRET")


def test_the_place_of_another_problem_does_not_repeat_a_secret(fails):
    message = fails(2, "trainer={api_key: SUPERSECRET, foo: 1}", "seed=-1")
    assert all(part in message for part in ("4 problems", "trainer.foo", "(command line, seed=-1)")), message
    assert "SUPERSECRET" not in message


def test_run_and_recipe_together_are_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(load_config([])))
    with pytest.raises(ConfigError, match="one of the two"):
        load_config([f"run={tmp_path}", "recipes=medical_sft"])
    (tmp_path / "config.yaml").write_text("[")
    with pytest.raises(ConfigError, match="not the config.yaml of a run"):
        load_config([f"run={tmp_path}"])


def test_an_unknown_recipe_lists_those_that_exist(fails):
    message = fails(2, "recipes=medical_sftt")
    assert "medical_sft" in message


def test_run_takes_the_earlier_runs_config_as_the_base(tmp_path):
    config = load_config(["model=tiny", "seed=5", "method.lr=0.01"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    again = load_config(["verb=eval", f"run={tmp_path}", "method.lr=0.02", "data=jsonl", "data.path=x"])
    assert (again["seed"], again["method"]["lr"], again["data"]["path"]) == (5, 0.02, "x")
    assert again["model"] == config["model"] and again["verb"] == "eval"


def test_schema_is_json_that_an_editor_can_read():
    content = json.loads((PACKAGE / "schema.json").read_text())
    assert content["top"]["additionalProperties"] is False
