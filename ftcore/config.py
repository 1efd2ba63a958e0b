"""From a command line to a checked, plain config.

Hydra's Compose API composes conf/ (nothing a file says is run), then every node is checked against
`ftcore/schema.json`: unknown, missing, mistyped and out-of-range keys are reported together, each with its path and the
closest valid name, without importing torch.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from jsonschema import Draft202012Validator
from jsonschema.validators import extend
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftcore.errors import PRIVATE, ConfigError
from ftcore.recipes import GIVEN, recipe_folders, staged_recipes
from ftcore.resources import PACKAGE, resolve, resources

Config = dict[str, Any]
GROUPS = ("model", "adapter", "data", "method", "hardware", "logger", "recipes", "sweeps")
FILES = ("recipes", "sweeps")  # of a team: read as data, checked, then composed
OF_THE_COMMAND = ("verb", "run", "other", "prompt", "format", "trust", "resume", "dry_run")  # never from an earlier run
TRUSTED = "FTCORE_TRUST"
TRUST_ADVICE = "to use a module of your own, give trust=[{}] on the command line"
NAMED_SECRET = r"(?:api_?key|access_?key|token|secret|password|credentials?)"
SECRET = re.compile(rf"(^|_){NAMED_SECRET}$", re.IGNORECASE)
SECRET_SETTING = re.compile(rf"\b((?:\w*_)?{NAMED_SECRET})=[^'\"]+", re.IGNORECASE)
MAX_ALIASES = 20  # of an earlier run's config.yaml; 2^20 leaves at most
SHORTEST_SECRET = 8  # characters; a shorter value would be found in ordinary words
LONGEST = 200  # characters of a wrong value that a message shows
SECRET_ADVICE = "looks like a secret, and configs are saved and logged: put it in an environment variable"
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|wandb_v1_\w{20,}|gh[pousr]_\w{20,}|AKIA[0-9A-Z]{16})|://[^/\s:]+:[^@\s]+@"
)


def _is_integer(_: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(_: Any, value: Any) -> bool:
    return _is_integer(_, value) or (isinstance(value, float) and math.isfinite(value))


# Stricter than JSON Schema: 10.0 is no integer, infinity no number.
Validator = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer).redefine("number", _is_number),
)


def locate(node: Mapping[str, Any]) -> Any:
    """The class or function that a checked node's `_target_` names."""
    return resolve_name(node["_target_"])


def build(node: Mapping[str, Any], *given: Any) -> Any:
    """Call a checked node's target with the program's own arguments first and the node's keys after."""
    return locate(node)(*given, **{key: value for key, value in node.items() if key != "_target_"})


def record_type(method: Mapping[str, Any]) -> str:
    """The record type that a method needs, without importing it unless it is a user's own."""
    return schemas()["record_types"].get(method["_target_"]) or locate(method).record_type


def schemas() -> Config:
    """ftcore/schema.json: what every key of the config may be."""
    return json.loads((PACKAGE / "schema.json").read_text())


def options(group: str, config_dirs: Iterable[Path] = ()) -> list[str]:
    """Names that `group=<name>` accepts, sorted; names with a leading underscore are shared parts, not options."""
    folders = [folder / group for folder in (resources() / "conf", *config_dirs)]
    if group in FILES:
        folders = recipe_folders(tuple(config_dirs), group)
    names = {file.stem for folder in folders for file in folder.glob("*.yaml")}
    return sorted(name for name in names if not name.startswith("_"))


