"""What routers learn from beside the language: their losses, rates of learning, and schedules."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .criterion import Criterion, Surprising
from .mod import MoDRouter
from .networks import Guess, Imitator

if TYPE_CHECKING:
    from .call import Call
    from .routing import Routing

_IGNORED = -100  # labels of no target, by the convention of transformers


def total(routing: "Routing", call: "Call") -> Tensor:
    """The weighted sum of the routers' losses in a call, each averaged over the routed layers."""
    terms = [note.losses for note in call.notes.values()]
    weighted = [
        torch.stack([losses[name].float() for losses in terms]).mean() * weight
        for name, weight in routing.weights.items()
        if weight and all(name in losses for losses in terms)
    ]
    return torch.stack(weighted).sum() if weighted else torch.zeros((), device=call.rank.device)


def share_of_update(labels: Tensor, more: Mapping[str, Any]) -> Tensor | float:
    """The share in [0, 1] that a micro-batch has in an update of the parameters, by its number of targets.

    `Trainer` accumulates gradients by dividing the language loss by the targets of all micro-batches, which it hands to
    the model as `num_items_in_batch`; without that number a batch is the whole update.
    """
    targets = more.get("num_items_in_batch")
    if targets is None:
        return 1.0
    shifted = more.get("shift_labels")
    own = (labels[..., 1:] if shifted is None else shifted).ne(_IGNORED).sum()
    share: Tensor = own / targets
    return share


def with_loss(output: Any, added: Tensor) -> Any:
    """A model's output, a tuple or not, with something added to its loss."""
    if isinstance(output, tuple):
        return (output[0] + added.to(output[0].device), *output[1:])
    output["loss"] = output["loss"] + added.to(output["loss"].device)
    return output


def routing_loss(model: nn.Module) -> Tensor:
    """The routers' losses in the last forward call, weighted and summed: a scalar to add to the model's.

    The loss that a routed model returns in training includes it already, or the part of it that a micro-batch has in an
    update.

    Raises:
        ValueError: there was no call in training mode.
    """
    from .within import find

    routed = find(model)
    if routed.call is None or not routed.call.training:
        raise ValueError("routing_loss needs a forward call in training mode before; call model.train() first.")
    return total(routed.routing, routed.call)


def set_step(model: nn.Module, step: int, steps: int) -> None:
    """Tell a model with scheduled β at which step of how many its training is.

    Raises:
        ValueError: the step is out of range.
    """
    from .within import find

    if not 0 <= step <= steps:
        raise ValueError(f"step must be in 0 ... {steps}, got {step}")
    routed = find(model)
    routed.stepped = True
    if not isinstance(routed.routing, Surprising):
        return
    value = routed.routing.beta_schedule.at(step, steps)
    for module in routed.modules():
        if isinstance(module, Criterion) and routed.routing.beta_mode == "scheduled":
            module.beta.fill_(value)


def parameter_groups(
    model: nn.Module,
    base: float = 1e-5,
    network: float = 1e-3,
    scalar: float = 1e-2,
    weight_decay: float = 0.01,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: language model, networks of the routers, and their scalars.

    Args:
        model: a routed model, perhaps with adapters; parameters without gradient are left out.
        base: the rate of the language model.
        network: of guesses, students, and MoD's router.
        scalar: of the scalars of the criteria.
        weight_decay: of matrices; norms, biases, vectors and scalars have none.

    Returns:
        dictionaries of "params", "lr", "weight_decay" and "name".
    """
    rates = {"base": base, "network": network, "scalar": scalar}
    kinds: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, (Guess, Imitator, MoDRouter)):
            kinds |= {id(parameter): "network" for parameter in module.parameters()}
        if isinstance(module, Criterion):
            kinds |= {id(parameter): "scalar" for parameter in module.parameters()}
    groups: dict[str, dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind, decays = kinds.get(id(parameter), "base"), parameter.ndim > 1
            name = kind if decays else f"{kind} without decay"
            decay = weight_decay if decays else 0.0
            group = groups.setdefault(name, {"params": [], "lr": rates[kind], "weight_decay": decay, "name": name})
            group["params"].append(parameter)
    return list(groups.values())
