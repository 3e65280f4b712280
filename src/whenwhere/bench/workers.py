"""Several processes, or machines, on one order: each runs every n-th case, one process writes what they find.

Rows do not depend on who ran them: every picture comes from its own seeded generator and its own plain run, and every
process computes with the same number of threads. Only seconds do, since processes share a machine.
"""

import multiprocessing
import sys
from collections.abc import Collection, Iterator
from multiprocessing.queues import Queue
from queue import Empty
from typing import Any

from .order import Event, Merged, Order, carry_out
from .rows import Job
from .run import Watch

_PATIENCE = 1.0  # seconds between looks at whether a silent process still lives


def by_processes(order: Order, workers: int, finished: Collection[Job], watch: Watch) -> Iterator[Event]:
    """Events of so many processes on this machine.

    Raises:
        RuntimeError: a process ended without an answer, for example for want of memory.
        Exception: whatever a process raised.
    """
    context = multiprocessing.get_context("spawn")
    queue: Queue[Any] = context.Queue()
    processes = [
        context.Process(target=_serve, args=(order, slice(first, None, workers), finished, queue), daemon=True)
        for first in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        running, merged = set(range(workers)), Merged()
        while running:
            number, message = _next(queue, processes, running)
            if message is None:
                running.discard(number)
            elif isinstance(message, Exception):
                raise message
            elif isinstance(message, str):
                watch(message)
            elif merged.passes(message):
                yield message
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _next(queue: "Queue[Any]", processes: list[Any], running: set[int]) -> tuple[int, Any]:
    """The next message, with the number of its process; `None` is the last of a process."""
    while True:
        try:
            found: tuple[int, Any] = queue.get(timeout=_PATIENCE)
            return found
        except Empty:
            for number in running:
                if (code := processes[number].exitcode) is not None and queue.empty():
                    raise RuntimeError(
                        f"process {number + 1} of {len(processes)} ended with exit code {code}; "
                        "run the same command again to go on with what is missing."
                    ) from None


def _serve(order: Order, share: slice, finished: Collection[Job], queue: "Queue[Any]") -> None:
    """One process: everything that happens goes into the queue, numbered."""
    number, parent = share.start, multiprocessing.parent_process()
    try:
        for event in carry_out(order, finished, share, lambda text: queue.put((number, text))):
            if parent is not None and not parent.is_alive():
                sys.exit(1)  # nobody is left to write rows down
            queue.put((number, event))
        queue.put((number, None))
    except Exception as error:  # it is the parent's to tell
        queue.put((number, _portable(error)))


def _portable(error: Exception) -> Exception:
    """An error that another process can read: of the built-in kind that it is, or in words."""
    kind = next(
        (kind for kind in (ValueError, TypeError, ImportError, OSError) if isinstance(error, kind)), RuntimeError
    )
    return kind(str(error) or type(error).__name__)
