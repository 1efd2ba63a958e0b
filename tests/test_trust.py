"""Files of others are data: whatever a recipe, a sweep, a model, a run or rows hold, nothing in them is run.

The canary is a file that every payload would write and a module that would write it when imported.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ftcore.cli.command import run_command
from ftcore.config import recipe_rules as recipes
from ftcore.config.compose import load_config
from ftcore.data import token_cache as store
from ftcore.files import PACKAGE
from ftcore.models.weights import MANIFEST
from ftcore.rollout.sample import generate
from ftcore.verbs import finished as verbs
from tests.conftest import FAST, latest

HEADER = "# @package _global_\n"
PLANTED = "planted-value-4711"


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """The file that nothing may write. A module `evil` that would lies in the working directory, and in `sys.path`."""
    file = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(file)!r}, 'w').close()\nx = open\n")
    (tmp_path / "megatron").mkdir()
    shutil.copy(tmp_path / "evil.py", tmp_path / "megatron" / "__init__.py")
    for name, value in (("FTCORE_HOME", str(tmp_path / "home")), ("CANARY", str(file)), ("PLANTED", PLANTED)):
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield file
    assert not file.exists()


# Recipes and sweeps.

LAUNCHER = "override /hydra/launcher: joblib"
GRPO = "defaults: [{override /method: grpo}]\n"
SLURM = "defaults: [{override /hardware: slurm}]\n"
RLHF = "defaults: [{override /method: rlhf}]\n"
SFT = "{override /method: sft}"
RECIPES = {
    # code to call
    "a target": "method: {_target_: os.system}",
    "a target in a new node": "evil: {_target_: os.system, command: touch canary}",
    "a target in a list": "method: {betas: [{_target_: os.system}]}",
    "a target in a list of lists": "trainer: {x: [[{_target_: os.system}]]}",
    "a target under free keys": "data: {columns: {prompt: {_target_: os.system}}}",
    "a target in a tracker's keys": "logger: {tags: [{_target_: os.system}]}",
    "a target in an option of a reward": GRPO + "method: {reward_options: {length: {_target_: evil.x}}}",
    "a target with a dotted key": "method._target_: os.system",
    "a target with a space": "method: {'_target_ ': os.system}",
    "a target of ours in another place": "method: {_target_: ftcore.train.loggers.wandb_logger}",
    "keys without a target": "defaults: [{override /logger: none}]\nlogger: {project: x}",
    "callbacks": "callbacks: {evil: {_target_: evil.x}}",
    "trainer callbacks": "trainer: {callbacks: [{_target_: evil.x}]}",
    "trainer plugins": "trainer: {plugins: evil.x}",
    "_recursive_": "method: {_recursive_: false}",
    "_partial_": "method: {_partial_: true}",
    "_args_": "method: {_args_: [touch canary]}",
    "_convert_": "data: {_convert_: object}",
    "trust": "trust: [evil]",
    "trust of nothing": "trust: null",
    "a reward of a module": GRPO + "method: {rewards: [evil.x], reward_weights: [1.0]}",
    "a reward behind TRL's name": GRPO + "method: {rewards: [trl.rewards.os.system], reward_weights: [1.0]}",
    "kernels of a hub": "model: {attention: evil/kernel}",
    # Hydra's own node
    "hydra": "hydra: {run: {dir: /tmp}}",
    "hydra with dots": "hydra.run.dir: /tmp",
    "hydra.env_set": "hydra: {job: {env_set: {LD_PRELOAD: x}}}",
    "hydra.job_logging": "hydra: {job_logging: {handlers: {x: {(): evil.x}}}}",
    "hydra.searchpath": "hydra: {searchpath: [file:///tmp]}",
    "hydra.callbacks": "hydra: {callbacks: {x: {_target_: evil.x}}}",
    "hydra.launcher": "hydra: {launcher: {_target_: evil.x}}",
    "hydra in wide letters": "\uff48ydra: {run: {dir: /tmp}}",
    "hydra after a zero-width space": "\u200bhydra: {run: {dir: /tmp}}",
    "hydra from a merge": "<<: {hydra: {job: {env_set: {X: y}}}}",
    "hydra from a merged list": "<<: [{hydra: {searchpath: [file:///tmp]}}]",
    "keys from a merge": "method: {<<: {lr: 0.5}}",
    # headers
    "a second header": "# @package hydra.job_logging\nx: 1",
    "a second header after a blank line": "\n  # @package hydra.callbacks\nx: 1",
    "a header behind another line break": "\x85# @package hydra\nx: 1",
    "a header behind a form feed": "\x0c# @package method\nlr: 0.5",
    "a header of another word": "# @todo a b c\nseed: 1",
    "a group's header": "# @package method\nlr: 0.5",
    # defaults
    "defaults of Hydra": "defaults: [/evil@hydra.job_logging: y]",
    "a launcher": f"defaults: [{{{LAUNCHER}}}]",
    "a launcher from a merge": f"<<: {{defaults: [{{{LAUNCHER}}}]}}",
    "a launcher inside a group": f"method: {{defaults: [{{{LAUNCHER}}}]}}",
    "a launcher after a good line": f"defaults:\n  - override /method: sft\n  - {LAUNCHER}",
    "a package": "defaults: [{override /method@hydra.x: sft}]",
    "a file": "defaults: ['file:///etc/passwd']",
    "an absolute option": "defaults: [{override /method: /etc/passwd}]",
    "an option above": "defaults: [{override /method: ../../evil}]",
    "an option of several": "defaults: [{override /method: [sft, dpo]}]",
    "an option of none": "defaults: [{override /method: null}]",
    "a hidden option": "defaults: [{override /method: _method}]",
    "an optional default": "defaults: [{optional /method: sft}]",
    "another recipe": "defaults: [other]",
    "a default that is a date": "defaults: [2001-99-99]",
    "a default that is none": "defaults: [null]",
    "a default of two keys": f"defaults: [{{override /method: sft, {LAUNCHER}}}]",
    "defaults that are a mapping": f"defaults: {{{LAUNCHER}}}",
    "defaults twice": f"defaults: [{SFT}]\ndefaults: [{{{LAUNCHER}}}]",
    # what is read from elsewhere
    "the environment": "name: ${oc.env:PLANTED}",
    "the environment with a default": "name: ${oc.env:NOTHING,${oc.env:PLANTED}}",
    "the environment in a key": "data: {columns: {'${oc.env:PLANTED}': x}}",
    "the environment over several lines": "name: >\n  a ${oc.env:\n  PLANTED}",
    "the environment, nested": "name: ${${keep_best}:PLANTED}",
    "the environment, escaped": "name: '\\${oc.env:PLANTED}'",
    "the environment in a stage": RLHF + "method: {stages: {policy: ['name=$\\{oc.env\\:PLANTED\\}']}}",
    "a resolver that decodes": "name: ${oc.decode:'1'}",
    "Hydra's resolver": "name: ${hydra:runtime.cwd}",
    "another node": "method: ${logger}",
    "an interpolation that grows": "name: ${data.cloze}${data.cloze}\ndata: {cloze: '${model.path}${model.path}'}",
    "an interpolation without an end": "name: ${",
    # YAML
    "aliases": "a: &a [1]\nb: [*a, *a]",
    "a billion laughs": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nname: *c",
    "a tag": "name: !!python/object/apply:os.system ['touch canary']",
    "a tag of a name": "name: !!python/name:evil.x",
    "a tag of a module": "name: !!python/module:evil",
    "a tag in a directive": "%TAG ! tag:yaml.org,2002:python/\n---\nname: !module:evil",
    "a binary tag": "name: !!binary aGVsbG8=",
    "many levels": "a: " + "[" * 1000 + "]" * 1000,
    "many levels of mappings": "a: " + "{a: " * 1000 + "1" + "}" * 1000,
    "many keys": "method: {" + ", ".join(f"k{i}: 1" for i in range(9000)) + "}",
    "many values": "method: {betas: [" + "1, " * 30_000 + "]}",
    "a huge file": "name: " + "x" * 200_000,
    "a long number": "seed: " + "9" * 50_000,
    "a long number of another base": "seed: 0x" + "f" * 50_000,
    "a long number of base sixty": "seed: 1" + ":59" * 30_000,
    "a long key": f"? {'x' * 45_000}\n: 1",
    "a key twice": "seed: 1\nseed: 2",
    "a key that is a list": "? [a, b]\n: 1",
    "a key that is none": "null: 1",
    "keys of several types": "method: {1: 2, lrr: 3, 1.5: 4, true: 5}",
    "a key with a line break": '"seed\\nhydra": 1',
    "a second document": "seed: 1\n---\nhydra: {x: 1}",
    "a NUL": "name: a\0b",
    "text for a group": "method: text",
    "a number for a group": "evaluate: 3",
    "a list for a group": "model: [1]",
    "nothing": "",
    # where and what
    "another folder": "output_dir: /tmp/elsewhere",
    "a name above": "name: ../../elsewhere",
    "an absolute name": "name: /tmp/elsewhere",
    "another run": "run: /tmp",
    "a resumed run": "resume: /tmp",
    "a verb": "verb: chat",
    "choices": "choices: {data: ../../elsewhere}",
    "a line in a batch script": SLURM + 'hardware: {slurm: {partition: "x\\ntouch canary"}}',
    "a name in a batch script": SLURM + 'name: "x\\ntouch canary"',
    "options of sbatch": SLURM + "hardware: {slurm: {additional: {export: LD_PRELOAD=x}}}",
    "an endless file": "evaluate: {probe: /dev/zero}",
    "a stage that trusts": RLHF + "method: {stages: {policy: ['trust=[evil]']}}",
}  # fmt: skip
BYTES = {
    "a byte-order mark": b"\xef\xbb\xbf" + HEADER.encode() + b"seed: 1\n",
    "UTF-16": (HEADER + "hydra: {x: 1}\n").encode("utf-16"),
    "UTF-16 without a mark": (HEADER + "hydra: {x: 1}\n").encode("utf-16-le"),
    "bytes that are no text": HEADER.encode() + b"name: \xff\xfe\n",
    "no header": b"seed: 1\n",
    "a header of Hydra": b"# @package _global_.hydra\nx: 1\n",
    "a header of a group": b"# @package _global_.method\nlr: 0.5\n",
    "a pickle": pickle.dumps(print),
    "nothing at all": b"",
}
SEARCHES = {
    "Hydra": '{"hydra.run.dir": [a, b]}',
    "trust": '{trust: [["evil"]]}',
    "trust after a dot": '{".trust": [["evil"]]}',
    "a target": '{"method._target_": [os.system]}',
    "a target in a value": '{"data.columns": ["{_target_: os.system}"]}',
    "a target in a mapping": '{"data.columns": [{_target_: os.system}]}',
    "a key with an equals sign": '{"seed=1 trust": [1]}',
    "a key that deletes": '{"~method": [1]}',
    "a key that adds": '{"+hydra.x": [1]}',
    "a key with a line break": '{"seed\\ntrust": [1]}',
    "a group of Hydra": '{"hydra/launcher": [joblib]}',
    "a flag": '{"--config-dir": [/tmp]}',
    "another folder": "{output_dir: [/tmp/a, /tmp/b]}",
    "another run": "{run: [/tmp]}",
    "the environment": r"{name: ['$\{oc.env\:PLANTED\}']}",
    "the environment in a value": r"{logger.entity: ['$\{oc.env\:PLANTED\}']}",
    "the environment as it is": '{"logger.entity": ["${oc.env:PLANTED}"]}',
    "an option above": "{method: [../../evil]}",
    "options of sbatch": '{"hardware.slurm": ["{additional: {export: x}}"]}',
    "a package": '{"method@hydra.x": [sft]}',
    "a sweep inside": '{seed: ["1,2"]}',
    "a list of recipes": "{recipes: [medical_sft]}",
    "no mapping": "[1]",
}


def files_below(folder):
    """All files but compiled modules and the lock of a sweep whose jobs were refused."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc" and path.name != ".lock"]
    return {str(path.relative_to(folder)) for path in files}


