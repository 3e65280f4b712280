"""The pipeline's own guidance with a negative text: what NAG is compared with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance (Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598) away from a negative text.

    It is no method and is not attached: pass `negative_prompt=` to the pipeline. `compare` runs it as a row.

    Attributes:
        negative_prompt: the text.

    Raises:
        ValueError: no text.
    """

    negative_prompt: str

    def __post_init__(self) -> None:
        if not self.negative_prompt:
            raise ValueError("CFG needs a negative_prompt; without one it is the plain run.")
