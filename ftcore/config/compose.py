"""From a command line to a checked, plain config.

Hydra's Compose API composes conf/ (nothing a file says is run), then every node is checked against
`ftcore/schema.json`: unknown, missing, mistyped and out-of-range keys are reported together, each with its path and the
closest valid name, without importing torch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftcore.config.check import argument_problems, closest, conflicts, reported, schema_problems
from ftcore.config.options import options
from ftcore.config.recipe_rules import GIVEN, Staged, staged_recipes
from ftcore.config.roles import keys_of, mappings
from ftcore.config.tree import above, all_leaves
from ftcore.config.yaml_source import read
from ftcore.errors import ConfigError
from ftcore.files import resources
from ftcore.run_folder import Run
from ftcore.settings import FILES, GROUPS, NAMED_AFTER, Config

Problem = tuple[str, str]  # key path, what is wrong


def load_config(
    arguments: list[str],
    config_dirs: tuple[Path, ...] = (),
    recipe: Path | None = None,
    more: Callable[[Config], Iterable[Problem]] = lambda _: (),
) -> Config:
    """Compose and check the config of a command line.

    `arguments` are Hydra overrides (`method=dpo method.lr=1e-4`). With `run=<folder>` that run's config.yaml is the base
    that they change. `recipe` is a recipe file that lies anywhere, `more` finds further problems (key path, what is wrong).
    Raises `ConfigError` naming every problem.
    """
    overrides = read_overrides([word for word in arguments if word not in ("recipes=null", "sweeps=null")])
    chosen = [o for o in overrides if o.key_or_group in GROUPS]
    values = [o for o in overrides if o.key_or_group not in GROUPS]
    _check_choices(chosen, config_dirs)
    files = _files(chosen, recipe)
    if recipe:
        chosen += read_overrides([f"recipes={GIVEN}"])
    with staged_recipes(files, config_dirs) as staged:
        wrong = dict(_wrong_choices(staged.chosen, {o.key_or_group for o in chosen}, config_dirs))
        stand_ins = read_overrides([f"{group}={options(group)[0]}" for group in wrong])  # to see what else is wrong
        config = compose([*chosen, *stand_ins], values, [*staged.search_path, *config_dirs])
        config = _on_top_of_run(config, chosen, values)
        config["name"] = config.get("name") or default_name(config)
        _refuse_trust_of_files(config, values)
        problems = _all_problems(config, values, staged, wrong, more)
    if problems:
        sources = {o.key_or_group: f"command line, {o.input_line}" for o in values} | staged.lines
        raise ConfigError(reported(problems, sources))
    return config


def default_name(config: Config) -> str:
    """The name of a run that has none of its own: its method, data and model."""
    return "-".join(str(config["choices"][group]) for group in NAMED_AFTER)


def _files(chosen: list[Override], recipe: Path | None) -> list[tuple[str, str | Path]]:
    """(group, name or file) of every recipe and sweep that the command line names."""
    files: list[tuple[str, str | Path]] = [(o.key_or_group, str(o.value())) for o in chosen if o.key_or_group in FILES]
    if recipe and any(group == "recipes" for group, _ in files):
        raise ConfigError("recipe= and recipes= are two recipes: give one of the two.")
    return [*files, ("recipes", recipe)] if recipe else files


def _refuse_trust_of_files(config: Config, values: list[Override]) -> None:
    trust = next((o.value() for o in values if o.key_or_group == "trust"), [])
    if config.get("trust") != trust:
        raise ConfigError("trust is given on the command line only: no file may say whose code runs.")


def _all_problems(
    config: Config,
    values: list[Override],
    staged: Staged,
    wrong: dict[str, str],
    more: Callable[[Config], Iterable[Problem]],
) -> list[Problem]:
    problems = [*schema_problems(config, config["trust"]), *((group, "") for group in wrong)]
    if {path for path, _ in problems}.isdisjoint(mappings()):
        problems += conflicts(config)
    given = {o.key_or_group for o in values}
    missing = {path for path, value in all_leaves(config) if value == "???"}
    missing |= {key for key in staged.required if given.isdisjoint(above(key))}
    unknown = {*missing, *wrong}  # nothing else can be said of these and of what is below them
    problems = [p for p in (*problems, *more(config)) if unknown.isdisjoint(above(p[0]))]
    problems += [(path, f"is missing: give {path}=... on the command line") for path in sorted(missing)]
    return problems + [(f"defaults.override /{group}", text) for group, text in wrong.items()]


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
        plain = _plain(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
        plain["choices"] = {group: config.hydra.runtime.choices.get(group) for group in GROUPS}
        return plain
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        where = next(
            (f" (at {line.removeprefix('full_key: ')})" for line in lines if line.startswith("full_key: ")), ""
        )
        raise ConfigError(f"The config does not compose: {lines[0]}{where}.") from None


def _plain(config: object) -> Config:
    """Resolve interpolations; what is missing stays `???`."""
    try:
        return cast(Config, OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    except RecursionError:
        raise ConfigError("An interpolation ${...} refers to itself; look for a cycle in your overrides.") from None


def _on_top_of_run(config: Config, chosen: list[Override], values: list[Override]) -> Config:
    """With `run=` or `resume=`, take that run's config for everything the command line does not choose or set."""
    resumed = config.get("resume") if config.get("resume") != "auto" else None
    word, named = ("run", config["run"]) if config.get("run") else ("resume", resumed)
    if not named:
        return config
    run = Run(str(named))
    if not run.begun:
        raise ConfigError(f"{word}={named} is not a run folder: {run.config_file.resolve()} does not exist.")
    base = run.config
    if not isinstance(base, dict) or not isinstance(base.get("choices"), dict):
        raise ConfigError(f"{run.config_file} is not the config.yaml of a run of this version.")
    if any(o.key_or_group == "recipes" for o in chosen):
        raise ConfigError(f"{word}= takes the run's own config, recipes= another one: give one of the two.")
    kept = {*(o.key_or_group for o in chosen), *keys_of("command")}
    merged = OmegaConf.create({**config, **{key: value for key, value in base.items() if key not in kept}})
    merged["choices"] = base["choices"] | {o.key_or_group: config["choices"][o.key_or_group] for o in chosen}
    for override in values:
        OmegaConf.update(merged, override.key_or_group, override.value(), force_add=True)
    return _plain(merged)


def of_run(config: Config) -> dict[str, object]:
    """A config as a run keeps it: without what belongs to the command alone."""
    return {key: value for key, value in config.items() if key not in keys_of("command")}


def own_arguments(verb: str, words: list[str]) -> tuple[dict[str, object], list[str]]:
    """The arguments of a verb, its node with what `words` set in it, and the other words.

    Raises `ConfigError` for arguments that the verb does not have or take.
    """
    defaults = read(resources() / "conf" / "config.yaml").value(verb)
    own = [word for word in words if word.lstrip("+").startswith(f"{verb}.")] if defaults else []
    given = {o.key_or_group.partition(".")[2]: o.value() for o in read_overrides(own)}
    node = {**(defaults if isinstance(defaults, dict) else {}), **given}
    if problems := list(argument_problems(verb, node)):
        raise ConfigError(reported(problems, {}))
    return node, [word for word in words if word not in own]
