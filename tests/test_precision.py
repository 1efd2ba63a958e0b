"""What `hardware.precision` means: which weights are float32, what is computed in bf16, and what runs and stages are known by."""

from collections import defaultdict

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ftcore.config.compose import load_config
from ftcore.files import resolve
from ftcore.machine import hardware
from ftcore.methods.base import Method
from ftcore.methods.online import OnlineMethod
from ftcore.models.logprobs import token_outputs
from ftcore.run_folder import Run
from ftcore.runs.stages import folder_of, stage_config
from tests.conftest import FAST
from tests.test_methods import CASES

WORDS = [*FAST, "hardware=cpu"]
ADAPTERS = {"lora": [], "full": [], "freeze": ["adapter.top_layers=1"]}
FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.fixture
def home(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path_factory.getbasetemp() / "home"))  # stages are made once


@pytest.fixture
def processor(monkeypatch):
    """Pretend a processor: flags of the CPU, and the compute capability of a GPU if there is one."""

    def pretend(flags, capability=None):
        monkeypatch.setattr(hardware, "cpu_fact", lambda _: flags)
        monkeypatch.setattr(hardware, "cuda_devices", lambda: int(capability is not None))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend


@pytest.mark.parametrize(
    ("asked", "flags", "capability", "found"),
    [
        (None, "avx2 amx_bf16", None, "32-true"),
        (None, "avx2", (9, 0), "bf16-true"),
        (None, "avx2", (7, 5), "32-true"),
        ("auto", "avx2", (8, 0), "bf16-true"),
        ("auto", "avx2 avx512f", None, "32-true"),
        ("auto", "avx2 amx_bf16", None, "bf16-true"),
        ("auto", "avx512_bf16", None, "bf16-true"),
        ("auto", "", None, "32-true"),
        ("bf16-mixed", "", None, "bf16-mixed"),
        ("32-true", "amx_bf16", (9, 0), "32-true"),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(processor, asked, flags, capability, found):
    processor(flags, capability)
    words = {
        "accelerator": "auto",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "single",
        "replicas": 1,
        "precision": asked,
    }
    off = {"activation_checkpointing": False, "compile": False, "slurm": None}
    assert hardware.find_machine(**words, **off).precision == found


def test_gpus_that_slurm_has_yet_to_find_multiply_bf16(processor):
    processor("avx2")
    assert hardware.multiplies_bf16("gpu")


@pytest.mark.parametrize(("flags", "found"), [("amx_bf16", "bf16-true"), ("avx2", "32-true")])
def test_a_run_and_its_stages_are_known_by_what_auto_came_to(ftcore, processor, flags, found):
    processor(flags)
    outcome = ftcore(*WORDS, "hardware.precision=auto", "max_steps=1")
    assert outcome.status == 0, outcome.err
    assert yaml.safe_load((outcome.folder / "config.yaml").read_text())["hardware"]["precision"] == found
    assert outcome.summary["made_with"]["machine"]["precision"] == found

    def key(precision, words=()):
        config = load_config(["model=tiny", "method=rlhf", "hardware=cpu", f"hardware.precision={precision}"])
        return folder_of(stage_config(config, "policy", ["method=sft", *words]))

    assert key("auto") == key(found) == key("16-mixed", ["hardware=cpu", "hardware.precision=auto"])
    assert (key("null") == key("auto")) == (found == "32-true")


def test_a_run_goes_on_in_the_precision_that_it_began_with(ftcore, processor, monkeypatch):
    processor("amx_bf16")
    monkeypatch.setenv("FTCORE_FAULTS", "raise step=3")
    with pytest.raises(RuntimeError):
        ftcore(*WORDS, "hardware.precision=auto", "max_steps=4", "checkpoints.every=2")
    monkeypatch.delenv("FTCORE_FAULTS")
    words = [*WORDS, "max_steps=4", "checkpoints.every=2", "resume=auto"]
    refused = ftcore(*words, "hardware.precision=32-true")
    assert refused.status == 2 and "hardware.precision: bf16-true -> 32-true" in refused.err
    outcome = ftcore(*words, "hardware.precision=auto")
    assert outcome.status == 0, outcome.err
    assert len(outcome.metrics) == 4


@pytest.fixture
def formats(monkeypatch):
    """Part of a run -> formats of its floats, noted while it trains."""
    found = defaultdict(set)
    clip, loss = Method.configure_gradient_clipping, Method.training_step

    def clipped(method, optimizer, *given, **options):
        found["trained"] |= {p.dtype for p in method.trained_parameters()}
        found["gradients"] |= {p.grad.dtype for p in method.trained_parameters() if p.grad is not None}
        found["frozen"] |= {p.dtype for p in method.network.parameters() if not p.requires_grad}
        found["moments"] |= {x.dtype for state in optimizer.state.values() for x in state.values() if x.ndim}
        return clip(method, optimizer, *given, **options)

    def stepped(method, batch, number):
        found["batch"] |= {x.dtype for x in batch.values() if torch.is_tensor(x) and x.is_floating_point()}
        if copy := method.foundation.frozen_copy:
            assert [p.dtype for p in copy.parameters()] == [p.dtype for p in method.network.parameters()]
        return loss(method, batch, number)

    monkeypatch.setattr(Method, "configure_gradient_clipping", clipped)
    monkeypatch.setattr(Method, "training_step", stepped)
    return found


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "sft" else [pytest.mark.slow]) for case in CASES]
)
def test_what_trains_is_float32(ftcore, home, formats, case, adapter, precision):
    words = [f"adapter={adapter}", *ADAPTERS[adapter], f"hardware.precision={precision}", "max_steps=2"]
    outcome = ftcore(*WORDS, *CASES[case], *words)
    assert outcome.status == 0, outcome.err
    assert formats["trained"] == formats["gradients"] == formats["moments"] == {FLOAT}
    assert formats["batch"] <= {FLOAT}
    assert formats["frozen"] == (set() if adapter == "full" else {HALF if precision == "bf16-true" else FLOAT})
    saved = next((outcome.folder / "model").glob("*.safetensors"))
    assert {value.dtype for value in load_file(saved).values()} == {FLOAT}


