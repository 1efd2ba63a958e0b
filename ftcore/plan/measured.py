"""The pace of this CPU: three real steps on random weights."""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ftcore.config.compose import of_run
from ftcore.plan.work import Work
from ftcore.run_folder import Run
from ftcore.settings import Config

STEPS = 3
# Floating point operations of these steps beyond which they would take minutes.
MOST = 1e13


def seconds_of_run(config: Config, work: Work, flops: float) -> float | None:
    """Seconds that all steps of a run take on this CPU, from the later ones of three; None when they were not run.

    `config` builds its network without weights; `flops` are those of all steps.
    """
    if STEPS * flops / work.steps > MOST:
        return None
    with tempfile.TemporaryDirectory(prefix="ftcore-plan-") as folder:
        source = Run(Path(folder) / "source")
        source.folder.mkdir()
        source.write_config(of_run(config))
        words = [
            f"run={source.folder}", f"output_dir={folder}", "name=steps", f"max_steps={STEPS}", "logger=none",
            "evaluate.enabled=false", "checkpoints.every=null", "validate_every=null",
        ]  # fmt: skip
        command = [sys.executable, "-P", "-m", "ftcore", *words]
        subprocess.run(command, capture_output=True, check=False, env=os.environ)
        runs = Run.named(Path(folder) / "steps")
        steps = list(runs[0].metrics()) if runs else []
    paces = [step["train/tokens_per_second"] for step in steps[1:] if "train/tokens_per_second" in step]
    return work.tokens / statistics.median(paces) if paces else None
