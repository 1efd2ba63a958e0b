"""The process of a `Worker`: reads words and variables of a command from each line, writes a line with what it came to."""

import ctypes
import json
import os
import runpy
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path


def load_hooks(built: str) -> None:
    """Load the hooks before torch looks for them, and what they need of torch."""
    assert "torch" not in sys.modules
    libraries = Path(find_spec("torch").origin).parent / "lib"
    for name in (libraries / "libc10.so", libraries / "libtorch_cpu.so", built):
        ctypes.CDLL(str(name), ctypes.RTLD_GLOBAL)


def pretend_functions() -> None:
    """Answers of `torch.cuda` and of libraries that a CPU build would not give."""
    import lightning.fabric.accelerators.cuda as fabric
    import peft.peft_model
    import peft.utils.save_and_load
    import torch
    import torch.cuda.amp.common
    from torch.distributed.checkpoint import filesystem
    from torch.utils._pytree import tree_map_only

    from ftcore.machine import hardware
    from ftcore.train import tensors
    from tests.pretended.device import WAITS, OnDevice, place

    def none(*_: object, **__: object) -> None: ...

    def synchronize(*_: object) -> None:
        WAITS[f"{place()} synchronize"] += 1

    answers = {
        "is_available": True, "is_initialized": True, "is_bf16_supported": True, "is_current_stream_capturing": False,
        "device_count": 1, "current_device": 0, "max_memory_allocated": 0, "get_device_capability": (9, 0),
        "get_device_name": "pretended", "memory_stats": {},
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in (
        "_lazy_init",
        "init",
        "set_device",
        "empty_cache",
        "reset_peak_memory_stats",
        "manual_seed",
        "manual_seed_all",
    ):
        setattr(torch.cuda, name, none)
    torch.cuda.synchronize = synchronize
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = none
    torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all = lambda: [torch.get_rng_state()], none
    torch._C._cuda_clearCublasWorkspaces, torch._C._cuda_isCurrentStreamCapturing = none, lambda: False
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.autograd.set_multithreading_enabled(False)  # the dispatch mode is that of this thread
    fabric.num_cuda_devices, fabric.is_cuda_available = lambda: 1, lambda: True
    hardware.cuda_devices = lambda: 1
    for module in (peft.utils.save_and_load, peft.peft_model):
        module.infer_device = lambda: "cpu"
    write, apply = tensors.write, torch.nn.Module._apply
    filesystem._OverlappingCpuLoader = lambda resolve, **_: filesystem._SerialCpuLoader(resolve)  # it wants streams
    tensors.write = lambda folder, values: write(folder, tree_map_only(OnDevice, lambda one: one.inner, values))

    def applied(self, *args, **kwargs):  # swapping parameters needs version counters
        with torch.inference_mode(False):
            return apply(self, *args, **kwargs)

    torch.nn.Module._apply = applied


def note_steps(steps: list[dict]) -> None:
    """Have what each optimizer step came to appended to `steps`: host waits since the one before, dtypes, loss."""
    from ftcore.train.callbacks import StepMetrics
    from tests.pretended.device import WAITS

    log = StepMetrics.on_train_batch_end

    def logged(self, trainer, method, outputs, batch, k):
        log(self, trainer, method, outputs, batch, k)
        if (k + 1) % trainer.accumulate_grad_batches == 0:
            state, trained = trainer.optimizers[0].state, method.trained_parameters()
            moments = [state[one][name] for one in trained for name in ("exp_avg", "exp_avg_sq") if one in state]
            kinds = {"parameters": trained, "gradients": [one.grad for one in trained], "moments": moments}
            dtypes = {kind: sorted({str(one.dtype) for one in some}) for kind, some in kinds.items()}
            steps.append({"waits": dict(WAITS), "dtypes": dtypes, "loss": method.step_totals["loss"]})
            WAITS.clear()

    StepMetrics.on_train_batch_end = logged


def run_script(file: str, *words: str) -> int:
    """Run a Python file with these arguments."""
    sys.argv, path = [file, *words], sys.path
    sys.path = [str(Path(file).parent), *path]
    try:
        runpy.run_path(file, run_name="__main__")
    finally:
        sys.path = path
    return 0


def outcome(words: list[str], steps: list[dict]) -> dict:
    """Exit status; of the last step waits by place, dtypes, loss; where devices met and where float64 got onto the device."""
    from ftcore.cli.command import run_command
    from tests.pretended import device

    for counter in (device.WAITS, device.MIXED, device.DOUBLES, steps):
        counter.clear()
    try:
        status = run_script(*words) if words[0].endswith(".py") else run_command(words)
    except Exception:
        traceback.print_exc()
        status = 1
    last = steps[-1] if steps else {"waits": {}, "dtypes": {}}
    return {"status": status, "mixed": dict(device.MIXED), "doubles": dict(device.DOUBLES), **last}


if __name__ == "__main__":
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what commands print is no answer, and they read nothing
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    load_hooks(sys.argv[1])
    from tests.pretended.device import pretended

    steps: list[dict] = []
    pretend_functions()
    note_steps(steps)
    with pretended():
        for line in commands:
            words, environment = json.loads(line)
            os.environ.update(environment)
            print(json.dumps(outcome(words, steps)), file=answers, flush=True)
