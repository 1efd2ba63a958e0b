"""What survives: runs killed at random moments, killed in a save, damaged on the disk, failing in one of two processes.

    python benchmarks/faults.py kills sft 50      # kill -9 at 50 random moments, resume, compare the weights to the bit
    python benchmarks/faults.py kills sft 20 fsdp_2cpu    # the same of all processes of a run whose model is in shares
    python benchmarks/faults.py saves 200         # kill -9 at 200 random moments of writing checkpoints
    python benchmarks/faults.py damage            # every file of the newest checkpoint cut, deleted, or one bit of it turned
    python benchmarks/faults.py processes 10      # one of two processes raises, is killed or hangs, 10 times each
    python benchmarks/faults.py worlds            # one process, then two, then one: the losses of one alone
    python benchmarks/faults.py wandb 5           # W&B's server goes away in the middle: the time of training, in turn

Each prints a line of JSON with what was seen and exits with 1 unless all went well. POSIX only: runs are forked from a process
that has imported everything, so that a cycle takes seconds. Files go to a new folder in --folder.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from rich.progress import track

FAST = ["model=tiny", "hardware=cpu", "global_batch_size=8"]
RUN = [
    "model=tiny", "logger=none", "hardware=cpu", "adapter.dropout=0.1", "global_batch_size=8", "max_steps=10",
    "checkpoints.every=2", "evaluate.max_rows=4", "evaluate.max_new_tokens=4", "evaluate.probe=null", "resume=auto",
]  # fmt: skip
METHODS = {
    "sft": ["validate_every=3", "keep_best=val/loss", "data.validation_share=0.1", "ledger=true"],
    "reward": [],
    "dpo": [],
    "grpo": ["method.max_new_tokens=6", "method.rewards=[repetition]", "method.reward_options.repetition.n=1"],
    "rlhf": [
        "method.max_new_tokens=6", "method.stages.policy=['method=sft','max_steps=2']",
        "method.stages.reward_model=['method=reward','max_steps=2']",
    ],
}  # fmt: skip


def main() -> None:
    """Run the experiment that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="+")
    parser.add_argument("--folder", default=".")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=given.folder)).resolve()
    name, *words = given.experiment
    started = time.perf_counter()
    result = EXPERIMENTS[name](folder, *words)
    shutil.rmtree(folder, ignore_errors=True)
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"experiment": " ".join(given.experiment), **result, "seconds": seconds}))
    sys.exit(not result["well"])


def forked(work: Callable[[], int], folder: Path) -> int:
    """Do `work` in a copy of this process, in `folder`, its output kept there; the process id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    os.setpgid(0, 0)  # what it starts is killed with it
    os.chdir(folder)
    with open("output", "a") as output, redirect_stdout(output), redirect_stderr(output):
        os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
        os._exit(work())


def kill_after(child: int, seconds: float) -> bool:
    """Kill a process after a while; whether it was still alive."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.killpg(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kills(folder: Path, method: str, times: str, hardware: str = "cpu") -> dict[str, Any]:
    """Kill all processes of a run at a random moment, go on, and compare what is saved with that of a run nobody killed."""
    import torch

    import ftcore.train.run  # noqa: F401 (once, for all the runs)
    from ftcore.cli.command import run_command

    torch.set_num_threads(1)  # threads do not survive a fork
    os.environ["FTCORE_HOME"] = str(folder / "home")
    words = [*_run_without("hardware"), f"hardware={hardware}", f"method={method}", *METHODS[method]]

    def train(name: str) -> int:
        place = folder / name
        place.mkdir(exist_ok=True)
        return forked(lambda: run_command(words), place)

    for name in ("stages", "whole"):  # the first makes what rlhf starts from, and caches
        started = time.monotonic()
        _, status = os.waitpid(train(name), 0)
        if status:
            sys.exit((folder / name / "output").read_text())
        seconds = time.monotonic() - started
    equal, killed, resumed = 0, 0, 0
    for k in track(range(int(times)), f"kill -9: {method}", transient=True):
        while not kill_after(train(f"run{k}"), random.uniform(0, seconds)):
            shutil.rmtree(folder / f"run{k}")
        killed += 1
        resumed += any(folder.glob(f"run{k}/runs/*/*/checkpoints/step-*"))
        os.waitpid(train(f"run{k}"), 0)
        equal += saved(folder / f"run{k}") == saved(folder / "whole")
        shutil.rmtree(folder / f"run{k}")
    return {"well": equal == killed, "equal": equal, "killed": killed, "from a checkpoint": resumed, "a run": seconds}


