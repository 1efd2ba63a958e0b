"""What can be done with finished runs: eval, compare, chat and export."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from peft import PeftModel

from ftcore.config.build import build, record_type
from ftcore.console import console, plain, quiet, wide_console
from ftcore.data import Data, Records
from ftcore.data.sources import Row, rows_of
from ftcore.data.tokens import Encoder
from ftcore.errors import ConfigError, ModelError, StorageError, model_errors
from ftcore.evaluate.held_out import load_held_out
from ftcore.evaluate.score import Measured, changes, score
from ftcore.evaluate.tables import comparison, intervals, samples_table, side_by_side
from ftcore.methods.base import HeldOut, Method, RunContext
from ftcore.models.base_name import base_of
from ftcore.models.foundation import Foundation, foundation_of, load_base, load_run, merged
from ftcore.models.precision import cast_weights, computing_in, forbid_tf32
from ftcore.models.saving import save_model
from ftcore.rollout.sample import generate
from ftcore.run_folder import Run
from ftcore.settings import Config, Machine
from ftcore.train.card import model_card

Answer = dict[str, object]


def evaluate(config: Config) -> Answer:
    """Score a run on any data option: a table, scores and predictions in the run's folder.

    Of the run's own data the held-out rows are scored; of other data all rows, or its test file.
    """
    run = _run(config)
    foundation, run_config = load_here(config, run)
    data, kind = build(config["data"], Data), record_type(config["method"])
    records = data.load(kind) if config["data"] == run_config["data"] else data.load_as_test(kind)
    method, held_out = _held_out(config, foundation, records)
    tuned = _scored(config, method, held_out, "tuned model")
    with method.base_model():
        base = _scored(config, method, held_out, "base model")
    samples = side_by_side(base.answers, tuned.answers)
    differences = _show(config, base, tuned, samples, ("base", "tuned"))
    scores = {"base": base.scores, "tuned": tuned.scores, **differences}
    stem = f"eval-{config['choices']['data']}-{records.content_hash[:8]}"
    predictions = run.write_evaluation(stem, scores, samples)
    counts = f"{len(held_out.rows)} of {len(records.test)} rows (evaluate.max_rows={config['evaluate']['max_rows']})"
    plain.print(f"Predictions of {counts}: {predictions}")
    return {"run": str(run), "rows": len(held_out.rows), "predictions": str(predictions), **scores}


def compare(config: Config) -> Answer:
    """Two runs, or a run and its base, on the same held-out rows: table and samples."""
    run, other = _run(config), config["compare"]["other"]
    foundation, _ = load_here(config, run)
    records = build(config["data"], Data).load(record_type(config["method"]))
    method, held_out = _held_out(config, foundation, records)
    second = _scored(config, method, held_out, run.name)
    if other is None:
        names = ("base", run.name)
        with method.base_model():
            first = _scored(config, method, held_out, "base model")
    else:
        rival, names = load_here(config, Run(other))[0], (Run(other).name, run.name)
        first = _scored(config, *_held_out(config, rival, records), names[0])
        if len(rival.tokenizer) != len(foundation.tokenizer):
            plain.print(
                "The runs have different tokenizers: their losses and perplexities per token cannot be compared."
            )
    differences = _show(config, first, second, side_by_side(first.answers, second.answers), names)
    return {"names": list(names), "first": first.scores, "second": second.scores, **differences}


def chat(config: Config) -> None:
    """Answer `prompt=`, or every line of standard input until it ends."""
    foundation, encoder = load_writer(config, _run(config))
    asked = config["chat"]["prompt"]
    if sys.stdin.isatty() and not asked:
        plain.print("Type a question and press Enter; Ctrl-D ends.")
    for question in [asked] if asked else sys.stdin:
        if question.strip():
            with torch.inference_mode(), computing_here(config):
                prompts = encoder.prompt_ids([{"prompt": question.strip()}])
                plain.print(generate(foundation.network, encoder, prompts, 256)[0])


def export(config: Config) -> None:
    """Write `export/<format>`: the adapter merged into one model, or the adapter alone, checked to answer as the run does."""
    run = _run(config)
    run.exports.mkdir(exist_ok=True)
    # All digits are merged and compared.
    config = {**config, "hardware": {**config["hardware"], "precision": "32-true"}}
    with FileLock(run.exports / ".lock"):  # a second export waits
        _export(config, run, run.exports / config["export"]["format"])


def _export(config: Config, run: Run, target: Path) -> None:
    form = config["export"]["format"]
    if target.exists():
        raise StorageError(f"{target} exists already; remove it to export again.")
    foundation, run_config = load_here(config, run)
    if form == "adapter" and not foundation.has_adapter:
        raise ConfigError("This run has no adapter: every weight was trained. Use format=merged.")
    encoder = Encoder(foundation.tokenizer, build(config["data"], Data))
    questions = [row["prompt"] for _, row in rows_of("ftcore://medical/prompts.test.jsonl")][:5]
    prompts = encoder.prompt_ids([{"prompt": question} for question in questions])
    expected = _behaviour(foundation, encoder, prompts)
    if form == "merged":
        foundation = merged(foundation)
    unchecked = target.with_name("unchecked")
    shutil.rmtree(unchecked, ignore_errors=True)
    base = base_of(run_config["model"])
    save_model(foundation, unchecked, base, model_card(run_config, run.summary or {}, foundation, base))
    got = _behaviour(_reloaded(config, run_config, form, unchecked), encoder, prompts)
    if got != expected:
        same = sum(a == b for a, b in zip(got, expected, strict=True))
        raise ModelError(f"The exported model answers {same} of 5 prompts as the run does: not written as {target}.")
    unchecked.rename(target)
    plain.print(f"Wrote {target}; it answers 5 of 5 prompts as the run does.")


def _reloaded(config: Config, run_config: Config, form: str, folder: Path) -> Foundation:
    """The exported model as somebody else would load it."""
    if form == "adapter":
        foundation = load_base(run_config, _run(config))
        with model_errors(folder, " as an adapter"):
            return _placed(config, replace(foundation, network=PeftModel.from_pretrained(foundation.network, folder)))
    unquantised: Config = {**run_config, "adapter": {}}
    return _placed(config, foundation_of(unquantised, path=str(folder), random_weights=False))


def _behaviour(foundation: Foundation, encoder: Encoder, prompts: list[list[int]]) -> list[object]:
    """What a network does with prompts: greedy answers, else the likeliest token of each position, else scores."""
    network = foundation.network
    with torch.inference_mode():
        if network.can_generate():
            return [*generate(network, encoder, prompts, 24)]
        outputs = [network(input_ids=torch.tensor([prompt], device=network.device)).logits[0] for prompt in prompts]
    return [out.argmax(-1).tolist() if out.ndim > 1 else f"{out.item():.3f}" for out in outputs]


def _run(config: Config) -> Run:
    if not config["run"]:
        raise ConfigError(f"`{config['verb']}` needs run=<run folder>, such as run=runs/<name>/<time>.")
    return Run(config["run"])


def load_here(config: Config, run: Run) -> tuple[Foundation, Config]:
    """A run's model on the machine that hardware names, and its config."""
    quiet()
    forbid_tf32()
    foundation, run_config = load_run(run)
    return _placed(config, foundation), run_config


