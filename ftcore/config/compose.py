"""From a command line to a checked, plain config.

Hydra's Compose API composes conf/ (nothing a file says is run), then every node is checked against
`ftcore/schema.json`: unknown, missing, mistyped and out-of-range keys are reported together, each with its path and the
closest valid name, without importing torch.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftcore.config.build import TRUSTED, options, read_config
from ftcore.config.check import closest, conflicts, reported, schema_problems
from ftcore.config.recipe_rules import GIVEN, staged_recipes
from ftcore.config.tree import above, all_leaves
from ftcore.errors import PRIVATE, ConfigError
from ftcore.files import resources
from ftcore.settings import FILES, GROUPS, OF_THE_COMMAND, Config


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
        problems = [*schema_problems(config), *((group, "") for group in wrong)]
        if not {path for path, _ in problems} & {"model", "data", "method", "hardware", "evaluate", "retention"}:
            problems += conflicts(config)
        given = {o.key_or_group for o in values}
        missing = {path for path, value in all_leaves(config) if value == "???"}
        missing |= {key for key in staged.required if given.isdisjoint(above(key))}
        unknown = {*missing, *wrong}  # nothing else can be said of these and of what is below them
        problems = [p for p in (*problems, *more(config)) if unknown.isdisjoint(above(p[0]))]
        problems += [(path, f"is missing: give {path}=... on the command line") for path in sorted(missing)]
        problems += [(f"defaults.override /{group}", text) for group, text in wrong.items()]
    if problems:
        sources = {o.key_or_group: f"command line, {o.input_line}" for o in values} | staged.lines
        raise ConfigError(reported(problems, sources))
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