def saved(place: Path) -> list[bytes]:
    """What the finished run in a folder leaves: weights, and the losses of its steps."""
    runs = [file.parent for file in place.glob("runs/*/*/summary.json")]
    if len(runs) != 1:
        return [str(runs).encode()]
    metrics = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["train/loss"]) for line in metrics if "train/loss" in line]
    return [*(f.read_bytes() for f in sorted(runs[0].glob("model/*.safetensors"))), json.dumps(losses).encode()]


def tensors(step: int) -> dict[str, Any]:
    """Sixteen MB that tell which step they are of."""
    import torch

    return {f"weight/{k}": torch.full((1000, 1000), float(step)) for k in range(4)}


def saves(folder: Path, times: str) -> dict[str, Any]:
    """Kill a process that does nothing but write checkpoints; the newest whole one must be there and be what was written."""
    import torch

    from ftcore.train import checkpoint
    from ftcore.train import tensors as stored

    checkpoints = folder / "checkpoints"
    torch.set_num_threads(1)  # threads do not survive a fork

    def write() -> int:
        for step in range(1, 10_000):
            checkpoint.write(checkpoints, step, tensors(step), {"step": step}, keep=2)
        return 0

    loadable, partial = 0, 0
    for _ in track(range(int(times)), "kill -9 in a save", transient=True):
        shutil.rmtree(checkpoints, ignore_errors=True)
        child = forked(write, folder)
        while not checkpoint.folders(checkpoints):
            time.sleep(0.001)
        kill_after(child, random.uniform(0, 0.3))
        partial += any(checkpoints.glob(".step-*"))
        with redirect_stderr(io.StringIO()):
            found = checkpoint.newest(checkpoints)
        if found:
            step, values = checkpoint.read_state(found)["step"], tensors(0)
            stored.read(found, values)
            loadable += all(value.eq(step).all() for value in values.values())
    other = os.stat(tempfile.gettempdir()).st_dev != os.stat(folder).st_dev
    return {
        "well": loadable == int(times),
        "loadable": loadable,
        "killed": int(times),
        "half-written beside it": partial,
        "TMPDIR on another filesystem": other,
    }


