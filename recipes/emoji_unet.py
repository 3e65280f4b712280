"""Train `emoji-unet`: a small Stable Diffusion on emoji, for one CPU core and an evening, or a GPU and some minutes.

Run it as `python recipes/emoji_unet.py --budget 6000 --out runs/emoji-unet`. The same line goes on with an interrupted
run, and exports a finished one again.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from whenwhere.models.patch_pca import PatchPCA
from whenwhere.train.colours import COLOURS
from whenwhere.train.data import CaptionOdds, Split, read_pictures, read_tiles, to_unit, with_colours, withhold
from whenwhere.train.diffusion import TrainConfig, train
from whenwhere.train.latents import drawer, encode
from whenwhere.train.state import TrainState
from whenwhere.train.words import learn_tokenizer
from whenwhere.zoo.load import digests


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on what; how long is the command line's choice."""

    data: Path = Path("data/emoji")
    concepts: Path | None = Path("data/emoji/clear.txt")  # None: all of them
    withheld: int = 30  # concepts that lose one style
    latent_channels: int = 8
    widths: tuple[int, ...] = (48, 96, 144)
    groups: int = 16  # of the group norms
    heads: int = 4
    text_width: int = 192
    text_layers: int = 3
    vocabulary: int = 2048
    text_length: int = 16
    odds: CaptionOdds = field(default_factory=CaptionOdds)
    batch_size: int = 32
    seed: int = 0
    preview_every: float = 1200.0  # seconds


PREVIEW = """
red apple, noto style; blue apple, flat style; dog, twemoji style; cat face, shaded style; fox, noto style;
grinning face, flat style; rocket, twemoji style; airplane, flat style; house, noto style; sunflower; green
heart, noto style; pizza, shaded style; bus, blob style; orange bus, noto style; fruit; penguin; guitar,
emojione style; rainbow; snowman, flat style; octopus, noto style; pink pig; purple car, flat style; cactus,
twemoji style; strawberry, shaded style
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, required=True, help="seconds of training")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-unet"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="autocast: twice as fast on CPUs with AMX, and on GPUs")
    args = parser.parse_args()
    recipe = Recipe()
    torch.set_flush_denormal(True)  # tiny numbers slow a CPU down
    split = read_split(recipe)
    pixels = read_tiles(recipe.data, split.training)
    pictures, pixels = with_colours(split.training, pixels)
    vae = PatchPCA.fit(to_unit(pixels[: len(split.training)]), recipe.latent_channels)
    pipeline = build(recipe, vae, learn_words(recipe))
    pipeline.to(args.device)
    config = TrainConfig(budget=args.budget, batch_size=recipe.batch_size, bfloat16=args.bfloat16, seed=recipe.seed)
    state = TrainState(pipeline.unet, pipeline.text_encoder, config.learning_rate, config.weight_decay, config.seed)
    preview = Preview(pipeline, recipe.preview_every, args.out)
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    draw = drawer(pictures, encode(vae, pixels), pipeline.tokenizer, recipe.odds)
    train(state, noising, draw, config, args.out, watch=[preview])
    export(state, pipeline, args.out / "pipeline")
    for name, value in digests(args.out / "pipeline").items():
        print(f'"{name}": "{value}",')  # as src/whenwhere/zoo/catalog.py wants them


def read_split(recipe: Recipe) -> Split:
    """The pictures of the recipe, with the recombined ones set apart."""
    labels = recipe.concepts.read_text(encoding="utf-8").split("\n")[:-1] if recipe.concepts else None
    return withhold(read_pictures(recipe.data, labels), recipe.withheld, recipe.seed)


def learn_words(recipe: Recipe) -> CLIPTokenizer:
    """A tokenizer for the words of all concepts, also of those not trained on."""
    pictures = read_pictures(recipe.data)
    texts = [text for p in pictures for text in (p.label, *p.tags, f"{p.style} style")]
    return learn_tokenizer([*texts, *(list(COLOURS) * 100)], recipe.vocabulary, recipe.text_length)


def build(recipe: Recipe, vae: PatchPCA, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The untrained pipeline; weights come from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        text_encoder = build_text_encoder(recipe, tokenizer)
        unet = build_unet(recipe)
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",  # the first step then starts at pure noise, as in training
        steps_offset=1,  # unused with trailing steps; pipelines warn about 0
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_text_encoder(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text model that knows the special tokens of this tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            projection_dim=recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=recipe.heads,
            max_position_embeddings=recipe.text_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,  # the text model pools where it reads this token
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(recipe: Recipe) -> UNet2DConditionModel:
    """Three resolutions (16, 8, 4); the two lower ones, and the middle, attend to the text."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=recipe.widths,
        layers_per_block=1,
        norm_num_groups=recipe.groups,
        attention_head_dim=recipe.heads,  # diffusers reads this as the number of heads
        cross_attention_dim=recipe.text_width,
        use_linear_projection=True,
    )


class Preview:
    """Draws a grid of samples from the running mean from time to time."""

    def __init__(self, pipeline: StableDiffusionPipeline, every: float, out: Path) -> None:
        self.pipeline, self.every, self.out, self.last = pipeline, every, out, 0.0

    def __call__(self, state: TrainState) -> None:
        if state.seconds - self.last < self.every:
            return
        self.last = state.seconds
        with state.averaged():
            images = sample(self.pipeline, " ".join(PREVIEW.split()).split("; "))
        sheet = Image.new("RGB", (6 * 96, 4 * 96))
        for number, image in enumerate(images):
            sheet.paste(image.resize((96, 96), Image.Resampling.NEAREST), (number % 6 * 96, number // 6 * 96))
        sheet.save(self.out / f"preview-{state.step:06d}.png")


def sample(pipeline: StableDiffusionPipeline, prompts: list[str], steps: int = 20) -> list[Image.Image]:
    """One picture per prompt, each from its own seed."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    images: list[Image.Image] = pipeline(
        prompts, num_inference_steps=steps, guidance_scale=3.0, generator=generators
    ).images
    return images


def export(state: TrainState, pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save the pipeline with the running mean as its weights, in half precision."""
    with state.averaged():
        pipeline.save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
