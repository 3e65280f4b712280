"""What the recipes share: their options, the emoji and their split, the words, the noise, previews, the export."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from whenwhere.bench.drawing import draw
from whenwhere.models.patch_pca import PatchPCA
from whenwhere.train.colours import COLOURS
from whenwhere.train.data import CaptionOdds, Split, read_pictures, read_tiles, to_unit, with_colours, withhold
from whenwhere.train.diffusion import Answer, Draw, TrainConfig, train, unet_answer
from whenwhere.train.latents import drawer, encode
from whenwhere.train.state import TrainState
from whenwhere.train.words import learn_tokenizer


@dataclass(frozen=True)
class Emoji:
    """What is learned from, and the network that reads the captions."""

    data: Path = Path("data/emoji")
    concepts: Path | None = Path("data/emoji/clear.txt")  # None: all of them
    withheld: int = 30  # concepts that lose one style
    latent_channels: int = 8
    vocabulary: int = 2048
    text_length: int = 16
    text_width: int = 192
    text_layers: int = 3
    text_heads: int = 4
    odds: CaptionOdds = field(default_factory=CaptionOdds)
    preview_every: float = 1200.0  # seconds
    seed: int = 0


PREVIEW = """
red apple, noto style; blue apple, flat style; dog, twemoji style; cat face, shaded style; fox, noto style;
grinning face, flat style; rocket, twemoji style; airplane, flat style; house, noto style; sunflower; green
heart, noto style; pizza, shaded style; bus, blob style; orange bus, noto style; fruit; penguin; guitar,
emojione style; rainbow; snowman, flat style; octopus, noto style; pink pig; purple car, flat style; cactus,
twemoji style; strawberry, shaded style
"""


def options(about: str, out: str) -> argparse.ArgumentParser:
    """What every recipe asks for that trains on one device."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--budget", type=float, required=True, help="seconds of training, over all resumed runs")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_speed(parser)
    return parser


def add_speed(parser: argparse.ArgumentParser) -> None:
    """How a step is computed; neither changes what is learnt but by rounding."""
    parser.add_argument("--bfloat16", action="store_true", help="autocast: 1.5 times as fast on a CPU with AMX")
    parser.add_argument(
        "--compile", action="store_true", help="1.5 times as fast again, after a minute; wants a C++ compiler"
    )


def read_split(given: Emoji) -> Split:
    """The pictures of the recipe, with the recombined ones set apart."""
    labels = given.concepts.read_text(encoding="utf-8").split("\n")[:-1] if given.concepts else None
    return withhold(read_pictures(given.data, labels), given.withheld, given.seed)


def fit_autoencoder(given: Emoji) -> PatchPCA:
    """The autoencoder of the training pictures, in closed form."""
    return PatchPCA.fit(to_unit(read_tiles(given.data, read_split(given).training)), given.latent_channels)


def read_batches(given: Emoji, vae: PatchPCA, tokenizer: CLIPTokenizer) -> Draw:
    """Random batches of the training pictures and of repainted ones, with fresh captions."""
    training = read_split(given).training
    pictures, pixels = with_colours(training, read_tiles(given.data, training))
    return drawer(pictures, encode(vae, pixels), tokenizer, given.odds)


def learn_words(given: Emoji) -> CLIPTokenizer:
    """A tokenizer for the words of all concepts, also of those not trained on."""
    pictures = read_pictures(given.data)
    texts = [text for p in pictures for text in (p.label, *p.tags, f"{p.style} style")]
    return learn_tokenizer([*texts, *(list(COLOURS) * 100)], given.vocabulary, given.text_length)


def build_text_encoder(given: Emoji, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text model that knows the special tokens of this tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=given.text_width,
            intermediate_size=4 * given.text_width,
            projection_dim=given.text_width,
            num_hidden_layers=given.text_layers,
            num_attention_heads=given.text_heads,
            max_position_embeddings=given.text_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,  # the text model pools where it reads this token
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def learn_emoji(
    given: Emoji,
    pipeline: DiffusionPipeline,
    state: TrainState,
    config: TrainConfig,
    out: Path,
    answer: Answer = unet_answer,
) -> None:
    """Train a pipeline's networks on the emoji and export it."""
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    draw = read_batches(given, pipeline.vae, pipeline.tokenizer)
    train(state, noising, draw, config, out, answer=answer, watch=[Preview(pipeline, given.preview_every, out)])
    export(state, pipeline, out / "pipeline")


def build_scheduler() -> DDIMScheduler:
    """A cosine schedule for velocities."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",  # the first step then starts at pure noise, as in training
        steps_offset=1,  # unused with trailing steps; pipelines warn about 0
    )


class Preview:
    """Draws a grid of samples from the running mean from time to time."""

    def __init__(
        self, pipeline: DiffusionPipeline, every: float, out: Path, *, steps: int = 20, guidance: float = 3.0
    ) -> None:
        self.pipeline, self.every, self.out, self.last = pipeline, every, out, 0.0
        self.steps, self.guidance = steps, guidance

    def __call__(self, state: TrainState) -> None:
        if state.seconds - self.last < self.every:
            return
        self.last = state.seconds
        prompts = " ".join(PREVIEW.split()).split("; ")
        self.pipeline.set_progress_bar_config(disable=True)
        with state.mean.held(), torch.compiler.set_stance("force_eager"):  # a few pictures are not worth compiling for
            pictures = draw(self.pipeline, prompts, range(len(prompts)), self.steps, self.guidance)
        sheet = Image.new("RGB", (6 * 96, 4 * 96))
        for number, picture in enumerate((pictures * 255).round().byte()):
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            sheet.paste(image.resize((96, 96), Image.Resampling.NEAREST), (number % 6 * 96, number // 6 * 96))
        sheet.save(self.out / f"preview-{state.step:06d}-{self.steps}.png")


def export(state: TrainState, pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save the pipeline with the running mean as its weights, in half precision."""
    with state.mean.held():
        pipeline.save_pretrained(folder, safe_serialization=True)
    halve(folder)
    forget_origin(folder)


def forget_origin(folder: Path) -> None:
    """Take out of saved configurations from where a network was loaded."""
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def halve(folder: Path) -> None:
    """Turn saved weights into half precision."""
    for file in folder.rglob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