def load_config(
    arguments: list[str],
    config_dirs: tuple[Path, ...] = (),
    recipe: Path | None = None,
    more: Callable[[Config], Iterable[tuple[str, str]]] = lambda _: (),
) -> Config:
    """Compose and check the config of a command line.

    `arguments` are Hydra overrides (`method=dpo method.lr=1e-4`). With `run=<folder>` that run's config.yaml is the base
    that they change. `recipe` is a recipe file that lies anywhere, `more` finds further problems (key path, what is wrong).
    Raises `ConfigError` naming every problem.
    """
    overrides = read_overrides([word for word in arguments if word not in ("recipes=null", "sweeps=null")])
    trust: Any = next((o.value() for o in overrides if o.key_or_group == "trust"), [])
    chosen = [o for o in overrides if o.key_or_group in GROUPS]
    values = [o for o in overrides if o.key_or_group not in GROUPS]
    _check_choices(chosen, config_dirs)
    files: list[tuple[str, str | Path]] = [(o.key_or_group, str(o.value())) for o in chosen if o.key_or_group in FILES]
    if recipe:
        if any(group == "recipes" for group, _ in files):
            raise ConfigError("recipe= and recipes= are two recipes: give one of the two.")
        files.append(("recipes", recipe))
        chosen += read_overrides([f"recipes={GIVEN}"])
    with staged_recipes(files, config_dirs) as staged:
        wrong = dict(_wrong_choices(staged.chosen, {o.key_or_group for o in chosen}, config_dirs))
        stand_ins = read_overrides([f"{group}={options(group)[0]}" for group in wrong])  # to see what else is wrong
        config = compose([*chosen, *stand_ins], values, [*staged.search_path, *config_dirs])
        config = _on_top_of_run(config, chosen, values)
        config["name"] = config.get("name") or "-".join(
            config["choices"][group] for group in ("method", "data", "model")
        )
        if config.get("trust") != trust:
            raise ConfigError("trust is given on the command line only: no file may say whose code runs.")
        os.environ[TRUSTED] = ",".join(map(str, trust))  # for the processes of this run, which read earlier runs
        os.environ[PRIVATE] = str(int(config.get("private") is not False))  # the schema refuses other values
        problems = [*_problems(config), *((group, "") for group in wrong)]
        if not {path for path, _ in problems} & {"model", "data", "method", "hardware", "evaluate", "retention"}:
            problems += _conflicts(config)
        given = {o.key_or_group for o in values}
        missing = {path for path, value in _leaves(config) if value == "???"}
        missing |= {key for key in staged.required if given.isdisjoint(_above(key))}
        unknown = {*missing, *wrong}  # nothing else can be said of these and of what is below them
        problems = [p for p in (*problems, *more(config)) if unknown.isdisjoint(_above(p[0]))]
        problems += [(path, f"is missing: give {path}=... on the command line") for path in sorted(missing)]
        problems += [(f"defaults.override /{group}", text) for group, text in wrong.items()]
    if problems:
        sources = {o.key_or_group: f"command line, {o.input_line}" for o in values} | staged.lines
        raise ConfigError(_report(problems, sources))
    return config


def read_overrides(arguments: list[str]) -> list[Override]:
    """The words of a command line. Raises `ConfigError` for one that is no override, a deletion or a sweep."""
    try:
        overrides = OverridesParser.create().parse_overrides(arguments)
    except (OverrideParseException, ValueError) as error:  # or a number of thousands of digits
        said = repr(getattr(error, "override", "with a very long number"))
        raise ConfigError(
            f"Cannot read the override {said}. Write key=value, such as method.lr=1e-4; quote values that "
            f"hold spaces, commas or equals signs: 'prompt=\"What is it?\"'."
        ) from None
    for override in overrides:
        if override.key_or_group.split(".")[0].split("/")[0] == "hydra":
            raise ConfigError(f"{override.input_line!r}: ftcore composes with Hydra but takes no hydra.* keys.")
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line!r} is a {'deletion' if override.is_delete() else 'sweep'}, which this command "
                "does not take. Give one value per key; write lists as key=[a,b]."
            )
    return overrides


def _wrong_choices(
    chosen: Mapping[str, str], again: set[str], config_dirs: Iterable[Path]
) -> Iterator[tuple[str, str]]:
    """(group, what is wrong) for options that a recipe chooses, unless the command line does `again`, and there are not."""
    for group in chosen.keys() - again:
        known = options(group, config_dirs)
        if chosen[group] not in known:
            yield group, f"has no option {chosen[group]!r}{closest(chosen[group], known)} Options: {', '.join(known)}"


