"""What can be done with finished runs: eval, compare, chat and export."""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from ftcore.config.build import build, locate
from ftcore.console import console, quiet
from ftcore.data import Records
from ftcore.data.sources import rows_of
from ftcore.data.tokens import Encoder
from ftcore.errors import ConfigError, ModelError, StorageError
from ftcore.evaluate.held_out import load_held_out
from ftcore.evaluate.score import HeldOut, changes, score
from ftcore.evaluate.tables import comparison, samples_table, side_by_side
from ftcore.files import write_json, write_lines
from ftcore.methods.base import Method
from ftcore.models.foundation import Foundation, load_foundation, load_run, save_model
from ftcore.rollout.greedy import generate

Config = dict[str, Any]


def evaluate(config: Config) -> None:
    """Score a run on any data option: a table, scores and predictions in the run's folder.

    Of the run's own data the held-out rows are scored; of other data all rows, or its test file.
    """
    folder = _run(config, "run")
    foundation, run_config = _load(config, folder)
    data = build(config["data"])
    kind = locate(config["method"]).record_type
    records = data.load(kind) if config["data"] == run_config["data"] else data.whole(kind)
    method, held_out = _held_out(config, foundation, records)
    tuned, answers = score(method, held_out, config["evaluate"], "tuned model")
    base, base_answers = _base(config, method, held_out)
    samples = side_by_side(base_answers, answers)
    stem = f"eval-{config['choices']['data']}-{records.content_hash[:8]}"
    write_json(folder / f"{stem}.json", {"base": base, "tuned": tuned, **changes(base, tuned)})
    write_lines(folder / f"{stem}-predictions.jsonl", samples)
    _show(config, base, tuned, samples, ("base", "tuned"))
    counts = f"{len(held_out.rows)} of {len(records.test)} rows (evaluate.max_rows={config['evaluate']['max_rows']})"
    console.print(f"Predictions of {counts}: {folder / stem}-predictions.jsonl", soft_wrap=True, highlight=False)


def compare(config: Config) -> None:
    """Two runs, or a run and its base, on the same held-out rows: table and samples."""
    folder = _run(config, "run")
    foundation, _ = _load(config, folder)
    records = build(config["data"]).load(locate(config["method"]).record_type)
    method, held_out = _held_out(config, foundation, records)
    second, second_answers = score(method, held_out, config["evaluate"], folder.name)
    if config["other"] is None:
        first, first_answers = _base(config, method, held_out)
        names = ("base", folder.name)
    else:
        other = _run(config, "other")
        rival, _ = _load(config, other)
        first, first_answers = score(*_held_out(config, rival, records), config["evaluate"], other.name)
        names = (other.name, folder.name)
        if len(rival.tokenizer) != len(foundation.tokenizer):
            print("The runs have different tokenizers: their losses and perplexities per token cannot be compared.")
    _show(config, first, second, side_by_side(first_answers, second_answers), names)


def chat(config: Config) -> None:
    """Answer `prompt=`, or every line of standard input until it ends."""
    foundation, _ = _load(config, _run(config, "run"))
    if not foundation.network.can_generate():
        raise ConfigError("This run's model writes nothing: it scores answers or fills in words.")
    encoder = Encoder(foundation.tokenizer, build(config["data"]))
    questions = [config["prompt"]] if config["prompt"] else sys.stdin
    if sys.stdin.isatty() and not config["prompt"]:
        print("Type a question and press Enter; Ctrl-D ends.")
    for question in questions:
        if question.strip():
            with torch.inference_mode():
                answer = generate(foundation.network, encoder, [encoder.prompt({"prompt": question.strip()})], 256)[0]
            print(answer, flush=True)


