"""Work shared out among the processes of a run; in a run of one process all of it is that one's."""

import gc
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")
_work: list[Callable[[int], None]] = []


def rank_and_world() -> tuple[int, int]:
    """Number of this process and of all processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(part: T) -> list[T]:
    """`part` of every process, in the order of their numbers."""
    if not dist.is_initialized():
        return [part]
    parts = [part] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


def shared_out(
    items: Sequence[T], work: Callable[[list[T]], list[R]], to_others: Callable[[R], R] = lambda result: result
) -> list[R]:
    """`work` on this process's share of `items`; every process gets all results, in the order of the items.

    `to_others`: what the other processes get of a result (default: all of it).

    >>> shared_out([1, 2, 3], lambda share: [10 * item for item in share])
    [10, 20, 30]
    """
    rank, world = rank_and_world()
    own = work(list(items[rank::world]))
    results = gathered([to_others(one) for one in own]) if world > 1 else [own]
    results[rank] = own
    parts = [iter(part) for part in results]
    return [next(parts[k % world]) for k in range(len(items))]


def dealt(parts: list[T]) -> list[T]:
    """What each process has for this one, in the order of their numbers: process k gets `parts[k]` of each."""
    if not dist.is_initialized():
        return parts
    received = [parts[:1] for _ in parts]
    for sender, part in enumerate(received):
        dist.scatter_object_list(part, parts, sender)
    return [part[0] for part in received]


def in_processes(work: Callable[[int], None], count: int) -> None:
    """`work(k)` for every k below `count`, each in a copy of this process; the first error of one is raised here.

    For work in Python and on files: a copy has no threads, so it must not compute with tensors.
    """
    _work.append(work)  # copies find it there; it need not be sent
    gc.freeze()  # or the copies' garbage collectors would touch, and so copy, all memory
    try:
        with ProcessPoolExecutor(count, mp_context=get_context("fork")) as pool:
            list(pool.map(_in_copy, range(count)))
    finally:
        _work.pop()


def _in_copy(k: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.disable()  # it is short-lived, and looking for cycles among many rows is slow
    _work[-1](k)
