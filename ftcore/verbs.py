"""What can be done with finished runs: eval, compare, chat and export."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ftcore import report
from ftcore.config import build, locate
from ftcore.data.tokens import Encoder
from ftcore.errors import ConfigError, ModelError, StorageError
from ftcore.evaluate import changes, generate, score
from ftcore.model import Foundation, load_foundation, load_run, save_model
from ftcore.train import load_held_out, quiet

Config = dict[str, Any]


def evaluate(config: Config) -> None:
    """Score a run on any data option: a table, and `eval-<data>.json` and predictions in the run's folder."""
    folder = _run(config, "run")
    foundation, encoder, held_out = _load(config, folder)
    tuned, answers = _score(config, foundation, encoder, held_out, "tuned model")
    base, base_answers = _base(config, foundation, encoder, held_out)
    samples = report.side_by_side(base_answers, answers)
    stem = f"eval-{config['choices']['data']}"
    content = {"base": base, "tuned": tuned, **changes(base, tuned)}
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=2) + "\n")
    predictions = folder / f"{stem}-predictions.jsonl"
    predictions.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples))
    _show(config, base, tuned, samples, ("base", "tuned"))
    report.console.print(f"Predictions of every row: {predictions}", soft_wrap=True)


def compare(config: Config) -> None:
    """Two runs, or a run and its base, on the same held-out rows: table and samples."""
    folder = _run(config, "run")
    foundation, encoder, held_out = _load(config, folder)
    second, second_answers = _score(config, foundation, encoder, held_out, folder.name)
    if config["other"] is None:
        first, first_answers = _base(config, foundation, encoder, held_out)
        names = ("base", folder.name)
    else:
        other = _run(config, "other")
        rival, _ = load_run(other)
        first, first_answers = _score(config, rival, Encoder(rival.tokenizer, _data(config)), held_out, other.name)
        names = (other.name, folder.name)
    _show(config, first, second, report.side_by_side(first_answers, second_answers), names)


def chat(config: Config) -> None:
    """Answer `prompt=`, or every line of standard input until it ends."""
    folder = _run(config, "run")
    foundation, _ = load_run(folder)
    foundation.network.eval()
    encoder = Encoder(foundation.tokenizer, _data(config))
    questions = [config["prompt"]] if config["prompt"] else sys.stdin
    if sys.stdin.isatty() and not config["prompt"]:
        print("Type a question and press Enter; Ctrl-D ends.")
    for question in questions:
        if question.strip():
            with torch.inference_mode():
                answer = generate(foundation.network, encoder, [encoder.prompt(question.strip())], 256)[0]
            print(answer, flush=True)


def export(config: Config) -> None:
    """Write `export/<format>`: the adapter merged into one model, or the adapter alone, checked to answer as the run does."""
    folder = _run(config, "run")
    target = folder / "export" / config["format"]
    if target.exists():
        raise StorageError(f"{target} exists already; remove it to export again.")
    target.parent.mkdir(exist_ok=True)
    foundation, run_config = load_run(folder)
    encoder = Encoder(foundation.tokenizer, _data(config))
    method = locate(run_config["method"])
    rows = _data(config).load(method.record_type).test[:5]
    prompts = [encoder.prompt(row["prompt"]) for row in rows]
    expected = _greedy(foundation, encoder, prompts)
    if config["format"] == "merged" and foundation.has_adapter:
        foundation.network = foundation.network.merge_and_unload()
    save_model(foundation, target)
    written = _reloaded(config, run_config, target)
    if (got := _greedy(written, encoder, prompts)) != expected:
        same = sum(a == b for a, b in zip(got, expected, strict=True))
        raise ModelError(
            f"The exported model answers {same} of {len(rows)} prompts as the run does; {target} is not to be trusted."
        )
    report.console.print(
        f"Wrote {target}; greedy tokens equal to the run's on {len(rows)} of {len(rows)} prompts.", soft_wrap=True
    )


def _reloaded(config: Config, run_config: Config, target: Path) -> Foundation:
    node = {k: v for k, v in run_config["model"].items() if k != "_target_"}
    if config["format"] == "merged" or not (target / "adapter_config.json").is_file():
        return load_foundation(**{**node, "path": str(target), "random_weights": False})
    from peft import PeftModel

    torch.manual_seed(run_config["seed"])
    base = load_foundation(**node)
    return Foundation(PeftModel.from_pretrained(base.network, target), base.tokenizer)


def _greedy(foundation: Foundation, encoder: Encoder, prompts: list[list[int]]) -> list[str]:
    foundation.network.eval()
    with torch.inference_mode():
        return generate(foundation.network, encoder, prompts, 24)


def _run(config: Config, key: str) -> Path:
    if not config[key]:
        raise ConfigError(f"`{config['verb']}` needs {key}=<run folder>, such as {key}=runs/<name>/<time>.")
    return Path(config[key]).expanduser()


def _data(config: Config) -> Any:
    return build(config["data"])


def _load(config: Config, folder: Path) -> tuple[Foundation, Encoder, Any]:
    quiet()
    records = _data(config).load(locate(config["method"]).record_type)
    foundation, _ = load_run(folder)
    encoder = Encoder(foundation.tokenizer, _data(config))
    method = build({**config["method"], "retention_weight": 0.0}, foundation)
    return foundation, encoder, load_held_out(config, method, encoder, records)


def _score(config: Config, foundation: Foundation, encoder: Encoder, held_out: Any, label: str) -> Any:
    return score(foundation.network, encoder, held_out, config["evaluate"], label)


def _base(config: Config, foundation: Foundation, encoder: Encoder, held_out: Any) -> Any:
    """Scores of the foundation that the run started from."""
    if foundation.has_adapter:
        with foundation.base_view() as network:
            return score(network, encoder, held_out, config["evaluate"], "base model")
    node = {key: value for key, value in config["model"].items() if key != "_target_"}
    torch.manual_seed(config["seed"])
    return _score(config, load_foundation(**node), encoder, held_out, "base model")


def _show(config: Config, first: Any, second: Any, samples: list[Config], names: tuple[str, str]) -> None:
    report.console.print(report.comparison(first, second, names))
    report.console.print(report.samples_table(samples, config["evaluate"]["samples"], names))


VERBS = {"eval": evaluate, "compare": compare, "chat": chat, "export": export}