def _above(path: str) -> Iterator[str]:
    """A path and those it lies below: `a.b`, `a`."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _check_choices(chosen: list[Override], config_dirs: tuple[Path, ...]) -> None:
    problems = []
    for override in chosen:
        known = options(override.key_or_group, config_dirs)
        if str(override.value()) not in known:
            problems.append(
                f"{override.input_line}: {override.key_or_group} has no option {str(override.value())!r}"
                f"{closest(str(override.value()), known)} Options: {', '.join(known)}."
            )
    if problems:
        raise ConfigError("\n".join(problems))


def compose(chosen: list[Override], values: list[Override], search: list[Path]) -> Config:
    """Compose the chosen options, then the values on top; `choices` says which option each group got."""
    # `++` lets a misspelt key through to the schema check, which reports all of them at once with suggestions.
    lines = [o.input_line or "" for o in chosen] + ["++" + (o.input_line or "").lstrip("+") for o in values]
    if search:
        lines.append(f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in search)}]")
    try:
        with initialize_config_dir(str(resources() / "conf"), version_base="1.3"):
            config = hydra_compose("config", lines, return_hydra_config=True)
        choices = {group: config.hydra.runtime.choices.get(group) for group in GROUPS}
        return _plain(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])) | {
            "choices": choices
        }
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        where = next(
            (f" (at {line.removeprefix('full_key: ')})" for line in lines if line.startswith("full_key: ")), ""
        )
        raise ConfigError(f"The config does not compose: {lines[0]}{where}.") from None


def _plain(config: Any) -> Config:
    """Resolve interpolations; what is missing stays `???`."""
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except RecursionError:
        raise ConfigError("An interpolation ${...} refers to itself; look for a cycle in your overrides.") from None
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def _on_top_of_run(config: Config, chosen: list[Override], values: list[Override]) -> Config:
    """With `run=` or `resume=`, take that run's config for everything the command line does not choose or set."""
    resumed = config.get("resume") if config.get("resume") != "auto" else None
    word, named = ("run", config["run"]) if config.get("run") else ("resume", resumed)
    if not named:
        return config
    file = Path(named).expanduser() / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{word}={named} is not a run folder: {file.resolve()} does not exist.")
    base = read_config(file)
    if not isinstance(base, dict) or not isinstance(base.get("choices"), dict):
        raise ConfigError(f"{file} is not the config.yaml of a run of this version.")
    if any(o.key_or_group == "recipes" for o in chosen):
        raise ConfigError(f"{word}= takes the run's own config, recipes= another one: give one of the two.")
    kept = {o.key_or_group for o in chosen}
    merged = OmegaConf.create({**config, **{key: value for key, value in base.items() if key not in kept}})
    merged["choices"] = {**base["choices"], **{group: config["choices"][group] for group in kept}}
    for key in OF_THE_COMMAND:
        merged[key] = config[key]
    for override in values:
        OmegaConf.update(merged, override.key_or_group, override.value(), force_add=True)
    return _plain(merged)


def read_config(file: Path) -> Any:
    """What config.yaml of an earlier run says; None when it cannot be read, or its aliases would multiply."""
    try:
        text = file.read_text(encoding="utf-8")
        return None if len(re.findall(r"(^|[\s,:\[{-])\*\w", text)) > MAX_ALIASES else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _problems(config: Config) -> Iterator[tuple[str, str]]:
    """(key path, what is wrong) for every value that the schema refuses."""
    schema = schemas()
    yield from _check_node(config, schema["top"], "")
    for key, node in config.items():
        if key in GROUPS and isinstance(node, Mapping) and "_target_" not in node:
            yield key, f"has keys and no option to take them: choose one with {key}=<option>"
        if isinstance(node, Mapping) and "_target_" in node:
            target = node["_target_"]
            known = schema["targets"].get(target)
            if known is None and not is_trusted(target, config.get("trust") or []):
                yield (
                    f"{key}._target_",
                    f"{target!r} is not part of ftcore; {TRUST_ADVICE.format(target.split('.')[0])}",
                )
                continue
            known = known or _schema_of_users(target)
            yield from _check_node({k: v for k, v in node.items() if k != "_target_"}, known, key)
    secrets = environment_secrets()
    for path, value in _leaves(config):
        named = SECRET.search(path.rsplit(".", 1)[-1]) and value
        if named or SECRET_VALUE.search(str(value)) or any(known in str(value) for known in secrets):
            yield path, SECRET_ADVICE
    owned = {*(config.get("hardware") or {}), *schema["trainer_owned"]}
    for key in sorted(config.get("trainer") or {}):
        if key in owned:
            yield f"trainer.{key}", "is set by ftcore or by the hardware group; set it there"
        elif key not in schema["trainer_keys"]:
            yield f"trainer.{key}", f"is not a key of lightning.Trainer{closest(key, schema['trainer_keys'])}"


