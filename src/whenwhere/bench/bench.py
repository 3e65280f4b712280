"""The bench: an order is carried out, by one process or several, into a file of rows that survives being killed."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from .cluster import by_ray
from .order import Begun, Done, Event, Listed, Order, carry_out
from .replacing import replacing
from .rowfile import Content, RowFile, is_new
from .run import Watch
from .workers import by_processes

Progress = Callable[[int, int], None]  # rows that are there, rows in all


def bench(
    order: Order,
    path: Path,
    workers: int = 1,
    ray: str = "",
    watch: Watch = lambda _: None,
    progress: Progress = lambda _done, _all: None,
) -> RowFile:
    """Measure what is missing in a file of rows.

    Args:
        order: what to run.
        path: the file; it is begun when everything has been found to fit. Pictures and plans go beside it.
        workers: processes, or tasks on a cluster.
        ray: address of a Ray cluster, "local" for one on this machine; empty for plain processes.
        watch: is told what is run next.
        progress: is told how many rows there are, of how many.

    Raises:
        ValueError: something does not fit, or the file was measured otherwise.
    """
    finished = set() if is_new(path) else {row.job for row in Content.read(path).rows}
    if ray:
        events = by_ray(order, workers, finished, ray)
    elif workers > 1:
        events = by_processes(order, workers, finished, watch)
    else:
        events = carry_out(order, finished, watch=watch)
    return _write_down(events, order, path, progress)


def _write_down(events: Iterator[Event], order: Order, path: Path, progress: Progress) -> RowFile:
    """Into the file; plans and pictures first, so that nothing is missing for a row that is there."""
    begun = next(events)
    assert isinstance(begun, Begun)  # the first event of every order
    # A new file waits for the first prices, so that a model that cannot run leaves nothing behind.
    events = chain([next(events)], events) if is_new(path) else events
    file = RowFile(path, begun.environment, order.judging.scores, begun.setting)
    file.expect(begun.cases)
    listed = 0
    for event in events:
        file.folder.mkdir(exist_ok=True)
        if isinstance(event, Listed):
            listed += 1
            with replacing(file.folder / f"{event.listing.key}.plan.json") as temporary:
                event.plan.save(temporary)
            file.list(event.listing)
        elif isinstance(event, Done):
            if event.picture is not None:
                with replacing(file.folder / f"{event.row.job.key}.png") as temporary:
                    temporary.write_bytes(event.picture)
            file.append(event.row)
        progress(len(file.rows), max(len(file.rows), listed * begun.cases))
    return file
