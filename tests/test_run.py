"""Whole runs on model=tiny, by the commands a user types."""

import glob
import json
import math
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ftcore.files import PACKAGE
from ftcore.run_folder import Run
from tests.conftest import FAST

OWN = [{"question": f"What is {k} plus {k}?", "answer": f"{2 * k}."} for k in range(40)]
COLUMNS = ["data.columns.prompt=question", "data.columns.completion=answer"]


@pytest.fixture
def trained(ftcore):
    """A finished tiny run."""
    outcome = ftcore(*FAST, "max_steps=2", "method.lr=0.01")
    assert outcome.status == 0, outcome.err
    return outcome


def test_a_run_leaves_what_design_promises(ftcore):
    outcome = ftcore("model=tiny", "logger=none", "max_steps=3", "evaluate.max_rows=8", "evaluate.max_new_tokens=4")
    assert outcome.status == 0, outcome.err
    summary, folder = outcome.summary, outcome.folder
    for key in ("loss", "perplexity", "accuracy", "probe_perplexity"):
        assert key in summary["base"] and key in summary["tuned"]
    assert summary["base"]["rows"] == summary["tuned"]["rows"] == 8
    assert summary["tuned"]["loss"] < summary["base"]["loss"]
    assert summary["parameters_trained"] < summary["parameters"] and summary["steps"] == 3
    steps = outcome.metrics
    assert [line["step"] for line in steps] == [1, 2, 3]
    wanted = {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/tokens_per_second",
        "train/tokens",
        "train/peak_memory_gb",
    }
    assert wanted <= set(steps[0])
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and {"prompt", "expected", "base", "tuned"} <= set(samples[0])
    assert (folder / "config.yaml").is_file() and (folder / "model" / "adapter_config.json").is_file()
    assert summary["intervals"].keys() == {"loss", "perplexity", "accuracy", "probe_perplexity"}
    loss, accuracy = summary["intervals"]["loss"], summary["intervals"]["accuracy"]
    assert loss["low"] <= summary["tuned"]["loss"] - summary["base"]["loss"] <= loss["high"] < 0
    assert (loss["verdict"], loss["rows_needed"], accuracy["verdict"]) == ("better", None, "not decided")
    assert re.search(r"│ loss .*-\S+ \(-\S+ to -\S+\) │ better ", outcome.out)
    assert "answer accuracy" in outcome.out and f"chat run={folder}" in outcome.out.replace("\n", "")


ONLINE = ["method.rewards=[contains_answer]", "method.max_new_tokens=4"]


@pytest.mark.parametrize(
    ("method", "words", "shown"),
    [
        ("sft", ["method.packing=true"], {"loss", "perplexity", "accuracy"}),
        ("kto", [], {"loss", "accuracy", "rewards/chosen", "rewards/rejected"}),  # of some rows each
        ("orpo", [], {"loss", "perplexity", "accuracy", "rewards/accuracies", "rewards/margins", "rewards/chosen",
                      "rewards/rejected", "logps/chosen", "logps/rejected"}),  # a loss of two terms
        ("self_supervised", ["data.max_length=64", "data.too_long=truncate"], {"loss", "perplexity", "cloze"}),
        ("grpo", ONLINE, {"accuracy", "reward"}),
    ],
)  # fmt: skip
def test_the_rows_of_every_score_give_the_score(ftcore, method, words, shown):
    outcome = ftcore(*FAST, "max_steps=1", "evaluate.max_rows=7", f"method={method}", *words)
    assert outcome.status == 0, outcome.err
    by_row, tuned = Run(outcome.folder).row_scores(), outcome.summary["tuned"]
    assert outcome.summary["intervals"].keys() == shown <= by_row.keys()
    for name in shown:
        score = by_row[name]
        value = sum(sum(sums) / sum(counts) for sums, counts in zip(score["sums"], score["counts"], strict=True))
        assert (math.exp(value) if score["exponential"] else value) == pytest.approx(tuned[name], rel=1e-6, abs=1e-9)


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_give_the_rows_of_one(ftcore, monkeypatch, tmp_path):
    """The base model's but for rounding, since batches are padded otherwise; so are the tuned model's weights."""
    words = [*FAST[:-1], "max_steps=2", "evaluate.max_rows=37", "method=self_supervised"]  # with general text
    scored = []
    for hardware in ("cpu", "ddp_2cpu"):
        monkeypatch.setenv("FTCORE_HOME", str(tmp_path / hardware))
        outcome = ftcore(*words, f"hardware={hardware}", f"name={hardware}")
        assert outcome.status == 0, outcome.err
        scored.append((json.loads((outcome.folder / "base.json").read_text()), outcome.summary["intervals"]))
    ((one, answers, _), found), ((two, same_answers, _), same) = scored
    assert one.keys() == two.keys() and answers == same_answers
    assert all(one[name] == (value and pytest.approx(value, rel=1e-6)) for name, value in two.items())
    assert found.keys() == same.keys() >= {"loss", "cloze", "probe_perplexity"}
    for name, interval in found.items():
        assert same[name]["verdict"] == interval["verdict"]
        for side in ("low", "high"):
            assert same[name][side] == pytest.approx(interval[side], rel=1e-3, abs=1e-6)


