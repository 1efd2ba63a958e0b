"""How far plans are off: what `ftcore plan` says of runs on this CPU beside the memory that their processes really take.

    python benchmarks/plan.py              every setting of the grid, then the table of docs/plan.md
    python benchmarks/plan.py "dpo lora"   one of them

A process first trains a tiny model, so that the libraries are in memory. It is measured from right before its own is loaded to
its end: the highest resident set (VmHWM) less what was resident then. Tensors are pages of their own (MALLOC_MMAP_THRESHOLD_), so
that what is freed is given back; `kept` are runs as they are by default, where freed memory is kept, holes and all.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "plan.json"
LONG = "data=jsonl data.path={rows} micro_batch_size=4 global_batch_size=4 retention.weight=0 evaluate.enabled=false"
TWO = "data=jsonl data.path={rows} micro_batch_size=2 global_batch_size=4 retention.weight=0 evaluate.enabled=false"
# Written before the first measurement; none was taken out since.
GRID = {
    "sft lora": f"{LONG}",
    "sft lora, checkpointing": f"{LONG} hardware.activation_checkpointing=true",
    "sft full": f"{LONG} adapter=full",
    "sft full, checkpointing": f"{LONG} adapter=full hardware.activation_checkpointing=true",
    "sft dora": f"{LONG} adapter=dora",
    "sft freeze": f"{LONG} adapter=freeze",
    "sft lora, packing": f"{LONG} method.packing=true",
    "sft lora, two micro-batches": f"{LONG} global_batch_size=8",
    "sft full, retention": f"{LONG} adapter=full retention.weight=1",
    "self_supervised lora": f"method=self_supervised {LONG}",
    "dpo lora": f"method=dpo {TWO}",
    "dpo full": f"method=dpo adapter=full {TWO}",
    "kto lora": f"method=kto {LONG}",
    "reward lora": f"method=reward {TWO}",
    "grpo lora": "method=grpo method.max_new_tokens=32 evaluate.enabled=false",
    "sft lora, as it is by default": "",
    "sft full, ddp_2cpu": f"{TWO} adapter=full hardware=ddp_2cpu",
    "sft full, fsdp_2cpu": f"{TWO} adapter=full hardware=fsdp_2cpu",
    "sft lora, fsdp_2cpu, checkpointing": f"{TWO} hardware=fsdp_2cpu hardware.activation_checkpointing=true",
}  # fmt: skip

# Settings that are also measured as runs are by default.
KEPT = ("sft lora", "sft lora, as it is by default")


def main(names: list[str]) -> None:
    """Measure the settings, keep the results and print them."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        rows = made_up(Path(folder) / "rows.jsonl")
        for name in names or GRID:
            words = merged(["logger=none", "max_steps=3", *GRID[name].format(rows=rows).split()])
            words += [] if "hardware=" in " ".join(words) else ["hardware=cpu"]
            plan = json.loads(output([sys.executable, __file__, "--plan", *words]))
            results[name] = {**plan, "real": measured(words, folder, own_pages=True)}
            results[name] |= {"kept": measured(words, folder, own_pages=False)} if name in KEPT else {}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(line(name, results[name]), flush=True)


def merged(words: list[str]) -> list[str]:
    """The words, of which the last wins where a key stands twice."""
    return [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in words).items()]


def line(name: str, found: dict[str, float]) -> str:
    """A row of the table."""
    planned, real, kept = found["planned"], found["real"], f"{found['kept']:.2f}" if "kept" in found else ""
    return f"| {name} | {planned:.2f} | {real:.2f} | {planned / real:.2f} | {found['phase']} | {kept} |"


def made_up(file: Path) -> Path:
    """64 rows of about 260 tokens, for every method."""
    draw = random.Random(0)
    words = ["apple", "river", "stone", "cloud", "green", "seven", "paper", "light", "house", "train"]
    with file.open("w") as rows:
        for k in range(64):
            text = " ".join(draw.choices(words, k=240))
            row = {"prompt": f"Say {k} again.", "completion": text, "text": text, "label": k % 2 == 0}
            rows.write(json.dumps({**row, "chosen": text, "rejected": " ".join(draw.choices(words, k=240))}) + "\n")
    return file


def output(command: list[str], **variables: str) -> str:
    """Standard output of a command."""
    environment = {**os.environ, **variables}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def measured(words: list[str], folder: str, own_pages: bool) -> float:
    """GB of the process of a run that takes most."""
    two = any(word.endswith("_2cpu") for word in words)
    python = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if two else []
    command = [sys.executable, *python, __file__, "--side", *words, f"output_dir={folder}"]
    variables = {"OMP_NUM_THREADS": "1"} if two else {}
    variables |= {"MALLOC_MMAP_THRESHOLD_": str(2**16)} if own_pages else {}
    return max(float(found) for found in re.findall(r"PEAK ([\d.]+)", output(command, **variables)))


def planned(words: list[str]) -> None:
    """The plan alone, as `ftcore plan` makes it."""
    from ftcore.config.compose import load_config
    from ftcore.plan.planner import Planner
    from ftcore.runs.resolve import settle_precision

    settle_precision(config := load_config(words))
    with ExitStack() as stack:
        plan = Planner(config, stack).plan()["run"]
    print(json.dumps({"planned": plan.gb, "phase": plan.need.phase}))


def side(words: list[str]) -> None:
    """A run in this process, and its peak."""
    import ftcore.runs.preload  # noqa: F401 (all that is imported is there before the model)
    import ftcore.train.prepare as prepare
    from ftcore.config.compose import load_config
    from ftcore.runs.planned import OF_A_LAUNCHER
    from ftcore.runs.start import train

    place = {name: os.environ.pop(name) for name in OF_A_LAUNCHER if name in os.environ}
    tiny = [
        "model=tiny",
        "adapter=lora",
        "hardware=cpu",
        "max_steps=1",
        "data.too_long=truncate",
        f"name=tiny-{os.getpid()}",
    ]
    train(load_config(merged([*words, *tiny])))
    os.environ.update(place)
    load, before = prepare.load_method, [0]

    def watched(*arguments: object, **more: object) -> object:
        Path("/proc/self/clear_refs").write_text("5")  # man proc: resets the peak
        before[0] = resident("VmRSS")
        return load(*arguments, **more)  # type: ignore[arg-type]

    prepare.load_method = watched  # type: ignore[assignment]
    train(load_config(words))
    print(f"PEAK {(resident('VmHWM') - before[0]) / 1e9:.3f}", flush=True)


def resident(name: str) -> int:
    """Bytes under a name of /proc/self/status."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


if __name__ == "__main__":
    do = {"--side": side, "--plan": planned}.get("".join(sys.argv[1:2]))
    do(sys.argv[2:]) if do else main(sys.argv[1:])
