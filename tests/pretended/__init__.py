"""A pretended CUDA device on a CPU build of torch, to run whole commands as if on a GPU.

Its tensors say that they are on cuda:0 and hold their values on the CPU, so everything computes as it is. Noted is where tensors
of two devices meet, where the host would wait for the device, and where float64 gets onto it. What only a GPU has, its kernels,
their speed and rounding, is not pretended. torch looks its hooks up once, so commands run in a process of their own.
"""

import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("hooks.cpp")
TORCH = Path(find_spec("torch").origin).parent


def library(folder: Path) -> Path:
    """The hooks, compiled into `folder` once. Raises `OSError` without a compiler, `CalledProcessError` where it fails."""
    key = hashlib.sha256(f"{version('torch')} {SOURCE.read_text()}".encode()).hexdigest()[:12]
    built = folder / f"hooks-{key}.so"
    if not built.is_file():
        partial = built.with_suffix(f".{os.getpid()}")
        command = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{TORCH / 'include'}", SOURCE, "-o", partial]
        subprocess.run(command, check=True, capture_output=True)
        partial.rename(built)
    return built


class Worker:
    """A process in which commands run on the pretended device, one after the other, in `folder`."""

    def __init__(self, built: Path, folder: Path) -> None:
        paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        self.log = folder / "log.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.pretended", built],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def run(self, *words: str, **environment: str) -> dict:
        """What `python -m ftcore <words>` came to, with these variables: `outcome` of __main__.py, with the end of its output."""
        self.process.stdin.write(json.dumps([words, environment]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()[-3000:]
        return json.loads(answer) | {"log": self.log.read_text()[-3000:]}

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