def test_own_rows_train_after_naming_two_columns(ftcore, rows):
    outcome = ftcore(*FAST, "max_steps=2", "data=jsonl", f"data.path={rows(*OWN)}", *COLUMNS)
    assert outcome.status == 0, outcome.err
    assert outcome.summary["tuned"]["loss"] < outcome.summary["base"]["loss"]


@pytest.mark.parametrize("adapter", ["dora", "rslora", "full", "freeze"])
def test_every_adapter_trains_and_its_result_loads(ftcore, adapter):
    words = ["adapter.top_layers=1"] if adapter == "freeze" else []
    outcome = ftcore(*FAST, "max_steps=2", f"adapter={adapter}", *words)
    assert outcome.status == 0, outcome.err
    assert outcome.summary["tuned"]["loss"] < outcome.summary["base"]["loss"]
    assert ftcore("chat", f"run={outcome.folder}", "prompt=What is it?").status == 0


def test_qlora_without_its_package_or_gpu_is_a_clear_error(fails):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert "adapter=lora" in fails(4, *FAST, "adapter=qlora")


def test_full_result_loads_with_transformers(ftcore):
    outcome = ftcore(*FAST, "max_steps=1", "adapter=full")
    assert (
        AutoModelForCausalLM.from_pretrained(outcome.folder / "model").num_parameters() == outcome.summary["parameters"]
    )


def test_a_run_goes_on_from_an_earlier_run(ftcore, trained):
    again = ftcore(*FAST, "max_steps=1", f"model.path={trained.folder}")
    assert again.status == 0, again.err
    assert again.summary["base"]["loss"] == pytest.approx(trained.summary["tuned"]["loss"], abs=1e-4)


def test_dry_run_counts_and_trains_nothing(ftcore):
    outcome = ftcore(*FAST, "dry_run=true")
    assert outcome.status == 0 and "steps" in outcome.out and "GB on one device" in outcome.out
    assert not (outcome.cwd / "runs").exists()


def test_the_best_validation_becomes_the_model_and_patience_stops(ftcore):
    words = ["data.validation_share=0.1", "validate_every=1", "keep_best=val/loss", "patience=2", "max_steps=12"]
    words += [
        "adapter=full",
        "method.lr=0.1",
        "method.warmup=0",
        "method.schedule=constant",
        "retention.weight=0",
    ]
    outcome = ftcore(*FAST, *words)
    assert outcome.status == 0, outcome.err
    validations = {line["step"]: line["val/loss"] for line in outcome.metrics if "val/loss" in line}
    best = min(validations, key=validations.get)
    assert outcome.summary["steps"] == best + 2 < 12
    (file,) = (outcome.folder / "checkpoints" / f"best-{best:08d}").iterdir()
    kept = load_file(file)
    model = load_file(outcome.folder / "model" / "model.safetensors")
    assert torch.equal(model["model.norm.weight"], kept["model.norm.weight"])


def test_an_unknown_metric_to_keep_is_named(fails):
    words = ["data.validation_share=0.1", "validate_every=1", "keep_best=val/x", "max_steps=2"]
    assert "val/loss" in fails(2, *FAST, *words)


