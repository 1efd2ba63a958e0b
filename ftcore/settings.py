"""Types and ranges of the top-level keys; conf/config.yaml holds their defaults and says what each does."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from typing_extensions import TypedDict

PositiveInt = Annotated[int, Ge(1)]


VERBS = Literal["train", "eval", "compare", "chat", "export", "inspect", "pack"]


class Evaluate(TypedDict):
    """Keys under `evaluate`."""

    __pydantic_config__ = {"extra": "forbid"}  # type: ignore[misc]

    enabled: bool
    max_rows: PositiveInt | None
    max_new_tokens: PositiveInt
    batch_size: PositiveInt
    samples: Annotated[int, Ge(0)]
    probe: str | None


class Retention(TypedDict):
    """Keys under `retention`."""

    __pydantic_config__ = {"extra": "forbid"}  # type: ignore[misc]

    weight: Annotated[float, Ge(0)]
    every: PositiveInt
    rows: PositiveInt
    length: Annotated[int, Ge(2)]
    text: str
    max_rise: Annotated[float, Gt(0)] | None
    check_every: PositiveInt
    action: Literal["stop", "halve_lr"]


class CheckpointSettings(TypedDict):
    """Keys under `checkpoints`."""

    __pydantic_config__ = {"extra": "forbid"}  # type: ignore[misc]

    every: PositiveInt | None
    keep: Annotated[int, Ge(2)]
    on_error: Literal["continue", "stop"]


class Sweep(TypedDict):
    """Keys under `sweep`."""

    __pydantic_config__ = {"extra": "forbid"}  # type: ignore[misc]

    n_jobs: PositiveInt
    time_limit: Annotated[float, Gt(0)] | None
    trials: PositiveInt
    objective: str
    direction: Literal["minimize", "maximize"]
    prune: str | None


class TopLevel(TypedDict):
    """Keys of the whole config. Groups are mappings here; each is checked against what its `_target_` takes."""

    __pydantic_config__ = {"extra": "forbid"}  # type: ignore[misc]

    model: dict[str, Any]
    adapter: dict[str, Any]
    data: dict[str, Any]
    method: dict[str, Any]
    hardware: dict[str, Any]
    logger: dict[str, Any] | None
    verb: VERBS
    seed: Annotated[int, Ge(0), Lt(2**32)]
    name: str
    choices: dict[str, str | None]
    output_dir: str
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt | Literal["auto"]
    max_steps: PositiveInt | None
    max_epochs: Annotated[float, Gt(0)] | None
    validate_every: PositiveInt | None
    keep_best: str
    patience: PositiveInt | None
    dry_run: bool
    ledger: bool
    profile: bool
    private: bool
    evaluate: Evaluate
    retention: Retention
    trust: list[str]
    trainer: dict[str, Any]
    search: dict[str, Any]
    sampler: Literal["grid", "tpe"]
    sweep: Sweep
    run: str | None
    other: str | None
    prompt: str | None
    format: Literal["merged", "adapter"]
    resume: str | None
    checkpoints: CheckpointSettings
    hang_timeout: Annotated[float, Gt(0)] | None
    max_bad_steps: Annotated[int, Ge(0)]


Config = dict[str, Any]


GROUPS = ("model", "adapter", "data", "method", "hardware", "logger", "recipes", "sweeps")


FILES = ("recipes", "sweeps")  # of a team: read as data, checked, then composed


OF_THE_COMMAND = ("verb", "run", "other", "prompt", "format", "trust", "resume", "dry_run")  # never from an earlier run