@pytest.fixture
def team(tmp_path, capfd):
    """Put a file among a team's recipes or sweeps and use it: it must be refused at once, by its name, without a trace."""
    run_command(["recipes=none-such"])  # what is imported once is no part of the time

    def use(content, group="recipes", name="mine", words=()):
        file = tmp_path / "team" / group / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            file.write_bytes(content if isinstance(content, bytes) else (HEADER + content + "\n").encode())
        before, environment, started = files_below(tmp_path), {**os.environ}, time.process_time()
        capfd.readouterr()
        status = run_command([f"--config-dir={tmp_path / 'team'}", f"{group}={name}", *words])
        seconds, (out, err) = time.process_time() - started, capfd.readouterr()
        assert status == 2 and "Traceback" not in err and not out, err
        assert seconds < 1, f"{seconds:.2f} s"
        assert PLANTED not in err and len(err) < 3000
        assert files_below(tmp_path) == before
        ours = ("FTCORE_TRUST", "FTCORE_PRIVATE")
        assert {k: v for k, v in os.environ.items() if k not in ours} == {
            k: v for k, v in environment.items() if k not in ours
        }
        return err

    return use


@pytest.mark.parametrize("group", ["recipes", pytest.param("sweeps", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", RECIPES)
def test_a_file_that_is_more_than_data_is_refused(team, case, group):
    assert f"{group}/mine" in team(RECIPES[case], group)


@pytest.mark.parametrize("case", BYTES)
def test_a_file_that_is_no_recipe_is_refused(team, case):
    assert "recipes/mine.yaml" in team(BYTES[case])


@pytest.mark.parametrize("case", SEARCHES)
def test_a_sweep_that_searches_more_than_values_is_refused(team, case):
    message = team(f"search: {SEARCHES[case]}", "sweeps")
    assert any(said in message for said in ("sweeps/mine", "../../evil", "1,2"))  # the file, or the job's word


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link to a device", "a link to nothing", "a link to itself"])
def test_what_is_no_file_is_not_waited_for(team, tmp_path, kind):
    file = tmp_path / "team" / "recipes" / "mine.yaml"
    file.parent.mkdir(parents=True)
    targets = {"a link to a device": "/dev/zero", "a link to nothing": tmp_path / "nothing", "a link to itself": file}
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a folder":
        file.mkdir()
    else:
        file.symlink_to(targets[kind])
    assert "mine" in team(None)


def test_a_file_of_a_terabyte_is_not_read(team, tmp_path):
    file = tmp_path / "team" / "recipes" / "mine.yaml"
    file.parent.mkdir(parents=True)
    with file.open("wb") as content:
        content.truncate(1 << 40)
    assert "100,000 bytes" in team(None)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "_hidden", ".", "recipes@hydra", "mine\n", "x,y"])
def test_a_name_that_is_a_path_is_refused(team, tmp_path, name):
    (tmp_path / "team").mkdir()
    (tmp_path / "team" / "evil.yaml").write_text(HEADER + "seed: 1\n")
    assert name.strip() in team(None, name=name)


def test_a_file_that_changes_after_the_check_is_composed_as_checked(tmp_path, monkeypatch):
    file = tmp_path / "team" / "recipes" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(HEADER + "seed: 4\n")
    problems = recipes._problems

    def check_and_swap(*given):
        yield from problems(*given)
        file.write_text(HEADER + "seed: 5\nmethod: {_target_: evil.x}\n")

    monkeypatch.setattr(recipes, "_problems", check_and_swap)
    config = load_config(["recipes=mine"], (tmp_path / "team",))
    assert config["seed"] == 4 and config["method"]["_target_"] == "ftcore.methods.sft.SFT"


def test_a_teams_folder_does_not_replace_what_is_shipped(tmp_path):
    evil = {"config.yaml": "trust: [evil]\nseed: 9\n", "method/sft.yaml": "_target_: evil.x\n",
            "method/_method.yaml": "lr: 9\n",
            "hydra/launcher/basic.yaml": "_target_: evil.x\n", "hydra/job_logging/default.yaml": "x: {(): evil.x}\n",
            "recipes/mine.yaml": HEADER + "max_steps: 3\n"}  # fmt: skip
    for name, text in evil.items():
        (tmp_path / "team" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "team" / name).write_text(text)
    plain, with_team = load_config(["max_steps=3"]), load_config(["recipes=mine"], (tmp_path / "team",))
    assert {**with_team, "choices": None} == {**plain, "choices": None}


@pytest.mark.parametrize(("group", "text"), [("recipes", "seed: 1"), ("sweeps", "search: {seed: [1, 2]}")])
def test_the_same_files_without_malice_are_accepted(tmp_path, group, text):
    file = tmp_path / "team" / group / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"{HEADER}# a comment\n{text}\nhardware: {{precision: 32-true}}\nmethod: {{lr: 1.0e-4}}\n")
    assert load_config([f"{group}=mine"], (tmp_path / "team",))["method"]["lr"] == 1e-4