def test_a_learning_rate_that_explodes_ends_with_exit_code_6(fails):
    message = fails(6, *FAST, "max_steps=30", "method.lr=1e30", "method.max_grad_norm=1e30", "adapter=full")
    assert "not finite" in message or "The loss is" in message


def test_all_rows_without_a_trained_token_is_an_error(fails, rows):
    path = rows(*({"prompt": f"{k} " * 50, "completion": "x"} for k in range(8)))
    message = fails(3, *FAST, "data=jsonl", f"data.path={path}", "data.max_length=16", "data.too_long=truncate")
    assert "7 of 7 training rows are left without a trained token" in message


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_starts(fails, tmp_path):
    (tmp_path / "file").write_text("")
    assert "output_dir" in fails(7, *FAST, f"output_dir={tmp_path / 'file'}")


# What a run may forget.

PROBE = "evaluate.probe=ftcore://general/passages.test.jsonl"
WATCHED = [*FAST, PROBE, "adapter=full", "retention.weight=0", "retention.max_rise=0.01", "retention.check_every=2"]
WATCHED += ["method.lr=0.05", "method.warmup=0", "method.schedule=constant"]


def test_a_run_that_forgets_too_much_stops_and_keeps_what_it_has(ftcore):
    outcome = ftcore(*WATCHED, "max_steps=12")
    assert outcome.status == 0, outcome.err
    rises = {line["step"]: line["retention/rise"] for line in outcome.metrics if "retention/rise" in line}
    assert outcome.summary["steps"] == max(rises) < 12
    assert list(rises) == list(range(2, max(rises) + 1, 2))  # looked at every second step
    assert rises.popitem()[1] > 0.01 and all(rise <= 0.01 for rise in rises.values())
    assert "stopping" in outcome.out and "retention.max_rise=0.01" in outcome.out
    assert outcome.summary["probe_perplexity_rise"] > 0.01 and (outcome.folder / "model").is_dir()


def test_a_run_that_forgets_too_much_goes_on_at_half_the_learning_rate(ftcore, monkeypatch):
    used, step = [], torch.optim.AdamW.step

    def recorded(self, *args, **kwargs):
        used.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    outcome = ftcore(*WATCHED, "max_steps=6", "retention.action=halve_lr")
    assert outcome.status == 0, outcome.err
    steps = [line for line in outcome.metrics if "train/lr" in line]
    rises = {line["step"]: line["retention/rise"] for line in outcome.metrics if "retention/rise" in line}
    expected, lr = [], 0.05
    for k in range(1, 7):
        expected.append(lr)
        lr /= 2 if rises.get(k, 0) > 0.01 else 1
    assert min(expected) < 0.05 and list(rises) == [2, 4, 6]
    assert [line["train/lr"] for line in steps] == pytest.approx(expected)
    assert used == pytest.approx(expected)  # what is logged is what was used


def test_a_run_within_the_limit_is_left_alone(ftcore):
    outcome = ftcore(*WATCHED, "max_steps=3", "retention.max_rise=1000")
    assert outcome.status == 0 and outcome.summary["steps"] == 3, outcome.err


def test_a_limit_without_general_text_to_look_at_is_an_error(fails):
    assert "evaluate.probe" in fails(2, *FAST, "retention.max_rise=0.01")


# Several processes.


@pytest.mark.slow  # unmarked: test_invariance.py
@pytest.mark.processes
def test_two_processes_give_one_run(ftcore):
    outcome = ftcore("model=tiny", "logger=none", "max_steps=2", "evaluate.max_new_tokens=2", "hardware=ddp_2cpu")
    assert outcome.status == 0, outcome.err
    assert outcome.summary["base"]["rows"] == 168 and len(outcome.metrics) == 2


