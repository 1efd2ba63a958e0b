"""What holds for every method: it is one short file, trains with every adapter, and gives one trajectory however it is split."""

import ast
import io
import json
import tokenize

import pytest
import yaml

from ftcore.config.compose import load_config
from ftcore.config.options import options
from ftcore.files import PACKAGE
from ftcore.runs.stages import folder_of, stage_config

METHODS = sorted(options("method"))
ADAPTERS = ["lora", "dora", "rslora", "full", "freeze"]
LONG = {"grpo": 150, "rlhf": 150}  # online methods
SHARED = {"base", "online", "__init__"}
WORDS = ["model=tiny", "logger=none", "hardware=cpu", "evaluate.max_rows=4", "evaluate.max_new_tokens=4"]
MASKED = ["method=self_supervised", "method.objective=masked", "model=tiny_encoder"]
FIM = ["method=self_supervised", "method.objective=fill_in_the_middle"]
MORE = {
    # A reward in which groups differ: where all are equal the gradient is a rounding error, which Adam makes as large as any.
    "grpo": ["method.rewards=[length]", "method.reward_options.length.limit=2", "method.max_new_tokens=6"],
    "rlhf": [
        "method.stages.policy=['method=sft','max_steps=1']",
        "method.stages.reward_model=['method=reward','max_steps=1']",
        "method.max_new_tokens=6",
    ],
}
CASES = {name: [f"method={name}", *MORE.get(name, [])] for name in METHODS} | {"masked": MASKED, "middle": FIM}


def code_lines(file):
    """Lines with code: no blank ones, comments or docstrings."""
    source = file.read_text()
    strings = [
        (node.body[0].lineno, node.body[0].end_lineno)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    ]
    skipped = {line for first, last in strings for line in range(first, last + 1)}
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in layout]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - skipped)


@pytest.mark.parametrize("file", sorted((PACKAGE / "methods").glob("*.py")), ids=lambda file: file.stem)
def test_a_method_is_one_short_file(file):
    if file.stem not in SHARED:
        assert code_lines(file) <= LONG.get(file.stem, 60)


def test_nothing_asks_which_method_it_is():
    for file in PACKAGE.rglob("*.py"):
        assert "method ==" not in file.read_text() and '"method"] ==' not in file.read_text(), file


@pytest.fixture
def home(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path_factory.getbasetemp() / "home"))  # stages are made once


