"""Check a composed config against ftcore/schema.json. All problems are found at once, each with its path and a suggestion."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path, PurePath

from jsonschema import Draft4Validator, Draft202012Validator, TypeChecker
from jsonschema.validators import extend

from ftcore.config.build import Schema, schema_of_target, schemas
from ftcore.config.roles import files_of_config
from ftcore.config.secrets import SECRET, SECRET_ADVICE, SECRET_VALUE, environment_secrets
from ftcore.config.tree import above, flatten
from ftcore.config.trust import is_trusted, trusted
from ftcore.errors import ConfigError
from ftcore.files import resolve
from ftcore.settings import GROUPS, Config

Problem = tuple[str, str]  # path of a key, what is wrong with it
LONGEST = 200  # characters of a wrong value that a message shows


def _is_number(checker: TypeChecker, value: object) -> bool:
    return checker.is_type(value, "integer") or (isinstance(value, float) and math.isfinite(value))


# Stricter than JSON Schema 2020-12: 10.0 is no integer (as in draft 4), and infinity is no number.
TYPES = Draft4Validator.TYPE_CHECKER.redefine("number", _is_number)
Validator = extend(Draft202012Validator, type_checker=TYPES)


def schema_problems(config: Mapping[str, object], trust: list[str]) -> Iterator[Problem]:
    """Every value that the schema refuses, every secret, and keys of `trainer` that are not free to set."""
    yield from node_problems(config, schemas()["top"])
    for key, node in config.items():
        if isinstance(node, Mapping):
            yield from _wrong_target(key, node, trust)
    secrets = environment_secrets()
    for path, value in flatten(config, in_lists=True):
        named = SECRET.search(path.rsplit(".", 1)[-1]) and value
        if named or SECRET_VALUE.search(str(value)) or any(known in str(value) for known in secrets):
            yield path, SECRET_ADVICE
    trainer = config.get("trainer")
    for key in sorted(map(str, trainer)) if isinstance(trainer, Mapping) else ():
        if key in schemas()["trainer_owned"]:
            yield f"trainer.{key}", "is set by ftcore or by the hardware group; set it there"
        elif key not in schemas()["trainer_keys"]:
            yield f"trainer.{key}", f"is not a key of lightning.Trainer{closest(key, schemas()['trainer_keys'])}"


def _wrong_target(key: str, node: Mapping[str, object], trust: list[str]) -> Iterator[Problem]:
    """What is wrong with a mapping by the signature of its `_target_`."""
    if "_target_" not in node:
        if key in GROUPS:
            yield key, f"has keys and no option to take them: choose one with {key}=<option>"
        return
    target, parameters = str(node["_target_"]), {name: value for name, value in node.items() if name != "_target_"}
    if target in schemas()["targets"] or is_trusted(target, trust):
        yield from node_problems(parameters, schema_of_target(target, trust), key)
    else:
        package = target.partition(".")[0]
        advice = f"to use a module of your own, give trust=[{package}] on the command line"
        if package == "ftcore":
            advice = "one that was added to it is known after `make schema`"
        yield f"{key}._target_", f"{target!r} is not part of ftcore; {advice}"


def earlier_problems(config: object) -> list[str]:
    """What is wrong with the config of an earlier run. Anybody may have written it, and its `_target_`s would be called."""
    if not isinstance(config, dict) or not isinstance(config.get("choices"), dict):
        return ["it is not the config of a run of this version of ftcore"]
    return [f"{path} {text}" for path, text in schema_problems(config, trusted())]


def conflicts(config: Config) -> Iterator[Problem]:
    """Keys that are each right but not together, and files that do not exist."""
    get = config.get
    if get("max_steps") is None and get("max_epochs") is None:
        yield "max_steps", "and max_epochs are both null, so nothing says when to stop: set one of them"
    if get("keep_best") == "last" and get("patience"):
        yield "patience", "needs a metric to watch: set keep_best=val/loss"
    if get("keep_best") != "last" and not get("validate_every"):
        yield "keep_best", "needs validation: set validate_every=<steps> and data.validation_share=0.1"
    if "reward" in str(get("keep_best")):
        yield "keep_best", "keeps the lowest value, but of a reward more is better: set keep_best=val/loss"
    name = PurePath(str(get("name")))
    if not name.parts or ".." in name.parts or name.is_absolute():
        yield "name", "is the name of a folder below output_dir, without .. or a leading /"
    yield from _unsafe_text(config)
    yield from _wrong_rewards(config["method"], config["trust"])
    yield from _wrong_groups(config["method"], config["global_batch_size"])
    for key, path in files_of_config(config, "text"):
        if not Path(resolve(path)).is_file():
            yield key, f"names a file that does not exist: {Path(resolve(path)).absolute()}"


def _unsafe_text(config: Config) -> Iterator[Problem]:
    """Control characters in what is written into a batch script, and names of options that would be paths."""
    script = {"name": config.get("name"), "hardware": {"slurm": config["hardware"].get("slurm")}}
    for path, value in flatten(script, in_lists=True):
        if not f"{path}{value}".isprintable():
            yield path.encode("unicode_escape").decode(), "holds a line break or another control character"
    for group, option in (config.get("choices") or {}).items():
        if option is not None and not re.fullmatch(r"\w[\w.-]*", str(option)):
            yield f"choices.{group}", "is not the name of an option"


def _wrong_groups(method: Mapping[str, object], size: object) -> Iterator[Problem]:
    """Groups of completions that do not fill a step, or of one, where nothing can be compared."""
    group = method.get("group_size")
    if not (isinstance(group, int) and isinstance(size, int) and group > 0):
        return
    if size % group:
        near = f"nearest: {max(size // group, 1) * group} or {(size // group + 1) * group}"
        yield "global_batch_size", f"counts completions: {size} is not a multiple of method.group_size={group}; {near}"
    if group == 1 and method.get("advantage", "reinforce") != "reinforce":
        yield "method.group_size", "is 1, so nothing can be compared: raise it, or set method.advantage=reinforce"


def _wrong_rewards(method: Mapping[str, object], trust: list[str]) -> Iterator[Problem]:
    """Reward functions that do not exist, lack an option or are not trusted, and lists of different lengths."""
    names, weights, options = (method.get(key) for key in ("rewards", "reward_weights", "reward_options"))
    if not (isinstance(names, list) and isinstance(weights, list) and isinstance(options, Mapping)):
        return
    if not (all(isinstance(name, str) for name in names) and all(isinstance(o, Mapping) for o in options.values())):
        return  # the schema refuses them
    from ftcore.rewards.functions import check_reward

    if not names and not method.get("reward_model"):
        yield "method.rewards", "is empty and method.reward_model is null: name a function, or nothing is reinforced"
    if len(names) != len(weights):
        yield "method.reward_weights", f"has {len(weights)} weights for {len(names)} functions in method.rewards"
    for name in sorted(set(options) - set(names)):
        yield f"method.reward_options.{name}", f"is for a function that is not in method.rewards{closest(name, names)}"
    for name in names:
        try:
            check_reward(name, dict(options.get(name, {})), trust)
        except ConfigError as error:
            yield "method.rewards", f"holds {name!r}: {error}"


def node_problems(node: Mapping[str, object], schema: Schema, path: str = "") -> Iterator[Problem]:
    """What the schema refuses in the mapping at a dotted path of the config."""
    for error in Validator(schema).iter_errors(node):
        where = ".".join([path, *map(str, error.absolute_path)]).strip(".")
        if error.validator == "additionalProperties":
            known = error.schema["properties"]
            for key in sorted(set(error.instance) - set(known), key=str):
                yield f"{where}.{key}".strip("."), f"is not a key{closest(str(key), known)}"
        elif error.validator == "required":
            for key in sorted(set(error.validator_value) - set(error.instance)):
                yield f"{where}.{key}".strip("."), "is missing"
        else:
            yield where, f"must be {describe(error.schema)}, not {_quoted(error.instance)}"


def _quoted(value: object) -> str:
    """The beginning of a wrong value, for a message."""
    try:
        text = repr(value)
    except ValueError:  # a number of more than 4,300 digits
        return "such a number"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def describe(schema: Schema) -> str:
    """A JSON schema of one value in words: 'a number above 0', 'one of a, b, c'."""
    if "anyOf" in schema:
        return " or ".join(describe(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return "one of " * (len(values) > 1) + ", ".join(map(str, values))
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    words = [f"{word} {value:,}" for key, word in limits.items() if isinstance(value := schema.get(key), float | int)]
    names = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false",
             "null": "null", "array": "a list", "object": "a mapping"}  # fmt: skip
    return f"{names.get(schema.get('type', ''), 'another value')} {' and '.join(words)}".strip()


def closest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the known one that was probably meant."""
    match = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else "."


def report(problems: list[Problem], sources: Mapping[str, str]) -> str:
    """One message for all problems. `sources` maps a key to where it was set: `command line, seed=-1`, `recipe.yaml:3`."""
    places = {path: next((sources[key] for key in above(path) if key in sources), "") for path, _ in problems}
    hidden = {
        "",
        *(places[path] for path, text in problems if text == SECRET_ADVICE),
    }  # a place quotes the command line
    lines = [f"  {path} {text}" + f"  ({places[path]})" * (places[path] not in hidden) for path, text in problems]
    return f"{len(lines)} problem{'s' * (len(lines) > 1)} in the config:\n" + "\n".join(lines)
