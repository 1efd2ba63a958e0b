"""The model card: README.md beside the weights of a run, in the format of the Hugging Face hub.

It says what the model was made from and how, which scores it has, and how it is loaded. It holds no row and no path of this
machine, and with `private=true` no name of the data.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from ftcore.evaluate.tables import SCORES
from ftcore.models.base_name import Base
from ftcore.models.foundation import Foundation, architecture_of
from ftcore.run_folder import Run, Summary
from ftcore.settings import Config

# transformers' auto class, without `AutoModelFor` -> what the hub calls the task of such models.
TASKS = {"CausalLM": "text-generation", "MaskedLM": "fill-mask", "SequenceClassification": "text-classification"}
# Kind of base -> where it is found.
FOUND = {
    "hub": "Hugging Face hub",
    "package": "Python package index; `ftcore` converts it",
    "folder": "a folder of whoever trained this model: ask there for it",
    "ftcore": "ships with `ftcore`",
}


def model_card(config: Config, summary: Mapping[str, object], foundation: Foundation, base: Base) -> str:
    """The card of a foundation as it is saved, with the config and the summary of its run."""
    result, adapter = Summary(summary), foundation.has_adapter and not foundation.merged_run
    terms = base.license.get("license_name") or base.license.get("license") or "not known"
    metadata = yaml.safe_dump(_metadata(config, base, adapter), sort_keys=False, allow_unicode=True)
    return f"""---
{metadata}---

# {_code(base.name.rpartition("/")[2])} after {_option(config, "method")}

{"An adapter (peft) for" if adapter else "A model made from"} {_code(base.name)} by [ftcore](https://pypi.org/project/ftcore/).

## How it was made

{_listed(_making(config, result, base))}

## Data

{_listed(_data(config, result))}

## Scores

{_scores(result)}

## Licence

Licence of the base: {terms}.

## How to load it

```python
{_loading(config, foundation, base, adapter)}
```
"""


def _metadata(config: Config, base: Base, adapter: bool) -> dict[str, object]:
    """The front matter."""
    hub = _hub_set(config)
    return {
        "base_model": base.name,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": TASKS[architecture_of(config)],
        **base.license,
        "tags": ["ftcore", _option(config, "method"), _option(config, "adapter")],
        **({"datasets": [hub]} if hub else {}),
    }


def _hub_set(config: Config) -> str:
    """Name of the hub's data set that was trained on; "" for other or private data."""
    hub, path = config["data"].get("hub"), config["data"].get("path")
    return "" if path or config["private"] or not isinstance(hub, Mapping) else str(hub["name"])


def _making(config: Config, result: Summary, base: Base) -> Iterator[tuple[str, str]]:
    """(what, how it was) of the training."""
    yield (
        "base",
        f"{_code(base.name)}{f', revision {_code(base.revision)}' if base.revision else ''} ({FOUND[base.kind]})",
    )
    if Run.at(config["model"]["path"]):
        yield "began with", "the result of an earlier run on that base"
    if config["model"]["random_weights"]:
        yield "weights of the base", f"random, of seed {config['seed']}"
    for group, node in (("method", config["method"]), ("adapter", config["adapter"])):
        numbers = [f"{key} {value}" for key, value in node.items() if isinstance(value, int | float) and value]
        yield group, ", ".join([_option(config, group), *numbers])
    yield "steps", f"{result.get('steps', 'not known')} of {config['global_batch_size']} rows, seed {config['seed']}"
    made_with = result.get("made_with")
    versions = made_with["versions"] if isinstance(made_with, Mapping) else {}
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _data(config: Config, result: Summary) -> Iterator[tuple[str, str]]:
    """(what, how it was) of the rows."""
    path = config["data"].get("path")
    name = Path(str(path)).name if path else _hub_set(config) or _option(config, "data")
    yield "data set", "private" if config["private"] else _code(name)
    yield "rows to train on", str(result.get("data_rows", "not known"))
    yield "SHA-256 of all rows", str(result.get("data_sha256", "not known"))


def _scores(result: Summary) -> str:
    """Base beside tuned model on held-out rows, what was forgotten, and intervals of the differences where there are some."""
    base, tuned, intervals = result.side("base"), result.side("tuned"), result.get("intervals")
    if not tuned:
        return "This run was not compared with its base."
    found = intervals if isinstance(intervals, Mapping) else {}
    columns = ["score", "base", "tuned", *(["interval of the difference"] if found else [])]
    lines = [columns, ["---"] * len(columns)]
    for key, (label, form, *_) in SCORES.items():
        a, b = base.get(key), tuned.get(key)
        if a is not None and b is not None:
            lines.append([label, form.format(a), form.format(b), *([_interval(found.get(key), form)] if found else [])])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    rise = result.score("probe_perplexity_rise")
    forgotten = (
        "" if rise is None else f" On general text, perplexity changed by {rise:+.1%}: that is what was forgotten."
    )
    return f"On {tuned['rows']} held-out rows.{forgotten}\n\n{table}"


def _interval(found: Mapping[str, object] | None, form: str) -> str:
    return f"{form.format(found['low'])} to {form.format(found['high'])}: {found['verdict']}" if found else ""


def _loading(config: Config, foundation: Foundation, base: Base, adapter: bool) -> str:
    """Lines of Python that load the model from its folder."""
    auto = f"AutoModelFor{architecture_of(config)}"
    imports, lines = [f"from transformers import {auto}, AutoTokenizer"], ["", 'folder = "."  # where this card is']
    lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    if adapter:
        more, base_lines = _loading_base(config, base, auto)
        if getattr(foundation.network.active_peft_config, "trainable_token_indices", None):
            base_lines.append("base.resize_token_embeddings(len(tokenizer))")
        imports += ["from peft import PeftModel", *more]
        lines += [*base_lines, "model = PeftModel.from_pretrained(base, folder)"]
    else:
        lines.append(f"model = {auto}.from_pretrained(folder)")
    return "\n".join([*imports, *lines])


def _loading_base(config: Config, base: Base, auto: str) -> tuple[list[str], list[str]]:
    """Imports and further lines of Python that load the base, or draw it again."""
    imports, place = {
        "hub": ([], f"{base.name!r}, revision={base.revision!r}"),
        "package": (["from ftcore.models.weights import from_package"], f"from_package({config['model']['package']})"),
        "folder": ([], f"{base.name!r}"),
        "ftcore": (["from ftcore.files import resolve"], f"resolve({base.name!r})"),
    }[base.kind]
    if auto.endswith("SequenceClassification"):
        place += ", num_labels=1, pad_token_id=tokenizer.pad_token_id"
    if not config["model"]["random_weights"]:
        return imports, [f"base = {auto}.from_pretrained({place})"]
    drawn = f"base = {auto}.from_config(AutoConfig.from_pretrained({place}))"
    return [*imports, "import torch", "from transformers import AutoConfig"], [
        f"torch.manual_seed({config['seed']})",
        drawn,
    ]


def _listed(items: Iterator[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in items)


def _code(text: str) -> str:
    """A name as Markdown shows it, whatever it holds."""
    return f"`{text.replace('`', '')}`"


def _option(config: Config, group: str) -> str:
    """The option that was chosen in a group."""
    return str(config["choices"].get(group))