def damage(folder: Path) -> dict[str, Any]:
    """Damage every file of the newest of two checkpoints in every way; each must be seen, and the one before be taken."""
    from ftcore.train import checkpoint

    def cut(file: Path) -> None:
        os.truncate(file, file.stat().st_size // 2)

    def turn(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        file.write_bytes(content)

    checkpoints = folder / "checkpoints"
    for step in (1, 2):
        checkpoint.write(checkpoints, step, tensors(step), {"step": step}, keep=2)
    last, before = checkpoint.folders(checkpoints)
    shutil.copytree(last, folder / "copy")
    files, seen, tried = sorted(file.name for file in last.iterdir()), 0, 0
    for name in files:
        for hurt, count in ((cut, 1), (Path.unlink, 1), (turn, 40)):
            for _ in range(count):
                hurt(last / name)
                with redirect_stderr(io.StringIO()):
                    found = checkpoint.newest(checkpoints)
                seen += found == before
                tried += 1
                shutil.copytree(folder / "copy", last, dirs_exist_ok=True)
    return {"well": seen == tried, "seen": seen, "tried": tried, "files": files}


def processes(folder: Path, times: str) -> dict[str, Any]:
    """Let the second of two processes fail; the run must end within 60 s, with the right exit code and nobody left."""
    right: dict[str, list[float]] = {"raise": [], "kill": [], "hang": []}
    codes = {"raise": 1, "kill": 5, "hang": 5}
    for kind in track([kind for kind in right for _ in range(int(times))], "one of two", transient=True):
        words = [*_run_without("hardware", "resume"), "hardware=ddp_2cpu", "hang_timeout=10"]
        environment = os.environ | {"FTCORE_FAULTS": f"{kind} process=1 step=3", "FAULTS_MARK": str(folder)}
        started = time.monotonic()
        command = [sys.executable, "-m", "ftcore", *words]
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        seconds, left = time.monotonic() - started, marked(f"FAULTS_MARK={folder}")
        named = {"raise": "a fault that was asked for", "kill": "exit code -9", "hang": "hang_timeout"}[
            kind
        ] in ended.stderr
        if ended.returncode == codes[kind] and named and not left:
            right[kind].append(round(seconds, 1))
    well = all(len(found) == int(times) and max(found) < 60 for found in right.values())
    return {"well": well, "seconds from start to end": right}


def _run_without(*keys: str) -> list[str]:
    """`RUN` for other values of some keys: a command takes each once."""
    return [word for word in RUN if word.partition("=")[0] not in keys]


def marked(mark: str) -> list[str]:
    """Processes whose environment holds the mark."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [file.parent.name] if mark.encode() in file.read_bytes() else []
        except OSError:
            continue
    return found


def worlds(folder: Path) -> dict[str, Any]:
    """One process, then two, then one again, stopped after steps 3 and 7: the losses of one process that is never stopped."""
    words = [*_run_without("adapter.dropout", "hardware", "checkpoints.every"), "checkpoints.every=1"]
    plan = [("cpu", "raise step=4"), ("ddp_2cpu", "raise step=8"), ("cpu", "")]
    for name, parts in (("whole", [("cpu", "")]), ("changing", plan)):
        (folder / name).mkdir()
        for hardware, fault in parts:
            command = [sys.executable, "-m", "ftcore", *words, f"hardware={hardware}"]
            environment = os.environ | {"FTCORE_FAULTS": fault}
            subprocess.run(command, cwd=folder / name, env=environment, capture_output=True)
    one, other = (dict(json.loads(saved(folder / name)[-1])) for name in ("whole", "changing"))
    difference = max(abs(one[step] - other[step]) for step in one) if one.keys() == other.keys() else float("inf")
    return {"well": difference < 1e-6, "steps": len(one), "largest difference of a loss": difference}


def wandb(folder: Path, times: str) -> dict[str, Any]:
    """Train with W&B's server there, and with one that goes away after 100 steps, in turn."""
    from wandb_server import Server

    words = [*FAST, "logger=wandb", "evaluate.enabled=false", "max_epochs=30", "max_steps=1000"]
    seconds: dict[str, list[float]] = {"there": [], "goes away": []}
    for k in range(int(times)):
        for name, found in seconds.items():
            server = Server(leave_after=100 if name == "goes away" else None)
            place = folder / f"{name}{k}"
            place.mkdir()
            command = [sys.executable, "-m", "ftcore", *words]
            subprocess.run(command, cwd=place, env=os.environ | server.environment(), capture_output=True, check=True)
            (file,) = place.glob("runs/*/*/summary.json")
            found.append(json.loads(file.read_text())["seconds_training"])
    there, away = (statistics.median(found) for found in seconds.values())
    return {"well": away / there < 1.02, "goes away / there": away / there, "seconds of training": seconds}


EXPERIMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "kills": kills, "saves": saves, "damage": damage, "processes": processes, "worlds": worlds,
    "wandb": wandb,
}  # fmt: skip

if __name__ == "__main__":
    main()