def test_what_is_seldom_meant_is_said_before_training(ftcore, rows):
    few = rows(*({"prompt": f"Which is {k}?", "completion": f"{k}."} for k in range(12)))
    words = ["data=jsonl", f"data.path={few}", "data.test_share=0", "data.validation_share=0.2", "validate_every=9"]
    outcome = ftcore(*FAST, *words, "max_steps=2", "method.lr=2", "hardware=cpu", "dry_run=true")
    said = " ".join(outcome.out.split())
    assert outcome.status == 0, outcome.err
    for part in (
        "no row is held out",
        "method.lr=2: steps of this size destroy what the model knows",
        "training rows, so no step has 16: each step takes all",
        "validate_every=9 is beyond the last of 2 steps: validation comes once, after it",
        "checkpoints.every=50 is beyond the last of 2 steps: only a signal writes a checkpoint",
    ):
        assert part in said
    assert "notice" not in ftcore(*FAST, "max_steps=50", "dry_run=true").out


def test_a_failure_in_one_process_keeps_its_exit_code(fails):
    message = fails(
        6, *FAST, "hardware=ddp_2cpu", "max_steps=30", "method.lr=1e30", "method.max_grad_norm=1e30", "adapter=full"
    )
    assert "NumericalError (process" in message


# Weights & Biases.


