"""The same order on a Ray cluster: every worker is a task that streams its events; this process writes them down."""

from collections.abc import Collection, Iterator
from typing import Any

from .order import Event, Merged, Order, carry_out
from .rows import Job


def by_ray(order: Order, workers: int, finished: Collection[Job], address: str) -> Iterator[Event]:
    """Events of so many tasks on the cluster at an address; "local" starts one on this machine.

    All machines must be able to open the model under the same name.

    Raises:
        ImportError: Ray is not installed.
    """
    ray = require()
    ray.init(address=None if address == "local" else address, include_dashboard=False, log_to_driver=False)
    try:
        gpus = 0 if order.device == "cpu" else 1
        task = ray.remote(num_cpus=order.threads, num_gpus=gpus if ray.cluster_resources().get("GPU") else 0)(carry_out)
        streams = {
            task.options(num_returns="streaming").remote(order, finished, slice(first, None, workers)): first
            for first in range(workers)
        }
        yield from _events(ray, streams)
    finally:
        ray.shutdown()


def _events(ray: Any, streams: dict[Any, int]) -> Iterator[Event]:
    """What the tasks tell, as it comes."""
    merged = Merged()
    while streams:
        (ready,), _ = ray.wait(list(streams), num_returns=1, fetch_local=False)
        try:
            event = ray.get(next(ready))
        except StopIteration:
            del streams[ready]
            continue
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        if merged.passes(event):
            yield event


def require() -> Any:
    """Ray itself.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"a cluster needs the extra: pip install 'whenwhere[ray]' ({error})") from error
    return ray