def export(config: Config) -> None:
    """Write `export/<format>`: the adapter merged into one model, or the adapter alone, checked to answer as the run does."""
    folder = _run(config, "run")
    target = folder / "export" / config["format"]
    if target.exists():
        raise StorageError(f"{target} exists already; remove it to export again.")
    target.parent.mkdir(exist_ok=True)
    foundation, run_config = _load(config, folder)
    if config["format"] == "adapter" and not foundation.has_adapter:
        raise ConfigError("This run has no adapter: every weight was trained. Use format=merged.")
    encoder = Encoder(foundation.tokenizer, build(config["data"]))
    questions = [row["prompt"] for _, row in rows_of("ftcore://medical/prompts.test.jsonl")][:5]
    prompts = [encoder.prompt({"prompt": question}) for question in questions]
    expected = _behaviour(foundation, encoder, prompts)
    if config["format"] == "merged" and foundation.has_adapter:
        foundation.network = foundation.network.merge_and_unload()
    unchecked = target.with_name("unchecked")
    shutil.rmtree(unchecked, ignore_errors=True)
    save_model(foundation, unchecked)
    got = _behaviour(_reloaded(config, run_config, unchecked), encoder, prompts)
    if got != expected:
        same = sum(a == b for a, b in zip(got, expected, strict=True))
        raise ModelError(f"The exported model answers {same} of 5 prompts as the run does: not written as {target}.")
    unchecked.rename(target)
    console.print(f"Wrote {target}; it answers 5 of 5 prompts as the run does.", soft_wrap=True)


def _reloaded(config: Config, run_config: Config, folder: Path) -> Foundation:
    if config["format"] == "merged":
        return _base_foundation(
            {**run_config, "model": {**run_config["model"], "path": str(folder), "random_weights": False}}
        )
    from peft import PeftModel

    base = _base_foundation(run_config)
    base.network = PeftModel.from_pretrained(base.network, folder)
    return _placed(config, base)


def _behaviour(foundation: Foundation, encoder: Encoder, prompts: list[list[int]]) -> list[Any]:
    """What a network does with prompts: greedy answers, else the likeliest token of each position, else scores."""
    network = foundation.network
    with torch.inference_mode():
        if network.can_generate():
            return generate(network, encoder, prompts, 24)
        outputs = [network(input_ids=torch.tensor([prompt], device=network.device)).logits[0] for prompt in prompts]
    return [out.argmax(-1).tolist() if out.ndim > 1 else f"{out.item():.3f}" for out in outputs]


def _run(config: Config, key: str) -> Path:
    if not config[key]:
        raise ConfigError(f"`{config['verb']}` needs {key}=<run folder>, such as {key}=runs/<name>/<time>.")
    return Path(config[key]).expanduser()


def _load(config: Config, folder: Path) -> tuple[Foundation, Config]:
    """A run's model on the machine that hardware names, and its config."""
    quiet()
    foundation, run_config = load_run(folder)
    return _placed(config, foundation), run_config


def _placed(config: Config, foundation: Foundation) -> Foundation:
    accelerator = build(config["hardware"])["accelerator"]
    foundation.network.to("cuda" if accelerator == "gpu" else "cpu").eval()
    return foundation


def _held_out(config: Config, foundation: Foundation, records: Records) -> tuple[Method, HeldOut]:
    """The method around a run's network, and what it is scored on."""
    if not foundation.has_adapter and foundation.frozen_copy is None:
        foundation.frozen_copy = _base_foundation(config).network
    data = build(config["data"])
    method: Method = build(config["method"], foundation, Encoder(foundation.tokenizer, data))
    method.micro_batch_size = config["evaluate"]["batch_size"]
    return method, load_held_out(config, data, method, records)


def _base_foundation(config: Config) -> Foundation:
    """The foundation that a run started from."""
    kind = locate(config["method"])
    node = {key: value for key, value in config["model"].items() if key != "_target_"}
    torch.manual_seed(config["seed"])
    foundation = load_foundation(kind.architecture_of(config["method"]), **node)
    foundation.add_control_tokens(kind.control_tokens(config["method"], foundation.tokenizer))
    return _placed(config, foundation)


def _base(config: Config, method: Method, held_out: HeldOut) -> Any:
    """Scores of the foundation that the run started from."""
    with method.foundation.base_view() as network:
        tuned, method.network = method.network, network
        result = score(method, held_out, config["evaluate"], "base model")
        method.network = tuned
    return result


def _show(config: Config, first: Any, second: Any, samples: list[Config], names: tuple[str, str]) -> None:
    console.print(comparison(first, second, names))
    if samples and config["evaluate"]["samples"]:
        console.print(samples_table(samples, config["evaluate"]["samples"], names))


def inspect_data(config: Config) -> None:
    """What the rows of a config are like."""
    from ftcore.verbs.inspect_data import inspect

    quiet()
    inspect(config)