def earlier_problems(config: Any) -> list[str]:
    """What is wrong with the config of an earlier run: it may come from anywhere and names what would be called."""
    if not isinstance(config, dict) or not isinstance(config.get("choices"), dict):
        return ["it is not the config of a run of this version"]
    trusted = [name for name in os.environ.get(TRUSTED, "").split(",") if name]
    nodes = [config.get(group) for group in ("model", "adapter", "data", "method")]
    if not all(isinstance(node, dict) and isinstance(node.get("_target_"), str) for node in nodes):
        return ["a group is missing"]
    return [f"{path} {text}" for path, text in _problems({**config, "trust": trusted})]


def is_trusted(name: str, trust: Iterable[str]) -> bool:
    """Whether a dotted name lies in one of the modules that the command line trusts."""
    return any(name.startswith(f"{module}.") for module in trust)


def _schema_of_users(target: str) -> Config:
    """Schema of a class or function of a trusted module, from its signature."""
    from ftcore.schema import schema_of

    try:
        return schema_of(resolve_name(target))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"_target_ {target} cannot be imported: {type(error).__name__}: {error}.") from None


def _conflicts(config: Config) -> Iterator[tuple[str, str]]:
    """(key path, what is wrong) for keys that are right one by one and not together."""
    get = config.get
    if get("max_steps") is None and get("max_epochs") is None:
        yield "max_steps", "and max_epochs are both null, so nothing says when to stop: set one of them"
    if get("keep_best") == "last" and get("patience"):
        yield "patience", "needs a metric to watch: set keep_best=val/loss"
    if get("keep_best") != "last" and not get("validate_every"):
        yield "keep_best", "needs validation: set validate_every=<steps> and data.validation_share=0.1"
    if re.search(r"reward", str(get("keep_best"))):
        yield "keep_best", "keeps the lowest value, and of a reward more is better: set keep_best=val/loss"
    if ".." in str(get("name")) or str(get("name")).startswith("/"):
        yield "name", "is the name of a folder below output_dir, without .. or a leading /"
    yield from _unspeakable(config)
    texts = {
        "evaluate.probe": (get("evaluate") or {}).get("probe"),
        "retention.text": (get("retention") or {}).get("text"),
        "data.cloze": (get("data") or {}).get("cloze"),
        "model.chat_template": (get("model") or {}).get("chat_template"),
    }
    yield from _wrong_rewards(get("method") or {}, get("trust") or [])
    yield from _wrong_groups(get("method") or {}, get("global_batch_size"))
    for key, path in texts.items():
        if isinstance(path, str) and not Path(resolve(path)).is_file():
            yield key, f"names no file: {Path(resolve(path)).absolute()}"


def _unspeakable(config: Config) -> Iterator[tuple[str, str]]:
    """Line breaks in what becomes lines of a batch script, and names of options that would be paths."""
    script = {"name": config.get("name"), "hardware": {"slurm": (config.get("hardware") or {}).get("slurm")}}
    for path, value in _leaves(script):
        if not f"{path}{value}".isprintable():
            yield path.encode("unicode_escape").decode(), "holds a line break or another control character"
    for group, option in (config.get("choices") or {}).items():
        if option is not None and not re.fullmatch(r"\w[\w.-]*", str(option)):
            yield f"choices.{group}", "is no name of an option"


