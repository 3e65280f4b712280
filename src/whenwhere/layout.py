"""The layout of the guidance batch: which rows are which branch, and which arguments hold rows.

The layout is declared by the model family and by the pipeline, never guessed from a batch size. How many samples there
are, and so how many branches the batch holds, is what the scheduler's `step` moves.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .anatomy import Anatomy, Role
from .families import PIPELINES


@dataclass(frozen=True, slots=True)
class Branches:
    """The branches of one batch.

    Attributes:
        roles: what each equal part of the rows is conditioned on, in order; one role where there is no guidance batch.
        samples: rows of one part.
        arguments: names of the denoiser's arguments that hold such rows.
        survivor: the branch that goes on when the others are dropped for good.
    """

    roles: tuple[Role, ...]
    samples: int
    arguments: tuple[str, ...]
    survivor: Role

    def rows_of(self, role: Role, total: int) -> slice:
        """The rows of one branch among `total`.

        Raises:
            ValueError: the batch has no such branch.
        """
        if role not in self.roles:
            raise ValueError(f"the batch holds the branches {', '.join(self.roles)}; there is no {role} one.")
        size = total // len(self.roles)
        return slice(self.roles.index(role) * size, (self.roles.index(role) + 1) * size)

    def alone(self, role: Role) -> "Branches":
        """The layout of one branch on its own."""
        return Branches((role,), self.samples, self.arguments, role)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the branches of every sample: (branches * n, ...) -> (n, ...).

        n is B, or a multiple of it where frames or places are folded into the rows, branch by branch.
        """
        return tensor.reshape(len(self.roles), -1, *tensor.shape[1:]).mean(0)


def declared_roles(pipeline: object, anatomy: Anatomy) -> tuple[Role, ...] | None:
    """The branches of the pipeline's next batch, as it declares them itself; `None` where it declares nothing.

    Read when a generation begins: pipelines set these properties from the arguments of their call.
    """
    if anatomy.passes:
        return (Role.CONDITIONAL,)  # one branch a call
    guided = getattr(pipeline, "do_classifier_free_guidance", None)
    if guided is None:
        return PIPELINES.get(type(pipeline).__name__)
    roles: tuple[Role, ...] = (Role.CONDITIONAL,)
    if guided:
        roles = PIPELINES.get(type(pipeline).__name__, anatomy.roles)
    if getattr(pipeline, "do_perturbed_attention_guidance", False):
        roles = (*roles, Role.PERTURBED)  # perturbed-attention guidance appends its rows
    return roles


def settle(anatomy: Anatomy, roles: tuple[Role, ...], rows: int, samples: int) -> Branches:
    """The branches of a batch of `rows`, of which the scheduler moves `samples`.

    Raises:
        RuntimeError: the rows are not a whole number of branches, or a number that nobody declared.
    """
    count, rest = divmod(rows, samples)
    if rest or count not in (1, len(roles)):
        raise RuntimeError(
            f"the denoiser saw {rows} rows and the scheduler moved {samples} samples: expected {samples} rows without "
            f"guidance or {samples * len(roles)} with the branches {', '.join(roles)}."
        )
    return branches_of(anatomy, roles if count == len(roles) else (Role.CONDITIONAL,), samples)


def branches_of(anatomy: Anatomy, roles: tuple[Role, ...], samples: int) -> Branches:
    """The layout of a family's batch with these branches."""
    return Branches(roles, samples, anatomy.rows, anatomy.survivor)


def argument_reader(forward: Callable[..., Any]) -> Callable[[Sequence[Any], dict[str, Any]], dict[str, Any]]:
    """A function that names and orders arguments as `forward`'s own signature does; `self` is not among them."""
    names = [name for name in inspect.signature(forward).parameters if name != "self"]

    def named(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return {name: given.pop(name) for name in names if name in given} | given

    return named


def take_rows(value: Any, rows: slice, total: int) -> Any:
    """The given rows of every tensor in a nested argument that has `total` of them; everything else as it is."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == total else value
    if isinstance(value, tuple | list):
        return type(value)(take_rows(item, rows, total) for item in value)
    if isinstance(value, dict):
        return {key: take_rows(item, rows, total) for key, item in value.items()}
    return value


def repeat_rows(output: Any, times: int) -> Any:
    """Every tensor of a nested output, repeated along its rows."""
    if isinstance(output, Tensor):
        return torch.cat([output] * times)
    if isinstance(output, dict):
        return type(output)(**{key: repeat_rows(item, times) for key, item in output.items()})
    return type(output)(repeat_rows(item, times) for item in output)
