"""Whose turn it is: one generation at a time, moved by one scheduler.

Loops hand elements of the scheduler's own `timesteps` to the network and to `scheduler.step`. Where such an element
lies in memory tells which step it is, and of which layout, without waiting for the device as comparing numbers would.
"""

import torch
from torch import Tensor


def place(timesteps: Tensor, given: object) -> int | None:
    """The number of a timestep among those that a scheduler laid out.

    Args:
        timesteps: (T,), all of them.
        given: what a network or a scheduler was told; `None` comes back unless it is an element of theirs, no copy.
    """
    if not isinstance(given, Tensor) or not share_memory(timesteps, given) or not timesteps.stride(0):
        return None
    return (given.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are parts of one."""
    if "meta" in (one.device.type, other.device.type):
        return False
    its = other.untyped_storage()
    return one.untyped_storage().data_ptr() == its.data_ptr() and bool(its.nbytes())


class Turns:
    """Refuses what would mix generations up. Timesteps that are copies pass unseen."""

    def __init__(self, scheduler: object) -> None:
        """Watch the loops around a scheduler."""
        self._scheduler = type(scheduler).__name__
        self._timesteps = self._left = torch.empty(0)  # of the present generation; of one that another broke into
        self._place: int | None = None  # of the last step among them, where it is known
        self._told: Tensor | None = None  # what the network was told since the scheduler moved

    def laid_out(self, broken: bool) -> None:
        """The scheduler laid out its steps, in the middle of a generation or not."""
        if broken:
            self._left = self._timesteps
        self._told = None

    def begin(self, timesteps: Tensor) -> None:
        """A generation begins, with these timesteps laid out."""
        self._timesteps, self._place, self._told = timesteps, None, None

    def call(self, timestep: object) -> None:
        """The network is called.

        Raises:
            RuntimeError: at another timestep than before though the scheduler has not moved, so that every step would
                count as a pass of the first.
        """
        before, self._told = self._told, timestep if isinstance(timestep, Tensor) else None
        if before is None or self._told is None or not share_memory(before, self._told):
            return
        if before.storage_offset() != self._told.storage_offset():
            raise RuntimeError(
                f"the denoiser was called at another timestep before {self._scheduler}.step, so another scheduler must "
                "be in use than the one attached to. Attach to the pipeline that runs, or with the scheduler of your "
                "loop: attach(denoiser, ..., scheduler=...)."
            )

    def step(self, timestep: object) -> None:
        """The scheduler moves in a generation.

        Raises:
            RuntimeError: this step does not follow the one before; what one generation remembers would be handed to
                another.
        """
        self._told = None
        now, before = place(self._timesteps, timestep), self._place
        self._place = now
        broken = len(self._left) and place(self._left, timestep) is not None
        if broken or (now is not None and before is not None and now != before + 1):
            raise RuntimeError(
                f"{self._scheduler}.step was called for a timestep that does not follow the one before: two "
                "generations take turns, or one was begun anew without set_timesteps. An attachment carries one "
                "generation at a time; finish it, or call set_timesteps before the next one begins."
            )
