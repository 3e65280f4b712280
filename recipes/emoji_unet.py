"""Train `emoji-unet`: a small Stable Diffusion on emoji, for one CPU core and an hour, or a GPU and some minutes.

Run it as `python recipes/emoji_unet.py --budget 3600 --out runs/emoji-unet`. The same line goes on with an interrupted
run, and exports a finished one again.
"""

from dataclasses import dataclass, field

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from emoji import Emoji, build_scheduler, build_text_encoder, fit_autoencoder, learn_emoji, learn_words, options
from transformers import CLIPTokenizer

from whenwhere.models.patch_pca import PatchPCA
from whenwhere.train.diffusion import TrainConfig
from whenwhere.train.state import TrainState


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on what; how long is the command line's choice."""

    emoji: Emoji = field(default_factory=Emoji)
    widths: tuple[int, ...] = (48, 96, 144)
    groups: int = 16  # of the group norms
    heads: int = 4
    batch_size: int = 32
    seed: int = 0


def main() -> None:
    args = options(__doc__, "runs/emoji-unet").parse_args()
    recipe = Recipe()
    torch.set_flush_denormal(True)  # tiny numbers slow a CPU down
    pipeline = build(recipe, fit_autoencoder(recipe.emoji), learn_words(recipe.emoji))
    pipeline.to(args.device)
    if args.compile:
        pipeline.unet.compile(dynamic=False)
    config = TrainConfig(budget=args.budget, batch_size=recipe.batch_size, bfloat16=args.bfloat16, seed=recipe.seed)
    state = TrainState(pipeline.unet, pipeline.text_encoder, config.learning_rate, config.weight_decay, config.seed)
    learn_emoji(recipe.emoji, pipeline, state, config, args.out)


def build(recipe: Recipe, vae: PatchPCA, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The untrained pipeline; weights come from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        text_encoder = build_text_encoder(recipe.emoji, tokenizer)
        unet = build_unet(recipe)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_unet(recipe: Recipe) -> UNet2DConditionModel:
    """Three resolutions (16, 8, 4); the two lower ones, and the middle, attend to the text."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=recipe.emoji.latent_channels,
        out_channels=recipe.emoji.latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=recipe.widths,
        layers_per_block=1,
        norm_num_groups=recipe.groups,
        attention_head_dim=recipe.heads,  # diffusers reads this as the number of heads
        cross_attention_dim=recipe.emoji.text_width,
        use_linear_projection=True,
    )


if __name__ == "__main__":
    main()
