"""Norms that bound how a perturbation grows on its way through a network: of blocks, and of the fusions of long skips.

With long skips (Skip-DiT, Chen et al., 2024, https://arxiv.org/abs/2411.17616) a block of the second half fuses the
stream with a skip by one weight, so its half for the stream says how much of a perturbed stream goes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def jacobian_norm(
    function: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator, iterations: int = 20
) -> float:
    """The largest singular value of the Jacobian of `function` at x, by power iteration on J^T J.

    Every iteration is one product J v and one J^T u, both by reverse differentiation. The estimate grows towards the
    norm from below; with a batch it is the norm of the whole, the largest of its rows' if these do not interact.
    """
    x = x.detach().requires_grad_(True)
    v = torch.randn(x.shape, generator=generator).to(x)
    norm = x.new_zeros(())
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        y = function(x)
        probe = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, x, probe, create_graph=True)  # J^T probe, linear in the probe
        for _ in range(iterations):
            (u,) = torch.autograd.grad(pulled, probe, v / v.norm(), retain_graph=True)  # J v
            norm = u.norm()
            if not norm:
                break
            (v,) = torch.autograd.grad(y, x, u, retain_graph=True)  # J^T u
    return float(norm)


def block_jacobian_norms(
    blocks: Sequence[nn.Module], run: Callable[[], object], generator: torch.Generator, iterations: int = 20
) -> list[float]:
    """`jacobian_norm` of every block with respect to the stream that enters it, where one run of the network takes it.

    The skip of a fusing block, timestep and labels are held fixed. Every block has to run exactly once.
    """
    inputs: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[block] = (args, kwargs)

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    norms = []
    for block in blocks:
        args, kwargs = inputs[block]
        # `forward`, not a call: hooks have done their work on these arguments.
        rest = partial(_continue, block.forward, args[1:], kwargs)
        norms.append(jacobian_norm(rest, args[0], generator, iterations))
    return norms


def _continue(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor) -> Tensor:
    return function(stream, *args, **kwargs)


@dataclass(frozen=True)
class FusionSpectrum:
    """Singular values of one fusion's weight (D, 2D), each descending, (D,).

    Attributes:
        path: name of the fusing module.
        whole: of W.
        stream: of its first D columns, which act on the stream.
        skip: of its last D columns, which act on the skip.
    """

    path: str
    whole: Tensor
    stream: Tensor
    skip: Tensor


@torch.no_grad()
def fusion_spectra(model: nn.Module) -> list[FusionSpectrum]:
    """The singular values of all fusions of a network with long skips: ours, or diffusers' HunyuanDiT.

    Raises:
        ValueError: there is none.
    """
    found = []
    for path, module in model.named_modules():
        linear = getattr(module, "skip_linear", None)
        if isinstance(linear, nn.Linear):
            weight = linear.weight.float()
            whole, stream, skip = (torch.linalg.svdvals(w) for w in (weight, *weight.chunk(2, dim=1)))
            found.append(FusionSpectrum(path, whole, stream, skip))
    if not found:
        raise ValueError(f"{type(model).__name__} has no long skips (no module called skip_linear).")
    return found
