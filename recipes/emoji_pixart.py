"""Train `emoji-pixart`: a small PixArt on the emoji of `emoji-unet`.

Run it as `python recipes/emoji_pixart.py --budget 3600 --out runs/emoji-pixart`. The same line goes on with an
interrupted run, and exports a finished one again. The captions are read by the text encoder that `emoji-unet` brought
up, which goes on learning.
"""

from dataclasses import dataclass, field

import torch
from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel
from emoji import Emoji, build_scheduler, build_text_encoder, fit_autoencoder, learn_emoji, learn_words, options
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from whenwhere import zoo
from whenwhere.models.patch_pca import PatchPCA
from whenwhere.train.diffusion import DenoiserInput, Told, TrainConfig
from whenwhere.train.state import TrainState


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on what; how long is the command line's choice."""

    emoji: Emoji = field(default_factory=Emoji)
    layers: int = 12
    heads: int = 4
    head_width: int = 32
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    seed: int = 0


def main() -> None:
    parser = options(__doc__, "runs/emoji-pixart")
    parser.add_argument("--least-weight", type=float, default=TrainConfig.least_weight, help="of noisy timesteps")
    args = parser.parse_args()
    recipe = Recipe()
    torch.set_flush_denormal(True)  # tiny numbers slow a CPU down
    pipeline = build(recipe, fit_autoencoder(recipe.emoji), learn_words(recipe.emoji))
    pipeline.to(args.device)
    config = TrainConfig(
        budget=args.budget,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        least_weight=args.least_weight,
        bfloat16=args.bfloat16,
        seed=recipe.seed,
    )
    if args.compile:
        pipeline.transformer.compile(dynamic=False)
    linear = [module for module in pipeline.transformer.transformer_blocks.modules() if isinstance(module, nn.Linear)]
    state = TrainState(
        pipeline.transformer,
        pipeline.text_encoder,
        config.learning_rate,
        config.weight_decay,
        config.seed,
        hidden=[module.weight for module in linear],
    )
    learn_emoji(recipe.emoji, pipeline, state, config, args.out, answer)


def answer(state: TrainState, given: DenoiserInput, input_ids: Tensor) -> Tensor:
    """What the transformer answers, (B, C, H, W)."""
    return told_pixart(state.denoiser, state.text_encoder, input_ids)(given.noisy, given.timesteps)


def told_pixart(transformer: PixArtTransformer2DModel, text_encoder: CLIPTextModel, input_ids: Tensor) -> Told:
    """A transformer that has read its captions (B, T); padding is masked, as in the pipeline."""
    mask = attended(input_ids, text_encoder.config.eos_token_id)
    text = text_encoder(input_ids, attention_mask=mask).last_hidden_state  # (B, T, D)

    def told(noisy: Tensor, timesteps: Tensor) -> Tensor:
        found: Tensor = transformer(
            noisy,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return found

    return told


def attended(input_ids: Tensor, end: int) -> Tensor:
    """1 for the words and the first end token, 0 for the padding after it; (B, T), as a tokenizer's mask."""
    ends = (input_ids == end).cumsum(dim=1)
    return ((ends - (input_ids == end).long()) == 0).long()


def build(recipe: Recipe, vae: PatchPCA, tokenizer: CLIPTokenizer) -> PixArtAlphaPipeline:
    """The untrained pipeline; weights come from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        text_encoder = build_text_encoder(recipe.emoji, tokenizer)
        text_encoder.load_state_dict(zoo.load("emoji-unet").text_encoder.float().state_dict())
        transformer = PixArtTransformer2DModel(
            sample_size=16,
            patch_size=2,  # 64 tokens
            in_channels=recipe.emoji.latent_channels,
            out_channels=recipe.emoji.latent_channels,
            num_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            attention_head_dim=recipe.head_width,
            cross_attention_dim=recipe.heads * recipe.head_width,
            caption_channels=recipe.emoji.text_width,
            use_additional_conditions=False,
        )
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=build_scheduler(),
    )


if __name__ == "__main__":
    main()