def offline_records(folder):
    """Records of the run file: a 7-byte header, then LevelDB's log format (blocks of 32 KiB, records in parts)."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        size, part = struct.unpack("<HB", content[position + 4 : position + 7])
        whole += content[position + 7 : position + 7 + size]
        position += 7 + size
        if part in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_has_every_step_the_table_and_no_command_line(ftcore):
    outcome = ftcore(*FAST, "max_steps=4", "logger=wandb")
    assert outcome.status == 0, outcome.err
    assert "upload with: wandb sync" in outcome.out, outcome.out
    records = list(offline_records(outcome.folder))
    steps, keys = [], set()
    for record in records:
        items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        keys |= set(items)
        if "train/loss" in items:
            steps.append(json.loads(items["trainer/global_step"]))
    assert steps == [1, 2, 3, 4]
    assert {"train/lr", "train/grad_norm", "train/tokens_per_second", "train/tokens", "before_after", "samples"} <= keys
    assert not any("pytest" in str(record.environment) for record in records)


# Verbs.


def test_eval_scores_a_run_on_other_rows(ftcore, trained, rows):
    outcome = ftcore("eval", f"run={trained.folder}", "data=jsonl", f"data.path={rows(*OWN)}", *COLUMNS)
    assert outcome.status == 0, outcome.err
    predictions = re.search(r"Predictions of .*: (\S+predictions.jsonl)", outcome.out.replace("\n", ""))[1]
    assert json.loads(Path(predictions).read_text().splitlines()[0])["expected"].endswith(".")


def test_compare_shows_a_run_beside_its_base_and_beside_another(ftcore, trained):
    outcome = ftcore("compare", f"run={trained.folder}")
    assert outcome.status == 0 and "base" in outcome.out, outcome.err
    other = ftcore(*FAST, "max_steps=1").folder
    outcome = ftcore("compare", f"run={trained.folder}", f"other={other}")
    assert outcome.status == 0 and other.name[:10] in outcome.out, outcome.err


def test_other_data_gets_another_file(ftcore, trained, rows):
    for name in ("a.jsonl", "b.jsonl"):
        path = rows({"prompt": f"What is {name}?", "completion": "x"}, name=name)
        assert ftcore("eval", f"run={trained.folder}", "data=jsonl", f"data.path={path}").status == 0
    assert len(list(trained.folder.glob("eval-jsonl-*.json"))) == 2


def test_chat_answers_a_prompt_and_standard_input(ftcore, trained, monkeypatch):
    import io

    assert ftcore("chat", f"run={trained.folder}", "prompt=What's this, or that?").status == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n\nAnd this?\n"))
    assert ftcore("chat", f"run={trained.folder}").status == 0


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_export_is_checked_against_the_run(ftcore, trained, form):
    outcome = ftcore("export", f"run={trained.folder}", f"format={form}")
    assert outcome.status == 0 and "5 of 5 prompts" in outcome.out, outcome.err
    assert ftcore("export", f"run={trained.folder}", f"format={form}").status == 7


# What is printed.


def test_a_printed_command_can_be_pasted_whatever_the_folders_are_called(ftcore):
    place = "my runs, [v1] x[:y] it's"
    outcome = ftcore(*FAST, "max_steps=1", f"output_dir={place}", "logger=wandb_tensorboard", "logger.mode=offline")
    assert outcome.status == 0, outcome.err
    (folder,) = outcome.cwd.glob(f"{glob.escape(place)}/*/*")
    assert f"Everything is in {folder}\n" in outcome.out
    printed = {line.partition(": ")[0]: line.rpartition(": ")[2] for line in outcome.out.splitlines()}
    command = shlex.split(printed["Next"])
    assert command == ["python", "-m", "ftcore", "chat", f"run={folder}"]
    assert ftcore(*command[3:], "prompt=What is it?").status == 0
    for name, program in (("TensorBoard", "tensorboard"), ("W&B wrote offline; upload with", "wandb")):
        first, *_, last = shlex.split(printed[name])
        assert first == program and Path(last).is_dir()


SHORT_RUN = ["model=tiny", "logger=none", "max_steps=1", "evaluate.max_rows=2", "evaluate.max_new_tokens=2"]


def in_a_process(folder, out, *words, **environment):
    """Exit status and standard error of a command that writes to `out`."""
    command = [sys.executable, "-m", "ftcore", *words]
    environment = os.environ | environment | {"PYTHONPATH": str(PACKAGE.parent)}
    ended = subprocess.run(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, ended.stderr


@pytest.mark.parametrize(
    "words",
    [
        [],
        pytest.param(["hardware=ddp_2cpu"], marks=[pytest.mark.slow, pytest.mark.processes]),
        pytest.param(["-m", "seed=1,2"], marks=pytest.mark.slow),
    ],
)
def test_a_stream_that_cannot_hold_a_character_gets_another(tmp_path, rows, words):
    path = rows(*({"prompt": f"¿Qué es 你好 {k}?", "completion": "• …"} for k in range(20)))
    with (tmp_path / "out").open("wb") as out:
        command = [*SHORT_RUN, "data=jsonl", f"data.path={path}", *words]
        status, error = in_a_process(tmp_path, out, *command, PYTHONIOENCODING="ascii")
    assert status == 0, error
    shown = "".join(file.read_text("ascii") for file in (tmp_path / "out", *tmp_path.glob("runs/**/output.log")))
    assert "+---" in shown and r"\xbfQu\xe9 es \u4f60\u597d" in shown and re.search(r":\d\d \* \d:", shown)
    assert list(tmp_path.glob("runs/**/summary.json"))


def test_a_reader_that_leaves_ends_no_run(tmp_path):
    theirs, ours = os.pipe()
    os.close(theirs)
    assert in_a_process(tmp_path, ours, *SHORT_RUN) == (0, "")
    assert list(tmp_path.glob("runs/*/*/summary.json"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_device_behind_standard_output_ends_no_run_and_is_said(tmp_path):
    with open("/dev/full", "wb") as full:
        status, error = in_a_process(tmp_path, full, *SHORT_RUN)
    assert status == 7 and "Standard output cannot be written: No space left on device" in error
    assert list(tmp_path.glob("runs/*/*/summary.json"))


def test_a_long_message_of_a_template_is_shortened_and_steers_no_terminal(fails, tmp_path):
    (tmp_path / "evil.jinja").write_text("{{ raise_exception('\x1b[31mboom\x9b' ~ 'A' * 100000) }}")
    message = fails(3, *FAST, "model.chat_template=evil.jinja")
    assert "[31mboom" in message and "characters left out" in message and len(message) < 5000
    assert not {"\x1b", "\x9b"} & set(message)


@pytest.mark.parametrize("more", [["max_steps=3"], ["max_steps=2", "evaluate.enabled=false"], ["max_steps=2"]], ids=str)
def test_a_run_that_ends_without_finite_numbers_is_not_done(ftcore, more):
    outcome = ftcore(*FAST, "method.lr=1e30", "retention.weight=0", "max_bad_steps=3", *more)
    assert outcome.status == 6 and "not finite" in outcome.err and "Done" not in outcome.out
    text = (outcome.folder / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["failure"] and not Run(outcome.folder).finished