def _wrong_groups(method: Mapping[str, Any], size: Any) -> Iterator[tuple[str, str]]:
    """Groups of completions that do not fill a step, or have nothing to compare with."""
    group = method.get("group_size")
    if not (isinstance(group, int) and isinstance(size, int) and group > 0):
        return
    if size % group:
        below, above = max(size // group, 1) * group, (size // group + 1) * group
        yield (
            "global_batch_size",
            f"counts completions: {size} are no whole number of groups of method.group_size={group}; nearest: {below} or {above}",
        )
    if group == 1 and method.get("advantage", "reinforce") != "reinforce":
        yield "method.group_size", "of 1 leaves nothing to compare with: raise it, or set method.advantage=reinforce"


def _wrong_rewards(method: Mapping[str, Any], trust: list[str]) -> Iterator[tuple[str, str]]:
    """Reward functions that do not exist, lack an option or are not trusted."""
    names, weights, options = (method.get(key) for key in ("rewards", "reward_weights", "reward_options"))
    if not (isinstance(names, list) and isinstance(weights, list) and isinstance(options, Mapping)):
        return
    if not (all(isinstance(name, str) for name in names) and all(isinstance(o, Mapping) for o in options.values())):
        return  # the schema has said so
    from ftcore.rewards import check_reward

    if not names and not method.get("reward_model"):
        yield (
            "method.rewards",
            "is empty and there is no method.reward_model, so nothing is reinforced: name a function",
        )
    if len(names) != len(weights):
        yield "method.reward_weights", f"has {len(weights)} weights for {len(names)} functions in method.rewards"
    for name in sorted(set(options) - set(names)):
        yield (
            f"method.reward_options.{name}",
            f"is for a function that method.rewards does not name{closest(name, names)}",
        )
    for name in names:
        try:
            check_reward(name, dict(options.get(name, {})), trust)
        except ConfigError as error:
            yield "method.rewards", f"holds {name!r}: {error}"


def environment_secrets() -> list[str]:
    """Values of the environment variables that are named as secrets."""
    return [value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST_SECRET]


def without_secrets(message: str) -> str:
    """A message without what looks like a key or a password."""
    for value in environment_secrets():
        message = message.replace(value, "***")
    return SECRET_VALUE.sub("***", SECRET_SETTING.sub(r"\1=***", message))


def _check_node(node: Mapping[str, Any], schema: Config, prefix: str) -> Iterator[tuple[str, str]]:
    for error in Validator(schema).iter_errors(node):
        path = ".".join([prefix, *map(str, error.absolute_path)]).strip(".")
        if error.validator == "additionalProperties":
            known = error.schema["properties"]
            for key in sorted(set(error.instance) - set(known), key=str):
                yield f"{path}.{key}".strip("."), f"is not a key{closest(str(key), known)}"
        elif error.validator == "required":
            for key in sorted(set(error.validator_value) - set(error.instance)):
                yield f"{path}.{key}".strip("."), "is missing"
        else:
            yield path, f"must be {describe(error.schema)}, not {_shown(error.instance)}"


def _shown(value: Any) -> str:
    """A wrong value in a message; Python writes no numbers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return "such a number"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def describe(schema: Config) -> str:
    """A JSON schema of one value in words: 'a number above 0', 'one of a, b, c'."""
    if "anyOf" in schema:
        return " or ".join(describe(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    words = [f"{word} {schema[key]:g}" for key, word in limits.items() if key in schema]
    names = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false",
             "null": "null", "array": "a list", "object": "a mapping"}  # fmt: skip
    return f"{names.get(schema.get('type', ''), 'another value')} {' and '.join(words)}".strip()


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        yield path, node
        return
    for key, value in items:
        yield from _leaves(value, f"{path}.{key}".strip("."))


def closest(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is not known: with the one that was probably meant."""
    match = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else "."


def _report(problems: list[tuple[str, str]], sources: Mapping[str, str]) -> str:
    lines, secret = [], {path for path, text in problems if text == SECRET_ADVICE}
    for path, text in problems:
        source = next((where for key, where in sources.items() if path == key or path.startswith(f"{key}.")), None)
        source = None if path in secret else source  # the line would show it
        lines.append(f"  {path} {text}" + (f"  ({source})" if source else ""))
    return f"{len(lines)} problem{'s'[: len(lines) > 1]} in the config:\n" + "\n".join(lines)
