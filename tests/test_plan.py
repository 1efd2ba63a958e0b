"""`plan`: what it says is what a real step holds, for every method on every machine."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from ftcore.config.compose import load_config
from ftcore.config.options import options
from ftcore.files import resources
from ftcore.plan import cards, rehearsal
from ftcore.plan.cards import PROCESS, Card, card_of, largest_micro_batch
from ftcore.plan.fakes import allocate
from ftcore.plan.memory import Held
from ftcore.plan.planner import Plan, Planner, largest
from ftcore.run_folder import Run
from ftcore.runs.planned import with_plan
from ftcore.runs.resolve import resolve, settle_precision
from tests.conftest import FAST

METHODS = options("method")
HARDWARE = options("hardware")
SMALL = ["model=tiny", "logger=none", "global_batch_size=16", "max_steps=4", "evaluate.max_rows=8"]


def plans_of(*words: str) -> dict[str, Plan]:
    """The plans of a config, as the verb makes them, without its pages."""
    config = load_config([*words, "verb=plan"])
    settle_precision(config, elsewhere=True)
    with ExitStack() as stack:
        return Planner(config, stack).plan()


def peaks(plan: Plan) -> dict[str, int]:
    return {phase: sum(kinds.values()) for phase, kinds in plan.need.phases.items()}


@contextmanager
def with_storage() -> Iterator[torch.device]:
    """In the place of `without_storage`: everything is computed, on real tensors."""
    yield torch.device("cpu")


def drawn(network: torch.nn.Module) -> None:
    """In the place of `allocate`: small random weights."""
    allocate(network)
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            value.uniform_(-0.02, 0.02) if value.is_floating_point() else value.zero_()


SETTINGS = [
    "method=sft adapter=full", "method=sft adapter=full hardware.activation_checkpointing=true",
    "method=sft adapter=freeze adapter.top_layers=1", "method=dpo adapter=dora", "method=kto", "method=reward",
    "method=self_supervised", "method=sft method.packing=true", "method=sft hardware.precision=bf16-mixed",
]  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        "method=sft",
        "method=dpo adapter=full",
        "method=grpo",
        *(pytest.param(words, marks=pytest.mark.slow) for words in SETTINGS),
    ],
)
def test_a_step_without_storage_holds_what_a_real_one_holds(words, monkeypatch):
    asked = [*SMALL, *words.split(), "micro_batch_size=4", "hardware=cpu"]
    planned = plans_of(*asked)["run"]
    monkeypatch.setattr(rehearsal, "without_storage", with_storage)
    monkeypatch.setattr(rehearsal, "faked", lambda work, _: work)
    monkeypatch.setattr(rehearsal, "allocate", drawn)
    real = plans_of(*asked)["run"]
    assert peaks(planned)["training"] == pytest.approx(peaks(real)["training"], rel=0.02)
    assert planned.need.flops == real.need.flops


def test_what_is_held_is_counted_by_kind_until_it_is_gone():
    held = Held()
    weight = torch.zeros(256, 256, requires_grad=True)
    held.see([weight], "weights")
    with held:
        product = weight @ weight
        twice = product.view(-1)
    assert held.now == {"weights": 4 * 256**2, "activations": 4 * 256**2}  # a view is no memory of its own
    assert held.flops == {"matmuls": 2 * 256**3}
    del product, twice
    assert held.now["activations"] == 0 and held.peak.total() == 8 * 256**2


@pytest.mark.parametrize(("method", "hardware"), [("sft", "fsdp_8gpu"), ("kto", "gpu")])
def test_methods_are_planned(method, hardware):
    assert_planned_or_refused(method, hardware)


@pytest.mark.slow
@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_planned_on_every_hardware_option(method, hardware):
    assert_planned_or_refused(method, hardware)


def assert_planned_or_refused(method: str, hardware: str) -> None:
    plan = plans_of(*SMALL, f"method={method}", f"hardware={hardware}")["run"]
    weights = plan.need.phases["training"]["weights"]
    shares = (
        plan.resolved.machine.processes // plan.resolved.machine.replicas
        if "fsdp" in hardware or hardware == "slurm"
        else 1
    )
    assert plan.parameters[0] / shares <= weights  # at least two bytes each
    assert plan.need.flops["matmuls"] > 2 * plan.work.longest and plan.gb > 0


@pytest.mark.slow
@pytest.mark.parametrize("world", [64, 1024])
def test_any_number_of_processes(world):
    words = ["hardware=fsdp_8gpu", f"hardware.num_nodes={world // 8}", f"global_batch_size={world}", "plan.tokens=64"]
    plan = plans_of(*SMALL[:2], "adapter=full", "retention.weight=0", "evaluate.enabled=false", *words)["run"]
    whole = 4 * plan.parameters[0]
    assert whole / world <= plan.need.phases["training"]["weights"] <= 1.5 * whole / world + 10**5
    assert plan.need.sent["gather"] > 0 and plan.need.sent["reduce_scatter"] > 0


@pytest.mark.slow
def test_copies_share_less_and_send_sums_between_them():
    one, two = (plans_of(*SMALL, "adapter=full", f"hardware={name}")["run"] for name in ("fsdp_8gpu", "fsdp_2x8gpu"))
    assert one.need.phases["training"]["weights"] == two.need.phases["training"]["weights"]
    assert two.need.sent["reduce"] > one.need.sent["reduce"]


@pytest.mark.slow
def test_memory_grows_with_rows_and_less_with_checkpointing():
    words = [*SMALL, "plan.tokens=256", "hardware=gpu", "retention.weight=0"]
    few, many = (plans_of(*words, f"micro_batch_size={rows}")["run"] for rows in (2, 8))
    saved = plans_of(*words, "micro_batch_size=8", "hardware.activation_checkpointing=true")["run"]
    assert 2 < many.need.phases["training"]["activations"] / few.need.phases["training"]["activations"] < 4.1
    assert saved.need.peak < many.need.peak and saved.flops > many.flops


@pytest.mark.slow
def test_four_bits_take_a_quarter_of_sixteen():
    lora, qlora = (plans_of(*SMALL, "hardware=gpu", f"adapter={name}")["run"] for name in ("lora", "qlora"))
    assert qlora.parameters == lora.parameters
    assert qlora.need.phases["training"]["weights"] < lora.need.phases["training"]["weights"]


@pytest.mark.slow
def test_stages_without_a_run_are_planned_too():
    found = plans_of(*SMALL, "method=rlhf", "hardware=cpu")
    assert set(found) == {"stage policy", "stage reward_model", "run"}
    assert "rollouts" in found["run"].need.phases and largest(found).need.peak > 0


@pytest.mark.slow
def test_a_shipped_model_is_planned_offline(ftcore):
    outcome = ftcore(
        "plan", "model=qwen3_0_6b", "plan.tokens=32", "hardware=gpu", "logger=none", "micro_batch_size=1", "json=true"
    )
    answer = json.loads(outcome.out)
    assert outcome.status == 0 and answer["parameters"] - answer["parameters_trained"] == 596_049_920
    assert answer["fits"]["h100_sxm"] == "fits" and "stand" not in outcome.out
    assert "rows are counted with a small one" in outcome.err


def test_what_does_not_fit_ends_with_5_and_what_would(ftcore):
    outcome = ftcore("plan", *FAST, "hardware=gpu", "target=0.001GB", "micro_batch_size=4", "json=true")
    answer = json.loads(outcome.out)
    assert outcome.status == 5 and answer["fits"] == {"0.001GB": "does not fit"}
    assert {one["words"] for one in answer["advice"]} >= {"micro_batch_size=1"}
    assert all(one["peak_gb"] > 0 for one in answer["advice"])
    assert re.search(r"DoesNotFit: .* do not fit on 0.001GB", outcome.err)


@pytest.mark.slow
def test_the_fewest_cards_that_fit(ftcore):
    outcome = ftcore("plan", *FAST, "target=H100", "rate=2", "json=true")
    answer = json.loads(outcome.out)
    assert outcome.status == 0 and answer["hardware"] == "gpu" and answer["devices"] == 1
    assert answer["costs"]["h100_sxm"]["price"][0] <= answer["costs"]["h100_sxm"]["price"][1]


@pytest.mark.parametrize(
    ("target", "said"),
    [("H100 SMX", "did you mean 'h100_sxm'"), ("rtx 4909", "did you mean 'rtx_4090'"), ("?", "Known: h100")],
)
def test_a_card_that_is_not_in_the_table(fails, target, said):
    assert said in fails(2, "plan", *FAST, f"target={target}")


def test_a_model_that_only_the_hub_has(fails):
    message = fails(4, "plan", "model.path=nobody/has-this", "logger=none")
    assert "nobody/has-this" in message and "model.path=<folder>" in message


def test_cards_have_whole_data_sheets():
    for card in cards.cards():
        assert card.memory_gb > 8 and card.fp32_tflops and card.bandwidth_gbs and card.link_gbs and card.watts
        assert card.source.startswith("https://") and (card.bf16_tflops or card.fp32_tflops < 20)
    assert card_of("rtx4090").name == "rtx_4090" and card_of("80gb").memory_gb == 80


def test_rows_that_fit_are_estimated_from_a_rows_activations():
    plan = plans_of(*SMALL, "hardware=gpu", "plan.tokens=256", "micro_batch_size=4", "retention.weight=0")["run"]
    held = plan.need.phases["training"]
    fixed, row = (sum(held.values()) - held["activations"]) / 1e9, held["activations"] / 4 / 1e9
    assert largest_micro_batch(plan, Card("", (fixed + 2.5 * row) * cards.MARGIN)) == 2
    assert largest_micro_batch(plan, Card("", fixed)) is None


def test_dry_run_shows_the_plan(ftcore):
    outcome = ftcore(*FAST, "dry_run=true")
    assert outcome.status == 0 and "GB on one device" in outcome.out and "this machine" in outcome.out


@pytest.mark.slow
def test_a_run_and_what_was_planned_for_it(ftcore):
    run = ftcore(*FAST, "max_steps=1", "micro_batch_size=2")
    answer = json.loads(ftcore("plan", f"run={run.folder}", "json=true").out)
    assert answer["real_peak_gb"] == run.summary["peak_memory_gb"] and answer["micro_batch_size"] == 2


@pytest.mark.slow
def test_a_sweep_is_planned_before_it_runs(ftcore):
    outcome = ftcore("-m", "plan", *FAST, "hardware=gpu", "plan.tokens=64", "adapter=lora,full")
    assert outcome.status == 0 and "peak_gb" in outcome.out
    found = json.loads(next(outcome.cwd.rglob("sweep.json")).read_text())["jobs"]
    assert [job["state"] for job in found] == ["done", "done"]
    assert found[0]["summary"]["parameters_trained"] < found[1]["summary"]["parameters_trained"]


@pytest.mark.slow
def test_a_run_on_gpus_begins_with_the_plan(ftcore):
    run = Run(ftcore(*FAST, "max_steps=1").folder)
    config = {**run.config, "hardware": load_config(["hardware=gpu"])["hardware"]}
    run.write_config(config)
    before = resolve(config, {}, elsewhere=True)
    _, after = with_plan(config, before, run)
    assert after.planned_gb and after.micro_batch_size == before.micro_batch_size
    fixed = {**config, "micro_batch_size": 2, "hardware": {**config["hardware"], "activation_checkpointing": False}}
    assert with_plan(fixed, before, run) == (fixed, before)  # nothing is left to choose


NEEDS = {file.stem: re.sub(r"\n# ", " ", file.read_text()) for file in sorted((resources() / "recipes").glob("*.yaml"))}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", NEEDS)
def test_a_recipe_needs_what_it_says(recipe, tmp_path):
    rows = tmp_path / "rows.jsonl"
    columns = ("question", "answer") if recipe == "own_jsonl" else ("prompt", "completion")
    lines = (dict(zip(columns, (f"What is {k}?", "A number."), strict=True)) for k in range(64))
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = [f"data.path={rows}"] if "data.path=my.jsonl" in NEEDS[recipe] else []
    most = largest(plans_of(f"recipes={recipe}", "logger=none", *own))
    said = re.search(r"Needs:.*?(?:(\d+) GB of memory|CUDA GPUs? of (\d+) GB)", NEEDS[recipe])
    assert said, "a recipe says what it needs"
    if said[1]:
        assert most.gb + PROCESS <= float(said[1])
    else:
        assert most.gb * cards.MARGIN <= float(said[2])
