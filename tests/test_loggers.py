"""Each experiment tracker has what metrics.jsonl and summary.json have, also when a stopped run goes on."""

import json
import math
import struct

import pytest
import yaml
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ftcore.config.tree import flatten
from tests.conftest import FAST
from tests.test_run import offline_records

WORDS = [*FAST, "hardware=cpu", "global_batch_size=8", "max_steps=2", "validate_every=2", "data.validation_share=0.1"]


def test_a_folder_that_a_store_cannot_be_named_by_is_refused(fails):
    assert "the ? or % of" in fails(2, *WORDS, "logger=mlflow", "output_dir=what?")


def events(folder):
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def in_tensorboard(folder):
    found = events(folder)
    return [(tag, event.step, event.value) for tag in found.Tags()["scalars"] for event in found.Scalars(tag)]


def store(folder):
    """Client and only run of the MLflow store."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([found.experiment_id for found in client.search_experiments()])
    return client, run


def in_mlflow(folder):
    client, run = store(folder)
    histories = [client.get_metric_history(run.info.run_id, key) for key in run.data.metrics]
    return [(metric.key, metric.step, metric.value) for history in histories for metric in history]


def written(outcome, exact=lambda value: value):
    """(name, step, value) of every number that metrics.jsonl and summary.json hold."""
    assert outcome.status == 0, outcome.err
    lines = [(key, line["step"], line[key]) for line in outcome.metrics for key in line if key != "step"]
    ends = [(key.replace(".", "/"), outcome.summary["steps"], value) for key, value in flatten(outcome.summary)]
    return sorted((key, step, exact(value)) for key, step, value in lines + ends if isinstance(value, int | float))


def float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


READERS = {"tensorboard": (in_tensorboard, float32), "mlflow": (in_mlflow, float)}


def test_tensorboard_has_every_number_and_the_config_beside_the_scores(ftcore):
    outcome = ftcore(*WORDS, "logger=tensorboard", "method.lr=3e-4")
    found = in_tensorboard(outcome.folder)
    assert sorted(found) == written(outcome, float32)
    assert {"train/loss", "val/loss", "base/accuracy", "tuned/loss", "tokens_per_second"} <= {key for key, *_ in found}
    shown = events(outcome.folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(shown).session_start_info.hparams
    assert values["method.lr"].number_value == 3e-4 and values["choices.adapter"].string_value == "lora"
    assert yaml.safe_load((outcome.folder / "tensorboard" / "hparams.yaml").read_text())["method.lr"] == 3e-4
    assert "tensorboard --logdir" in outcome.out


def test_mlflow_has_every_number_and_the_config_and_nothing_of_user_or_repository(ftcore, monkeypatch):
    from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    outcome = ftcore(*WORDS, "logger=mlflow", "method.lr=3e-4")
    assert MLFLOW_DISABLE_TELEMETRY.get()
    assert sorted(in_mlflow(outcome.folder)) == written(outcome)
    _, run = store(outcome.folder)
    assert (run.data.params["method.lr"], run.data.params["choices.adapter"]) == ("0.0003", "lora")
    assert run.data.tags == {"mlflow.runName": outcome.folder.name}
    assert (run.info.user_id, run.info.status) == ("unknown", "FINISHED")
    assert "mlflow ui" in outcome.out and "INFO" not in outcome.err and not (outcome.cwd / "mlruns").exists()


def test_wandb_and_tensorboard_both_have_every_step(ftcore):
    outcome = ftcore(*WORDS, "logger=wandb_tensorboard", "logger.mode=offline", "logger.project=both")
    assert sorted(in_tensorboard(outcome.folder)) == written(outcome, float32)
    losses = {}
    for record in offline_records(outcome.folder):
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in items:
            losses[items["trainer/global_step"]] = items["train/loss"]
    assert losses == {line["step"]: line["train/loss"] for line in outcome.metrics if "train/loss" in line}
    assert outcome.out.index("wandb sync") < outcome.out.index("tensorboard --logdir")


@pytest.mark.parametrize("logger", READERS)
def test_a_run_that_goes_on_writes_to_the_same_place_and_no_step_twice(ftcore, logger, monkeypatch):
    words = [*WORDS, f"logger={logger}", "max_steps=5", "checkpoints.every=2"]
    monkeypatch.setenv("FTCORE_FAULTS", "raise step=4")
    with pytest.raises(RuntimeError, match="asked for"):
        ftcore(*words)
    monkeypatch.delenv("FTCORE_FAULTS")
    outcome = ftcore(*words, "max_steps=6", "resume=auto")
    assert "Going on after step 2 of 6" in outcome.out
    read, exact = READERS[logger]
    assert sorted(read(outcome.folder)) == written(outcome, exact)
    assert [step for key, step, _ in read(outcome.folder) if key == "train/loss"] == [1, 2, 3, 4, 5, 6]
    if logger == "mlflow":
        _, run = store(outcome.folder)
        assert (run.info.status, run.data.params["max_steps"]) == ("FINISHED", "6")


def test_a_value_that_is_no_number_is_kept_and_odd_keys_of_the_config_harm_nothing(tmp_path):
    from ftcore.train.loggers import mlflow_logger, tensorboard_logger

    for build in (tensorboard_logger, mlflow_logger):
        (logger,) = build(tmp_path, {"name": "odd", "data": {"sources": {"a/b:c": {}}}})
        logger.log_metrics({"val/loss": math.nan}, step=3)
    for key, step, value in (*in_tensorboard(tmp_path), *in_mlflow(tmp_path)):
        assert (key, step) == ("val/loss", 3) and math.isnan(value)


@pytest.mark.parametrize(
    ("logger", "extra"), [("tensorboard", "tensorboard"), ("wandb_tensorboard", "tensorboard"), ("mlflow", "mlflow")]
)
def test_a_tracker_that_is_not_installed_is_named_before_weights_are_loaded(fails, monkeypatch, logger, extra):
    monkeypatch.setattr("ftcore.train.loggers.find_spec", lambda module: None)
    monkeypatch.setattr("ftcore.train.run.prepare", lambda *_: pytest.fail("weights are loaded"))
    message = fails(2, *WORDS, f"logger={logger}")
    assert f"pip install 'ftcore[{extra}]'" in message and len(message.strip().splitlines()) == 1


def test_a_sweep_of_wandb_needs_wandb(fails):
    assert "needs logger=wandb" in fails(2, "wandb_sweep", "sweeps=lora_rank", *FAST, "logger=mlflow")


@pytest.mark.slow
def test_other_sweeps_do_not(ftcore):
    outcome = ftcore("-m", "seed=1,2", *FAST, "max_steps=1", "logger=tensorboard")
    assert outcome.status == 0, outcome.err
    assert len(list(outcome.cwd.glob("runs/*/sweep-*/*/*/tensorboard"))) == 2
    assert not list(outcome.cwd.rglob("wandb"))


@pytest.mark.slow
@pytest.mark.parametrize("logger", READERS)
def test_only_the_first_of_several_processes_writes(ftcore, logger):
    read, exact = READERS[logger]
    outcome = ftcore(*WORDS, "hardware=ddp_2cpu", f"logger={logger}")
    assert sorted(read(outcome.folder)) == written(outcome, exact)