def load_writer(config: Config, run: Run) -> tuple[Foundation, Encoder]:
    """A run's model, and what turns prompts into its tokens. Raises `ConfigError` for a model that writes nothing."""
    foundation, _ = load_here(config, run)
    if not foundation.network.can_generate():
        raise ConfigError("This run's model writes nothing: it scores answers or fills in words.")
    return foundation, Encoder(foundation.tokenizer, build(config["data"], Data))


def _placed(config: Config, foundation: Foundation) -> Foundation:
    """The foundation on the machine that hardware names, with the weights that it computes with there."""
    machine = build(config["hardware"], Machine)
    cast_weights(foundation.network, machine.precision)
    foundation.network.to(machine.device).eval()
    return foundation


def computing_here(config: Config) -> torch.autocast:
    """The context to compute in as a run on this machine would."""
    machine = build(config["hardware"], Machine)
    return computing_in(machine.precision, machine.device)


def _scored(config: Config, method: Method, held_out: HeldOut, name: str) -> Measured:
    """The scores of a method's network."""
    with computing_here(config):
        return score(method, held_out, config["evaluate"], name)


def _held_out(config: Config, foundation: Foundation, records: Records) -> tuple[Method, HeldOut]:
    """The method around a run's network, and what it is scored on."""
    if not foundation.has_adapter:
        base = _placed(config, load_base(config, _run(config)))
        foundation = replace(foundation, frozen_copy=base.network)
    data = build(config["data"], Data)
    precision = build(config["hardware"], Machine).precision
    context = RunContext(micro_batch_size=config["evaluate"]["batch_size"], precision=precision)
    method = build(config["method"], Method, foundation, Encoder(foundation.tokenizer, data), context)
    return method, load_held_out(config, data, method, records)


def _show(config: Config, first: Measured, second: Measured, samples: list[Row], names: tuple[str, str]) -> Answer:
    """Print scores and samples side by side. Returns how the second model differs, and how sure that is."""
    differences = intervals(first.by_row, second.by_row)
    wide_console().print(comparison(first.scores, second.scores, differences, names))
    if samples and config["evaluate"]["samples"]:
        console.print(samples_table(samples, config["evaluate"]["samples"], names))
    return {"intervals": differences, **changes(first.scores, second.scores)}
