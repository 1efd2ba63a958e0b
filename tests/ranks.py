"""Processes of a run that are looked at: `observed_rank` stands in for `ftcore.runs.launch.run_rank`.

FSDP2 gathers and frees the weights of a group (a transformer block, or what is around them) at a time.
"""

import io
import json
import os
import pickle
import threading
from contextlib import suppress
from pathlib import Path

from ftcore.runs.launch import run_rank


def observed_rank(config, resolved, folder, start, ours):
    """Run a process in which no pickle can be read, and write the bytes of each group and the most gathered at any time."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    from ftcore.machine.processes import rank_and_world

    sizes, live, peaks, rank, whole_gradients = {}, {}, [0], [], [0]
    to_unsharded, to_sharded = FSDPParamGroup._to_unsharded, FSDPParamGroup._to_sharded

    def gather(self):
        to_unsharded(self)
        sizes[id(self)] = live[id(self)] = sum(one._unsharded_param.nbytes for one in self.fsdp_params)
        peaks[0] = max(peaks[0], sum(live.values()))
        rank[:] = [rank_and_world()[0]]

    def free(self):
        whole_gradients[0] += any(one.unsharded_accumulated_grad is not None for one in self.fsdp_params)
        to_sharded(self)
        live.pop(id(self), None)

    FSDPParamGroup._to_unsharded, FSDPParamGroup._to_sharded = gather, free
    pickle.load = of_no_file(pickle.load)
    try:
        run_rank(config, resolved, folder, start, ours)
    finally:
        file = Path(folder) / f"gathered-{rank[0] if rank else 'none'}.json"
        file.write_text(
            json.dumps({"groups": [*sizes.values()], "peak": peaks[0], "whole_gradients": whole_gradients[0]})
        )


def of_no_file(load):
    """`pickle.load`, which refuses files: processes may send each other objects."""

    def checked(file, *args, **kwargs):
        assert isinstance(file, io.BytesIO), f"a pickle is read from {file}"
        return load(file, *args, **kwargs)

    return checked


class PeakMemory:
    """The most anonymous memory of this process, in bytes above that at the start, while it is watched."""

    def __enter__(self):
        self.before, self.most, self.ended = _anonymous(), 0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()

    def _watch(self):
        while not self.ended.wait(0.002):
            with suppress(OSError):
                self.most = max(self.most, _anonymous() - self.before)


def _anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def read_in_shares(rank, processes, folder):
    """Read a model in one of several processes, and write down how much memory that took."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT="29533")
    import torch
    from transformers import AutoConfig

    from ftcore.models.foundation import _load_network
    from ftcore.models.sharding import in_shares, shard
    from ftcore.settings import Machine

    torch.set_num_threads(1)
    machine = Machine("cpu", processes, 1, "fsdp", "32-true")
    with in_shares(machine):
        config = AutoConfig.from_pretrained(folder)
        with PeakMemory() as memory:
            network, _ = _load_network(folder, "CausalLM", False, {"config": config})
            shard([network], torch.device("cpu"), in_bfloat16=False)
    assert network.num_parameters() > 6e8
    (Path(folder) / f"peak-{rank}.txt").write_text(str(memory.most))
