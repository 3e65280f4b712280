"""What the zoo holds, as data: where each model lies, what it was trained by, and how good it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Entry:
    """One model of the zoo."""

    name: str
    pipeline: str  # its class in diffusers
    folder: str  # beside this file
    files: Mapping[str, str]  # path in the folder -> SHA-256 of its content
    recipe: str  # the program that trained it, in the repository
    licence: str
    steps: int  # sensible number of denoising steps
    guidance: float  # sensible guidance scale
    scores: Mapping[str, float]  # measured, see docs/results


EMOJI_UNET = Entry(
    name="emoji-unet",
    pipeline="StableDiffusionPipeline",
    folder="emoji-unet",
    files=MappingProxyType(
        {
            "model_index.json": "1f7acf89e4dd5d7985ce4b9475457f6a8c04e8d3486e02b3f0f0438b64aa9c2d",
            "scheduler/scheduler_config.json": "dce544f458aceec61e3c590a93fa4257816c85bf6f6543435a0488d305173392",
            "text_encoder/config.json": "9753af63bf2c2f27b024e2be474b6497f19d822b408f395bd3308ea6dc9759da",
            "text_encoder/model.safetensors": "d00772714d101c7ca85824c0580b5ee9d2af952a6e252dfa5fe365c9c02572e1",
            "tokenizer/tokenizer.json": "4e7b9a0f83117701cf5827bce273f9a34114087b101e92ac851406418d62fe51",
            "tokenizer/tokenizer_config.json": "6b58667b77fc658d9a6a7056ad703210b2c4071cf79f4c90002998072bbdfb4a",
            "unet/config.json": "cfd9e6765949991b645bd9f16cd9b2a309dbb944779180e8195985adfd5a32e0",
            "unet/diffusion_pytorch_model.safetensors": "46055ade8e6ec5b57924bc6361b729c7f1c8a3b3ed267e98e3af62356058af4b",  # noqa: E501
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
            "alignment, training prompts": 0.415,
            "alignment, recombined prompts": 0.351,
            "KID (EfficientNet-Lite0)": 0.3707,
        }
    ),
)

EMOJI_PIXART = Entry(
    name="emoji-pixart",
    pipeline="PixArtAlphaPipeline",
    folder="emoji-pixart",
    files=MappingProxyType(
        {
            "model_index.json": "259fee4b8be4e6059893799826970ee41b99f1b85464720de468e97c928f8c0f",
            "scheduler/scheduler_config.json": "dce544f458aceec61e3c590a93fa4257816c85bf6f6543435a0488d305173392",
            "text_encoder/config.json": "9753af63bf2c2f27b024e2be474b6497f19d822b408f395bd3308ea6dc9759da",
            "text_encoder/model.safetensors": "86307056b0fbb0ebb383415e5f5f8a8d362f7026aa762c8cce0e9d03602fa2ae",
            "tokenizer/tokenizer.json": "4e7b9a0f83117701cf5827bce273f9a34114087b101e92ac851406418d62fe51",
            "tokenizer/tokenizer_config.json": "6b58667b77fc658d9a6a7056ad703210b2c4071cf79f4c90002998072bbdfb4a",
            "transformer/config.json": "cb04af86d403a7f408a1b9e96ee45b5cd5ed0d812ada37f3781a14286293c4ae",
            "transformer/diffusion_pytorch_model.safetensors": "7ebcae0f546bad485afa2ff268670e7285a5020ac22efcda3357265378731a65",  # noqa: E501
            "vae/config.json": "0436323ce4da0fbceebf9dceb9e37618f815c1ce64c5ee34968dccff9efd516a",
            "vae/diffusion_pytorch_model.safetensors": "95b7e0b4399531ab19876778e6376fcbf331df88e6469c96aff5e3c52f56f918",  # noqa: E501
        }
    ),
    recipe="recipes/emoji_pixart.py",
    licence="Apache-2.0; the drawings it learned from are named in NOTICE",
    steps=20,
    guidance=3.0,
    scores=MappingProxyType(
        {
            "alignment, training prompts": 0.209,
            "alignment, recombined prompts": 0.171,
            "KID (EfficientNet-Lite0)": 0.3772,
        }
    ),
)

CATALOG: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in (EMOJI_UNET, EMOJI_PIXART)})