def trains(ftcore, case, adapter):
    top = ["adapter.top_layers=1"] if adapter == "freeze" else []
    outcome = ftcore(*WORDS, *CASES[case], f"adapter={adapter}", *top, "max_steps=1")
    assert outcome.status == 0, outcome.err
    summary = json.loads((outcome.folder / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["parameters_trained"] > 0
    return outcome


@pytest.mark.parametrize("case", CASES)
def test_every_method_trains_with_an_adapter_that_is_not_the_default(ftcore, home, case):
    trains(ftcore, case, ADAPTERS[1 + sorted(CASES).index(case) % 4])


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("case", CASES)
def test_every_method_trains_with_every_adapter(ftcore, home, case, adapter):
    trains(ftcore, case, adapter)


def losses(ftcore, case, *words):
    fixed = ["evaluate.enabled=false", "global_batch_size=8", "max_steps=4", "method.lr=1e-3", "retention.every=1"]
    outcome = ftcore(*WORDS, *CASES[case], *fixed, *words)
    assert outcome.status == 0, outcome.err
    return [line["train/loss"] for line in outcome.metrics]


def agree(first, second):
    residuals = [a - b for a, b in zip(first, second, strict=True)]
    # A sampled token can in principle fall on the other side of a rounding error; with these seeds none does.
    return max(map(abs, residuals)) < 2e-6 * max(max(map(abs, first)), 1)


@pytest.mark.parametrize("case", ["kto", "rlhf", "masked"])  # the others: test_invariance.py
def test_micro_batches_do_not_change_the_losses(ftcore, home, case):
    assert agree(losses(ftcore, case, "micro_batch_size=8"), losses(ftcore, case, "micro_batch_size=2"))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("machine", ["ddp_2cpu", "fsdp_2cpu"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_not_change_the_losses(ftcore, home, case, machine):
    assert agree(losses(ftcore, case), losses(ftcore, case, f"hardware={machine}"))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("case", ["dpo", "reward", "rlhf", "middle"])
@pytest.mark.parametrize("adapter", ["full", "freeze", "dora"])
def test_shares_of_every_kind_of_weights_do_not_change_the_losses(ftcore, home, case, adapter):
    words = [f"adapter={adapter}", *(["adapter.top_layers=1"] if adapter == "freeze" else [])]
    assert agree(losses(ftcore, case, *words), losses(ftcore, case, *words, "hardware=fsdp_2cpu"))


def test_a_wrong_name_is_refused_before_the_other_stage_trains(ftcore, home):
    outcome = ftcore(*WORDS, *CASES["rlhf"], "method.reward_model=runs/nowhere", "seed=7")
    assert outcome.status == 4 and "runs/nowhere" in outcome.err and "Stage" not in outcome.out


def test_an_earlier_run_whose_config_names_other_code_is_refused(fails, tmp_path):
    run, proof = tmp_path / "sly", tmp_path / "ran"
    (run / "model").mkdir(parents=True)
    config = load_config(["model=tiny"])
    config["data"] = {"_target_": "os.system", "command": f"touch {proof}"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    words = [*WORDS, "method=grpo", "method.group_size=4", f"method.reward_model={run}"]
    assert "os.system" in fails(4, *words) and not proof.exists()
    assert "os.system" in fails(4, *WORDS, f"model.path={run}") and not proof.exists()


def test_a_language_model_run_becomes_a_reward_model(ftcore):
    first = ftcore(*WORDS, "method=sft", "max_steps=1")
    second = ftcore(*WORDS, "method=reward", f"model.path={first.folder}", "max_steps=1")
    assert second.status == 0, second.err
    alone = ["method.rewards=[]", "method.reward_weights=[]", "method.reward_model_weight=2", "method.max_new_tokens=6"]
    third = ftcore(*WORDS, "method=grpo", *alone, f"method.reward_model={second.folder}", "max_steps=1")
    assert third.status == 0, third.err
    step = third.metrics[0]
    assert step["train/reward"] == pytest.approx(2 * step["train/rewards/reward_model"])


def test_a_step_without_a_completion_to_train_on_says_so_once(ftcore):
    words = ["method=grpo", "method.mask_unfinished=true", "method.max_new_tokens=1", "max_steps=2"]
    outcome = ftcore(*WORDS, *words, "retention.weight=0")
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("method.max_new_tokens=1") == 1
    assert [line["train/completions/excluded"] for line in outcome.metrics] == [1, 1]


def test_a_stage_is_known_by_what_its_result_depends_on(tmp_path):
    def folder(*words):
        config = load_config(["model=tiny", "method=rlhf", *words])
        return folder_of(stage_config(config, "policy", config["method"]["stages"]["policy"]))

    template, cloze = tmp_path / "template.jinja", tmp_path / "cloze.jsonl"
    template.write_text("{{ messages[0].content }}"), cloze.touch()
    made = folder()
    assert made == folder("method.beta=1", "micro_batch_size=2", f"data.cloze={cloze}")
    changed = [folder(word) for word in ("seed=1", "data.max_length=99", f"model.chat_template={template}")]
    template.write_text("{{ messages[0].content }}!")
    assert len({made, *changed, folder(f"model.chat_template={template}")}) == 5


@pytest.mark.parametrize(("rows", "expected"), [(8, 8), (32, "auto")])
def test_a_stage_takes_micro_batches_that_fit_its_steps(rows, expected):
    config = load_config(["model=tiny", "method=rlhf", "global_batch_size=32", f"micro_batch_size={rows}"])
    assert stage_config(config, "policy", ["method=sft"])["micro_batch_size"] == expected


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["method=grpo", "method.group_size=1"], "nothing can be compared"),
        (["method=grpo", "global_batch_size=12"], "nearest: 8 or 16"),
        (["method=dpo", "keep_best=val/rewards/accuracies", "validate_every=1"], "more is better"),
        (["method=rlhf", "method.stages.critic=['method=sft']"], "is no stage"),
        (["method=grpo", "method.rewards=[]", "method.reward_weights=[]"], "nothing is reinforced"),
        (["method=grpo", "method.rewards=[[length]]"], "must be text"),
        (["method=grpo", "method.reward_options.contains_answer=[1]"], "must be a mapping"),
    ],
)
def test_settings_under_which_nothing_would_be_learned_are_refused(fails, words, part):
    assert part in fails(2, *WORDS, *words)
