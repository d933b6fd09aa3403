"""Processes that are the ranks of process groups, for tests."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 60  # that a rank waits for another one
LONGEST_CALL = 300  # seconds


def _serve(rank: int, size: int, rendezvous: str, backend: str, tasks, results) -> None:
    """Join the process groups and run what is asked for."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=SECONDS)
    if torch.cuda.is_available() and "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, f"file://{rendezvous}", rank=rank, world_size=size, timeout=timeout)
    groups = {count: dist.new_group(range(count), timeout=timeout) for count in range(1, size + 1)}
    while (task := tasks.get()) is not None:
        function, count, arguments = task
        try:
            outcome = True, function(groups[count], *arguments)
        except BaseException as error:
            outcome = False, (type(error), str(error), traceback.format_exc())
        results.put((rank, outcome))
    dist.destroy_process_group()


class RankError(Exception):
    """An error of a rank.

    Attributes:
        kind: The type of the error.
    """

    def __init__(self, kind: type, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Pool:
    """A pool of processes that stay for many calls.

    Args:
        size: The number of processes, and the size of the largest process group.
        modules: Modules that are imported before the processes are forked.
        backend: Backend of the process groups.
    """

    def __init__(self, size: int, modules: Sequence[str], backend: str = "gloo") -> None:
        context = multiprocessing.get_context("forkserver")
        # The processes are forked from one that has imported these, and knows no other path.
        context.set_forkserver_preload(list(modules))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.size = size
        self._tasks = [context.Queue() for _ in range(size)]
        self._results = context.Queue()
        rendezvous = tempfile.mktemp()
        self._processes = [
            context.Process(
                target=_serve, args=(rank, size, rendezvous, backend, self._tasks[rank], self._results), daemon=True
            )
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()

    def outcomes(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what `function(group, *arguments)` returns on each rank of a group, or the `RankError` it raises."""
        for tasks in self._tasks[:ranks]:
            tasks.put((function, ranks, arguments))
        found = {}
        while len(found) < ranks:
            try:
                rank, (fine, value) = self._results.get(timeout=LONGEST_CALL)
            except queue.Empty:
                self.close()
                raise TimeoutError(f"only the ranks {sorted(found)} of {ranks} returned") from None
            found[rank] = value if fine else RankError(value[0], value[1] + "\n" + value[2])
        return [found[rank] for rank in range(ranks)]

    def run(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the results of each rank. If one fails, its error is raised."""
        outcomes = self.outcomes(ranks, function, *arguments)
        for outcome in outcomes:
            if isinstance(outcome, RankError):
                raise outcome
        return outcomes

    def close(self) -> None:
        """End the processes."""
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def pool(size: int = 4, modules: Sequence[str] = ("icsd", "torch._dynamo"), backend: str = "gloo") -> Iterator[Pool]:
    """Start the processes for a `with` block."""
    processes = Pool(size, modules, backend)
    try:
        yield processes
    finally:
        processes.close()
