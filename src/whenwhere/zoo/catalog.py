"""What the zoo holds, as data: where each model lies, what it was trained by, and how good it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Entry:
    """One model of the zoo."""

    name: str
    folder: str  # beside this file
    files: Mapping[str, str]  # path in the folder -> SHA-256 of its content
    recipe: str  # the program that trained it, in the repository
    licence: str
    steps: int  # sensible number of denoising steps
    guidance: float  # sensible guidance scale
    scores: Mapping[str, float]  # measured, see docs/results


EMOJI_UNET = Entry(
    name="emoji-unet",
    folder="emoji-unet",
    files=MappingProxyType(
        {
            "model_index.json": "1f7acf89e4dd5d7985ce4b9475457f6a8c04e8d3486e02b3f0f0438b64aa9c2d",
            "scheduler/scheduler_config.json": "dce544f458aceec61e3c590a93fa4257816c85bf6f6543435a0488d305173392",
            "text_encoder/config.json": "f3839b86dfee18717173288f04b85dfeffceb43a39eaeebdb76ce3cadf4b82dc",
            "text_encoder/model.safetensors": "82964e43b0d64de2418b6ad0d19609f90f35cddd5c926908aad694dd48306a1d",
            "tokenizer/tokenizer.json": "bd9d2b18bc496c9c0074b0a7cc243c94c1635c44816a6dc32c69eb2de9da0607",
            "tokenizer/tokenizer_config.json": "6b58667b77fc658d9a6a7056ad703210b2c4071cf79f4c90002998072bbdfb4a",
            "unet/config.json": "cfd9e6765949991b645bd9f16cd9b2a309dbb944779180e8195985adfd5a32e0",
            "unet/diffusion_pytorch_model.safetensors": "ae0b1ddacf207b8344de4c045a8a94d662a24006c96adfc6622f8b6814f6deb1",  # noqa: E501
            "vae/config.json": "0436323ce4da0fbceebf9dceb9e37618f815c1ce64c5ee34968dccff9efd516a",
            "vae/diffusion_pytorch_model.safetensors": "95b7e0b4399531ab19876778e6376fcbf331df88e6469c96aff5e3c52f56f918",  # noqa: E501
        }
    ),
    recipe="recipes/emoji_unet.py",
    licence="Apache-2.0; the drawings it learned from are named in NOTICE",
    steps=20,
    guidance=3.0,
    scores=MappingProxyType(
        {
            "alignment, training prompts": 0.234,
            "alignment, recombined prompts": 0.202,
            "KID (EfficientNet-Lite0)": 0.5098,
        }
    ),
)

CATALOG: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in (EMOJI_UNET,)})