@pytest.fixture(scope="module")
def bf16_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16")
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve("ftcore://tiny")), dtype=HALF)
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("ftcore://tiny")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_small_step_moves_every_weight_of_a_bf16_checkpoint(ftcore, bf16_checkpoint, precision):
    tuned = ["method.lr=1e-5", "method.schedule=constant", "method.warmup=0", "max_steps=1"]
    place = [f"model.path={bf16_checkpoint}", "model.random_weights=false", f"hardware.precision={precision}"]
    outcome = ftcore(*WORDS, "adapter=full", *place, *tuned)
    assert outcome.status == 0, outcome.err
    before, after = (load_file(folder / "model.safetensors") for folder in (bf16_checkpoint, outcome.folder / "model"))
    moved = torch.cat([(after[name] != before[name].float()).flatten() for name in before])
    assert moved.float().mean() > 0.99


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("case", ["grpo", "rlhf"])
def test_a_policy_that_has_not_changed_has_no_ratio_to_itself(ftcore, home, monkeypatch, case, adapter, precision):
    ratios, loss = list[float](), OnlineMethod.training_step

    def noted(method, batch, number):
        with torch.no_grad():
            logps = token_outputs(method.network, batch, method.temperature).logps
        ratios.extend((logps - batch[name]).abs().max().item() for name in ("old_logps", "ref_logps") if name in batch)
        return loss(method, batch, number)

    monkeypatch.setattr(OnlineMethod, "training_step", noted)
    words = [f"adapter={adapter}", f"hardware.precision={precision}", "max_steps=1", "evaluate.enabled=false"]
    outcome = ftcore(*WORDS, *CASES[case], *words)
    assert outcome.status == 0, outcome.err
    assert ratios and max(ratios) < 1e-5


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_finished_runs_compute_as_they_trained(ftcore, adapter):
    run = ftcore(*WORDS, f"adapter={adapter}", *ADAPTERS[adapter], "hardware.precision=bf16-true", "max_steps=2")
    assert run.status == 0, run.err
    evaluated = ftcore("eval", f"run={run.folder}")
    assert evaluated.status == 0, evaluated.err
    scores = next(run.folder.glob("eval-*.json"))
    tuned = yaml.safe_load(scores.read_text())["tuned"]
    assert tuned["loss"] == pytest.approx(run.summary["tuned"]["loss"], rel=1e-3)
    for words in (["chat", "prompt=Hello"], ["compare"], ["export", "format=merged"]):
        outcome = ftcore(words[0], f"run={run.folder}", *words[1:])
        assert outcome.status == 0, outcome.err
    merged = load_file(Run(str(run.folder)).exports / "merged" / "model.safetensors")
    assert {value.dtype for value in merged.values()} == {FLOAT}


def test_float32_is_never_tf32(ftcore, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    try:
        assert ftcore(*FAST, "max_steps=1", "evaluate.enabled=false").status == 0
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