# Models, runs, stores and rows.


class Payload:
    """Unpickling it writes the canary."""

    def __reduce__(self):
        return os.system, ('touch "$CANARY"',)


PICKLE = pickle.dumps(Payload())
CODE = """
import os
open(os.environ["CANARY"], "w").close()
from transformers import *
Evil, generate = LlamaForCausalLM, print
"""
CPU = [*FAST, "hardware=cpu", "retention.weight=0"]


def torch_pickle(file):
    torch.save({"x": Payload()}, file)


def changed(file, **values):
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **values}))


def unsafetensors(header, size=None):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return (len(text) if size is None else size).to_bytes(8, "little") + text + b"\0" * 16


FEW = {"completion": "A number.", "chosen": "A number.", "rejected": "No."}


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """A folder of weights and a finished run with checkpoints, made once."""
    base = tmp_path_factory.mktemp("shipped")
    (base / "rows.jsonl").write_text("".join(json.dumps(FEW | {"prompt": f"What is {k}?"}) + "\n" for k in range(20)))
    shutil.copytree(PACKAGE / "datasets" / "tiny", base / "weights")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base / "weights")).save_pretrained(base / "weights")
    words = [
        *CPU,
        "data=jsonl",
        f"data.path={base / 'rows.jsonl'}",
        "data.test_share=0.2",
        "max_steps=3",
        "checkpoints.every=1",
        "ledger=true",
        f"output_dir={base}",
        "name=run",
    ]
    assert run_command(words) == 0
    (run,) = (base / "run").glob("*")
    return base / "weights", run, f"data.path={base / 'rows.jsonl'}"


