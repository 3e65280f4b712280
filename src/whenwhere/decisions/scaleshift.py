"""Scale and shift of Block Caching: what a reused contribution is multiplied by and what is added, by timestep."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from ..call import Output, map_tensors
from ..method import Setting
from ..setting import same_timesteps

_FORMAT = "1"  # of the files
_EMBEDDING = 256  # numbers that a timestep is told by


class ScaleShift:
    """C' = (1 + scale(t)) C + shift(t) for every reused contribution C (Block Caching, section 3.4).

    For every tensor of a unit's contribution a linear map from the sinusoidal embedding of the timestep, of unit
    length, gives a scale and a shift of each channel. It begins as the identity; `train_scale_shift` trains it.

    Args:
        widths: for every unit's path the channels of its contribution, one number for each tensor of it.
        timesteps: of all steps of the generations that it is for.
        computed: for every unit's path the steps at which it is computed, as `"#..#"`; it holds for this schedule only.
        configuration: what the denoiser was made with, as JSON; `None` where it does not tell.

    Raises:
        ValueError: timesteps and schedule are of different lengths.
    """

    def __init__(
        self,
        widths: Mapping[str, Sequence[int]],
        timesteps: Sequence[float],
        computed: Mapping[str, str],
        configuration: str | None = None,
    ) -> None:
        self.widths = {path: tuple(parts) for path, parts in widths.items()}
        self.timesteps, self.computed, self.configuration = tuple(timesteps), dict(computed), configuration
        for path, row in self.computed.items():
            if len(row) != len(self.timesteps):
                raise ValueError(f"{path} has a schedule of {len(row)} steps, of {len(self.timesteps)} timesteps.")
        self.maps = {
            f"{path}:{part}": _zero(nn.Linear(_EMBEDDING, 2 * width))
            for path, parts in self.widths.items()
            for part, width in enumerate(parts)
        }
        self.embedded = _embed(self.timesteps)  # (T, 256)
        self.known: dict[tuple[str, int], tuple[object, Tensor]] = {}  # by map and step: its state, and what it gives

    def __repr__(self) -> str:
        return f"ScaleShift of {len(self.widths)} units at {len(self.timesteps)} steps"

    def refuse(self, setting: Setting) -> None:
        """Refuse a generation of other timesteps, where they are known.

        Raises:
            ValueError: it has others.
        """
        if setting.timesteps is not None and not same_timesteps(self.timesteps, setting.timesteps):
            raise ValueError(
                f"{self} was trained for the timesteps {self.timesteps}, but this generation has {setting.timesteps}; "
                "train one for this schedule."
            )

    def adjust(self, contribution: Output, path: str, step: int) -> Output:
        """What stands for a remembered contribution at a later step.

        Args:
            contribution: of the unit, nested; tensors (B, N, D), or (B, C, ...) with more axes.
            path, step: the unit and the number of the step.
        """
        parts = iter(range(len(self.widths[path])))

        def change(tensor: Tensor) -> Tensor:
            found = self._vector(f"{path}:{next(parts)}", step, tensor)
            if tensor.ndim > 3:  # channels before the pixels
                found = found.reshape(-1, *(1,) * (tensor.ndim - 2))
            scale, shift = found.chunk(2)
            return (1 + scale) * tensor + shift

        return map_tensors(contribution, change)

    def _vector(self, name: str, step: int, like: Tensor) -> Tensor:
        """Scales and shifts, (2C,); looked up where nothing was learnt since."""
        linear = self.maps[name]
        if torch.is_grad_enabled():
            fresh: Tensor = linear(self.embedded[step])
            return fresh.to(like)
        state = (linear.weight._version, like.dtype, like.device)
        if self.known.get((name, step), (None,))[0] != state:
            self.known[name, step] = state, linear(self.embedded[step]).to(like)
        return self.known[name, step][1]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that is trained."""
        for part in self.maps.values():
            yield from part.parameters()

    def save(self, path: str | Path) -> None:
        """Write it as safetensors."""
        from safetensors.torch import save_file

        tensors = {
            f"{name}.{key}": value for name, part in self.maps.items() for key, value in part.state_dict().items()
        }
        names = ("widths", "timesteps", "computed", "configuration")
        about = {name: getattr(self, name) for name in names}
        save_file(tensors, path, {"whenwhere": _FORMAT, **{key: json.dumps(value) for key, value in about.items()}})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no saved scale and shift.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.pop("whenwhere", None) != _FORMAT:
                    raise ValueError("no scale and shift, or written by another version of the format")
                found = cls(**{key: json.loads(value) for key, value in about.items()})
                for name, part in found.maps.items():
                    part.load_state_dict({key: file.get_tensor(f"{name}.{key}") for key in ("weight", "bias")})
                return found
        except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} is no saved scale and shift: {error}") from error


def channels(tensor: Tensor) -> int:
    """The channels of a contribution: the last axis of (B, N, D), the second where there are more axes."""
    return tensor.shape[1] if tensor.ndim > 3 else tensor.shape[-1]


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _embed(timesteps: Sequence[float]) -> Tensor:
    """Sinusoids (T, 256) of unit length: Adam's steps are then as long as its learning rate says."""
    from diffusers.models.embeddings import get_timestep_embedding

    sinusoids: Tensor = get_timestep_embedding(torch.tensor(timesteps, dtype=torch.float32), _EMBEDDING)
    return sinusoids.mul((2 / _EMBEDDING) ** 0.5)