@pytest.fixture
def attempt(capfd, canary, monkeypatch, shipped):
    """Run a command on what was tampered with: refused with a message or unharmed, the canary unwritten."""
    monkeypatch.setattr(verbs, "generate", lambda *given: generate(*given[:-1], 2))  # short answers

    def use(*words, allowed=(0, 2, 3, 4, 7)):
        capfd.readouterr()
        rows = ["data=jsonl", shipped[2]] if "model=tiny" in words and "data=jsonl" not in words else []
        status = run_command(latest(*rows, *words))
        out, err = capfd.readouterr()
        assert status in allowed and "Traceback" not in err, (status, err)
        assert not canary.exists()
        return status, out + err

    return use


@pytest.fixture
def weights(shipped, tmp_path):
    return Path(shutil.copytree(shipped[0], tmp_path / "weights"))


@pytest.fixture
def run(shipped, tmp_path):
    return Path(shutil.copytree(shipped[1], tmp_path / "run"))


def evil_code(folder):
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE)


AUTO_MAP = {
    "AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
}  # fmt: skip
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}",
    "{{ self.__init__.__globals__ }}{{ lipsum.__globals__['os'].system('touch canary') }}",
    "{{ messages.__class__.__base__.__subclasses__()[0].__init__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('canary', 'w') }}",
    "{% set x = messages.__init__.__globals__ %}{{ x }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch canary') }}",
    "{{ ('%s' % messages)|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ 1 / 0 }}",
    "{{ messages + 1 }}",
    "{{ messages['x' * 3]['y']['z'] }}",
    "{% for a in range(99999999) %}{% endfor %}",
    "{{ messages.append({'role': 'user'}) }}",
    "{{ strftime_now(1) }}",
]
PICKLED = ("model.pt", "training_args.bin", "x.ckpt", "optimizer.pt", "pytorch_model-00001-of-00002.bin")
# What is done to a folder of weights.
WEIGHTS = {
    "a pickle for safetensors": lambda f: (f / "model.safetensors").write_bytes(PICKLE),
    "torch's pickle for safetensors": lambda f: torch_pickle(f / "model.safetensors"),
    "only a pickle": lambda f: ((f / "model.safetensors").unlink(), torch_pickle(f / "pytorch_model.bin")),
    "a pickle beside": lambda f: torch_pickle(f / "pytorch_model.bin"),
    "pickles of other names": lambda f: [torch_pickle(f / name) for name in PICKLED],
    "an index of pickles": lambda f: (
        (f / "model.safetensors").unlink(), torch_pickle(f / "pytorch_model-1.bin"),
        changed(f / "pytorch_model.bin.index.json", weight_map={"x": "pytorch_model-1.bin"}),
    ),
    "an index of safetensors that names a pickle": lambda f: (
        torch_pickle(f / "evil.bin"), changed(f / "model.safetensors.index.json", weight_map={"x": "evil.bin"}),
    ),
    "a GGUF of garbage": lambda f: ((f / "model.safetensors").unlink(), (f / "model.gguf").write_bytes(b"GGUF" + PICKLE)),
    "a header without an end": lambda f: (f / "model.safetensors").write_bytes(unsafetensors(b"{}", 1 << 62)),
    "a header that is no mapping": lambda f: (f / "model.safetensors").write_bytes(unsafetensors([1])),
    "a header of many levels": lambda f: (f / "model.safetensors").write_bytes(unsafetensors(b"[" * 100_000)),
    "a header of an unknown type": lambda f: (f / "model.safetensors").write_bytes(
        unsafetensors({"x": {"dtype": "evil", "shape": [1], "data_offsets": [0, 16]}})),
    "a header that overlaps": lambda f: (f / "model.safetensors").write_bytes(
        unsafetensors({"x": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 16]}})),
    "code for the model": lambda f: (evil_code(f), changed(f / "config.json", auto_map=AUTO_MAP)),
    "code for an unknown model": lambda f: (evil_code(f), changed(f / "config.json", auto_map=AUTO_MAP, model_type="evil")),
    "code for the tokenizer": lambda f: (
        evil_code(f), changed(f / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Evil")),
    "code of another repository": lambda f: changed(f / "config.json", auto_map={"AutoModelForCausalLM": "../..--modeling.Evil"}),
    "code for generation": lambda f: (evil_code(f), changed(f / "generation_config.json", custom_generate=str(f))),
    "a request to trust": lambda f: (
        evil_code(f),
        changed(f / "config.json", auto_map=AUTO_MAP, trust_remote_code=True, model_type="evil"),
        changed(f / "tokenizer_config.json", auto_map=AUTO_MAP, trust_remote_code=True)),
    "kernels of a hub": lambda f: changed(
        f / "config.json", _attn_implementation="evil/kernel", attn_implementation="evil/kernel"),
    "a quantizer": lambda f: changed(f / "config.json", quantization_config={"quant_method": "evil", "modules": ["evil"]}),
    "a pickled configuration": lambda f: (f / "config.json").write_bytes(PICKLE),
    "a pickled tokenizer": lambda f: (f / "tokenizer.json").write_bytes(PICKLE),
    "pickled settings of the tokenizer": lambda f: (f / "tokenizer_config.json").write_bytes(PICKLE),
    "a pickled vocabulary": lambda f: (
        (f / "tokenizer.json").unlink(), (f / "tokenizer.model").write_bytes(PICKLE), torch_pickle(f / "vocab.bin"),
        (f / "vocab.pkl").write_bytes(PICKLE), changed(f / "tokenizer_config.json", tokenizer_class="TransfoXLTokenizer")),
    "a pickled manifest": lambda f: (f / MANIFEST).write_bytes(PICKLE),
    "a manifest of files above": lambda f: changed(f / MANIFEST, **{"../../../../etc/passwd": "0"}),
    "a pickled chat template": lambda f: (f / "chat_template.jinja").write_bytes(PICKLE),
    "an adapter": lambda f: changed(f / "adapter_config.json", peft_type="LORA"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_nothing_in_a_folder_of_weights_is_run(weights, attempt, case):
    WEIGHTS[case](weights)
    attempt(*CPU, f"model.path={weights}", "model.random_weights=false", "dry_run=true")


def test_weights_as_they_were_are_accepted(weights, attempt):
    assert attempt(*CPU, f"model.path={weights}", "model.random_weights=false", "dry_run=true")[0] == 0


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_reaches_nothing(weights, attempt, template):
    (weights / "chat_template.jinja").write_text(template)
    words = [f"model.path={weights}", "model.random_weights=false", "data.chat=true"]
    assert attempt(*CPU, *words, "dry_run=true")[0] == 3


LAUGHS = ", ".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
RUNS = {
    "a pickled config": lambda f: (f / "config.yaml").write_bytes(PICKLE),
    "a config with tags": lambda f: (f / "config.yaml").write_text("!!python/object/apply:os.system ['touch canary']"),
    "a config with a tag inside": lambda f: (f / "config.yaml").write_text(
        (f / "config.yaml").read_text() + "search: !!python/object/apply:os.system ['touch canary']\n"),
    "a config with a target": lambda f: (f / "config.yaml").write_text(
        (f / "config.yaml").read_text().replace("ftcore.methods.sft.SFT", "evil.x")),
    "a config that trusts": lambda f: (f / "config.yaml").write_text((f / "config.yaml").read_text()
        .replace("trust: []", "trust: [evil]").replace("ftcore.methods.sft.SFT", "evil.x")),
    "a config that resolves": lambda f: (f / "config.yaml").write_text(
        (f / "config.yaml").read_text().replace("name: run", "name: ${oc.env:PLANTED}/../x")),
    "a config of aliases": lambda f: (f / "config.yaml").write_text(
        (f / "config.yaml").read_text().replace("search: {}", "search: {a: &a [x, x], " + LAUGHS + "}")),
    "choices that are paths": lambda f: (f / "config.yaml").write_text(
        (f / "config.yaml").read_text().replace("  data: jsonl", "  data: x/../../../elsewhere")),
    "a pickled adapter": lambda f: (f / "model/adapter_model.safetensors").write_bytes(PICKLE),
    "an adapter in a pickle": lambda f: (
        (f / "model/adapter_model.safetensors").unlink(), torch_pickle(f / "model/adapter_model.bin")),
    "a pickle beside the adapter": lambda f: torch_pickle(f / "model/adapter_model.bin"),
    "an adapter with another header": lambda f: (f / "model/adapter_model.safetensors").write_bytes(
        unsafetensors({"x": {"dtype": "evil", "shape": [1], "data_offsets": [0, 16]}})),
    "an adapter of other weights": lambda f: save_file({"x": torch.zeros(1)}, f / "model/adapter_model.safetensors"),
    "an adapter of another size": lambda f: changed(f / "model/adapter_config.json", r=3),
    "a pickled description of the adapter": lambda f: (f / "model/adapter_config.json").write_bytes(PICKLE),
    "an adapter that imports": lambda f: changed(f / "model/adapter_config.json",
        auto_mapping={"base_model_class": "x", "parent_library": "evil"}),
    "an adapter of Megatron's": lambda f: changed(f / "model/adapter_config.json",
        megatron_config={"a": 1}, megatron_core="megatron.core"),
    "an adapter that reads a pickle": lambda f: (torch_pickle(f / "x.bin"), changed(f / "model/adapter_config.json",
        peft_type="MULTITASK_PROMPT_TUNING", prompt_tuning_init="ONLY_SOURCE_SHARED", num_virtual_tokens=2, num_tasks=1,
        prompt_tuning_init_state_dict_path=str(f / "x.bin"), task_type="CAUSAL_LM")),
    "an adapter that trusts a tokenizer": lambda f: (evil_code(f / "model"), changed(f / "model/adapter_config.json",
        peft_type="PROMPT_TUNING", prompt_tuning_init="TEXT", prompt_tuning_init_text="x", num_virtual_tokens=2,
        tokenizer_name_or_path=str(f / "model"), tokenizer_kwargs={"trust_remote_code": True}, task_type="CAUSAL_LM")),
    "an adapter of an unknown kind": lambda f: changed(f / "model/adapter_config.json", peft_type="evil.x"),
    "code for the run's tokenizer": lambda f: (evil_code(f / "model"),
        changed(f / "model/tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Evil")),
    "a pickled tokenizer": lambda f: (f / "model/tokenizer.json").write_bytes(PICKLE),
    "a pickled summary": lambda f: (f / "summary.json").write_bytes(PICKLE),
    "pickled metrics": lambda f: (f / "metrics.jsonl").write_bytes(PICKLE),
    "pickled samples": lambda f: (f / "samples.jsonl").write_bytes(PICKLE),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_nothing_in_a_finished_run_is_run(run, attempt, tmp_path, case):
    RUNS[case](run)
    attempt("chat", f"run={run}", "prompt=hello", "hardware=cpu")
    assert not list(tmp_path.glob("*elsewhere*"))


def test_scores_are_not_written_outside_of_a_run(run, attempt, tmp_path):
    RUNS["choices that are paths"](run)
    (run / "eval-x").mkdir()
    assert attempt("eval", f"run={run}", "hardware=cpu")[0] == 2
    assert not list(tmp_path.rglob("elsewhere*"))


# What the first process writes of a checkpoint.
OWN_TENSORS = "shard-00001-model-00001-of-00001.safetensors"


def spoil_checkpoint(folder, name, content):
    """Put a pickle into a checkpoint, with the right size and checksum in the manifest."""
    (folder / name).write_bytes(content)
    changed(folder / "manifest.json", **{name: [len(content), zlib.crc32(content)]})


CHECKPOINTS = {
    "a pickled state": lambda f: spoil_checkpoint(f, "state.json", PICKLE),
    "a state of another kind": lambda f: spoil_checkpoint(f, "state.json", b"[]"),
    "a pickled manifest": lambda f: (f / "manifest.json").write_bytes(PICKLE),
    "pickled tensors": lambda f: spoil_checkpoint(f, OWN_TENSORS, PICKLE),
    "tensors of another header": lambda f: spoil_checkpoint(f, OWN_TENSORS, unsafetensors(b"{}", 1 << 62)),
    "pickles beside": lambda f: [torch_pickle(f / name) for name in ("optimizer.pt", "trainer_state.ckpt", "process-1.bin")],
    "a manifest of files above": lambda f: changed(f / "manifest.json", **{"../../../../evil.py": [1, 1]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_nothing_in_a_checkpoint_is_run(run, attempt, case):
    (run / "summary.json").unlink()
    for folder in (run / "checkpoints").glob("step-*"):
        CHECKPOINTS[case](folder)
    attempt(f"resume={run}")


@pytest.mark.parametrize("name", ["base.json", "metrics.jsonl", "owner", "ledger-0.jsonl"])
def test_a_pickle_in_a_stopped_run_is_not_run(run, attempt, name):
    (run / "summary.json").unlink()
    (run / name).write_bytes(PICKLE)
    attempt(f"resume={run}")


def test_a_pickled_ledger_is_not_run(run, attempt):
    (run / "ledger.parquet").write_bytes(PICKLE)
    assert attempt("inspect", f"run={run}")[0] in (2, 7)


def test_no_address_is_a_run_a_model_or_rows(attempt):
    url = "https://host.invalid/x"
    for word in (f"run={url}", f"resume={url}"):
        assert attempt("chat" if "run" in word else "train", word, "prompt=x")[0] == 2
    assert attempt(*CPU, f"model.path={url}", "model.random_weights=false")[0] == 4
    assert attempt(*CPU, "data=jsonl", f"data.path={url}")[0] == 3


@pytest.mark.slow
def test_pickles_in_the_store_of_tokenised_rows_are_not_run(attempt, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "WORTH_KEEPING", 1)
    assert attempt(*CPU, "max_steps=1")[0] == 0
    files = list((tmp_path / "home" / "rows").rglob("*.arrow"))
    assert files
    for file in files:
        content = file.read_bytes()
        file.write_bytes(PICKLE)
        attempt(*CPU, "max_steps=1")
        file.write_bytes(content)


@pytest.mark.slow
def test_pickles_in_a_stage_are_not_run(attempt, tmp_path):
    stages = "method.stages={policy: ['method=sft', 'max_steps=1'], reward_model: ['method=reward', 'max_steps=1']}"
    words = [*CPU, "method=rlhf", stages, "max_steps=1"]
    assert attempt(*words)[0] == 0
    (stage,) = (tmp_path / "home" / "stages").glob("sft-*/")
    kept = shutil.copytree(stage, tmp_path / "kept")
    for case in ("a pickled config", "a config with a target", "a pickled adapter", "an adapter in a pickle"):
        RUNS[case](stage)
        assert attempt(*words)[0] in (2, 4), case
        shutil.rmtree(stage)
        shutil.copytree(kept, stage)


def extended_parquet():
    """Rows whose column claims to be an extension type that is kept as a pickle, as old readers believed."""
    told = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": PICKLE}
    fields = [pyarrow.field(name, pyarrow.string(), metadata=told) for name in ("prompt", "completion")]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table([["a", "b"] * 9] * 2, schema=pyarrow.schema(fields)), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            (f"rows{ending}", PICKLE)
            for ending in (".jsonl", ".json", ".csv", ".parquet", ".pkl", ".npy", ".pt", ".jsonl.gz")
        ),
        ("rows.parquet", extended_parquet()),
        ("rows.jsonl", b'{"prompt": {"_target_": "evil.x"}, "completion": "!!python/name:evil.x"}\n' * 9),
        ("rows.jsonl", b'{"__class__": "evil.x", "py/object": "evil.x"}\n'),
    ],
    ids=lambda value: value if isinstance(value, str) else hashlib.sha256(value).hexdigest()[:6],
)
def test_nothing_in_rows_is_run(attempt, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    attempt(*CPU, "data=jsonl", f"data.path={name}", "dry_run=true", allowed=(0, 2, 3))
    attempt(*CPU, f"evaluate.probe={name}", "dry_run=true", allowed=(2, 3))


# Secrets.

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "OPENAI_API_KEY": "sk-proj-AbCdEfGhIjKlMnOpQrStUv",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY",
    "DATABASE_PASSWORD": "correct-horse-battery",
}
SPOKEN = {
    "a password in an address of weights": "model.path=https://user:s3cr3tpass@host.invalid/x",
    "a password in an address of rows": "data.path=s3://user:s3cr3tpass@bucket/x",
    "a key of its own": "logger.api_key=s3cr3tpass",
    "a key with a space": "logger.api_key=s3cr3tpass and more=x",
    "keys to be swept": "logger.api_key=s3cr3tpass,other",
    "a token in a name": "name=hf_s3cr3tpassAbCdEfGhIjKlMnOp",
    "a token in tags": "logger.tags=[fine,sk-s3cr3tpass-AbCdEfGhIjKlMn]",
    "a token in a number": "method.lr=ghp_s3cr3tpassAbCdEfGhIjKlMnOp",
    "a token for an option": "model=hf_s3cr3tpassAbCdEfGhIjKlMnOp",
    "a token as a verb": "hf_s3cr3tpassAbCdEfGhIjKlMnOp",
    "a token as a flag": "--token=hf_s3cr3tpassAbCdEfGhIjKlMnOp",
    "a password as a flag": "--password=s3cr3tpass",
    "the environment's key": f"logger.entity={SECRETS['WANDB_API_KEY']}",
    "the environment's password": f"data.path=/data/{SECRETS['DATABASE_PASSWORD']}/x.jsonl",
}


@pytest.mark.parametrize("case", SPOKEN)
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(tmp_path, capfd, monkeypatch, case):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert run_command(["model=tiny", "logger=wandb", "logger.mode=offline", SPOKEN[case]]) == 2
    said = "".join(capfd.readouterr())
    assert "s3cr3tpass" not in said and not any(value in said for value in SECRETS.values()), said
    assert not (tmp_path / "runs").exists()


SECRET_RECIPES = [
    "name: hf_s3cr3tpassAbCdEfGhIjKlMnOp",
    "logger: {api_key: s3cr3tpass}",
    "data: {path: 'https://user:s3cr3tpass@host/x'}",
    "method: {lr: sk-s3cr3tpass-AbCdEfGhIjKlMn}",
]


@pytest.mark.parametrize("text", SECRET_RECIPES)
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(team, text):
    assert "s3cr3tpass" not in team(text)


def test_what_the_environment_keeps_secret_is_written_nowhere(tmp_path):
    words = [*CPU, "logger=wandb", "logger.mode=offline", "max_steps=1"]
    command = [sys.executable, "-m", "ftcore", *latest(*words)]
    environment = {**os.environ, **SECRETS, "PYTHONPATH": str(PACKAGE.parent)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    written = [*(file.read_bytes() for file in files), ran.stdout, ran.stderr]
    assert not [name for name, value in SECRETS.items() if any(value.encode() in content for content in written)]
