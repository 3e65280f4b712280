"""Skip-DiT and Skip-Latte equal plain loops, are converted without change, serve every method, and can be saved."""

from functools import cache
from typing import Any

import naive_skip
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, LatteTransformer3DModel
from tiny_models import DIT, FRAMES, LATTE, VAE, randomised, tiny
from torch import Tensor, nn

import whenwhere
from whenwhere import DeepCache, DeltaDiT, SkipCache, attach
from whenwhere.anatomy import walk
from whenwhere.families import SKIP_DIT, SKIP_LATTE
from whenwhere.methods import FORA, SkipDrift, SkipForecast, SkipOffset
from whenwhere.models import SkipDiTTransformer2DModel, SkipLatteTransformer3DModel
from whenwhere.models.fusion import SkipBlock
from whenwhere.pricing.cost import count

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
VIDEO = HEADS | {"sample_size": 8, "video_length": FRAMES}
TEXT = VIDEO | {"caption_channels": 12, "cross_attention_dim": 32}
CLASS = VIDEO | {"num_classes": 5}

# Depth and number of pairs: every even depth is legal, and so are fewer pairs than there are.
SHAPES = [(2, 1), (4, 2), (6, 3), (10, 5), (6, 1), (10, 3)]
shapes = pytest.mark.parametrize(("layers", "pairs"), SHAPES)
FUSIONS = ("replace", "residual_zero")
fusions = pytest.mark.parametrize("fusion", FUSIONS)


def dit(layers: int = 6, **config: Any) -> SkipDiTTransformer2DModel:
    return randomised(SkipDiTTransformer2DModel(**DIT | {"num_layers": layers} | config))


def latte(config: dict[str, Any], layers: int = 4, **more: Any) -> SkipLatteTransformer3DModel:
    return randomised(SkipLatteTransformer3DModel(**config | {"num_layers": layers} | more))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


IMAGES = (drawn(2, 4, 8, 8), torch.tensor([981, 3]), torch.tensor([7, 1000]))
VIDEOS = (drawn(2, 4, FRAMES, 8, 8), torch.tensor([981, 3]))
CUES = {"text": drawn(2, 5, 12), "class": torch.tensor([4, 5]), "nothing": None}
CONFIGS = {"text": TEXT, "class": CLASS, "nothing": VIDEO}
conditions = pytest.mark.parametrize("condition", CONFIGS)


def predict(model: nn.Module, condition: str, videos: tuple[Tensor, Tensor] = VIDEOS, **more: Any) -> Tensor:
    cue = {"text": "encoder_hidden_states", "class": "class_labels", "nothing": "encoder_attention_mask"}[condition]
    return model(*videos, **{cue: CUES[condition]}, **more).sample


def assert_equal(ours: Tensor, naive: Tensor) -> None:
    assert ours.shape == naive.shape
    assert (ours - naive).norm() < 1e-6 * naive.norm()


# -- the rule --------------------------------------------------------------------------------------------------------


@shapes
@fusions
def test_skip_dit_is_the_plain_loop(layers, pairs, fusion):
    model = dit(layers, skip_pairs=pairs, fusion=fusion)
    assert_equal(model(*IMAGES).sample, naive_skip.skip_dit(model, *IMAGES, pairs, fusion == "residual_zero"))


@shapes
@conditions
def test_skip_latte_is_the_plain_loop(layers, pairs, condition):
    model = latte(CONFIGS[condition], layers, skip_pairs=pairs)
    assert_equal(predict(model, condition), naive_skip.skip_latte(model, *VIDEOS, CUES[condition], pairs))


@conditions
def test_skip_latte_with_a_residual_is_the_plain_loop(condition):
    model = latte(CONFIGS[condition], fusion="residual_zero")
    assert_equal(predict(model, condition), naive_skip.skip_latte(model, *VIDEOS, CUES[condition], 2, residual=True))


def test_pictures_pass_without_temporal_blocks():
    model = latte(TEXT)
    ours = predict(model, "text", enable_temporal_attentions=False)
    assert_equal(ours, naive_skip.skip_latte(model, *VIDEOS, CUES["text"], 2, temporal=False))


def test_fewer_frames_are_legal_and_more_are_not():
    model = latte(CLASS)
    for frames in (1, 2):
        short = (VIDEOS[0][:, :, :frames], VIDEOS[1])
        assert_equal(predict(model, "class", short), naive_skip.skip_latte(model, *short, CUES["class"], 2))
    with pytest.raises(ValueError, match="6 frames; the model was made for at most 3"):
        predict(model, "class", (VIDEOS[0].repeat(1, 1, 2, 1, 1), VIDEOS[1]))


def test_every_skip_matters():
    """Scaling the skip half of any fusion changes the prediction, so none is left out."""
    model = dit(8)
    before = model(*IMAGES).sample
    for block in model.transformer_blocks[4:]:
        block.skip_linear.weight[:, 32:] *= 1.5
        after = model(*IMAGES).sample
        assert (after - before).abs().max() > 1e-3
        before = after


def test_padded_text_is_not_read():
    model = latte(TEXT)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    short = model(*VIDEOS, CUES["text"][:, :3]).sample
    torch.testing.assert_close(model(*VIDEOS, CUES["text"], mask).sample, short)


def test_a_guidance_batch_equals_its_rows():
    model = dit()
    whole = model(*IMAGES).sample
    for i in range(2):
        torch.testing.assert_close(whole[i : i + 1], model(*(x[i : i + 1] for x in IMAGES)).sample)


# -- initialisation and conversion -----------------------------------------------------------------------------------


def test_new_skips_start_as_published():
    bound = (2 * 32) ** -0.5  # PyTorch's, for 2D inputs
    for model in (SkipDiTTransformer2DModel(**DIT), SkipLatteTransformer3DModel(**TEXT, num_layers=4)):
        for block in [b for b in model.transformer_blocks if isinstance(b, SkipBlock)]:
            assert 0.9 * bound < block.skip_linear.weight.abs().max() <= bound
            assert block.skip_linear.bias.any()
            assert torch.equal(block.skip_norm.weight, torch.ones(64))
            assert not block.skip_norm.bias.any()
    xavier = (6 / (64 + 32)) ** 0.5
    for block in SkipLatteTransformer3DModel(**CLASS, num_layers=4).transformer_blocks[2:]:
        assert 0.9 * xavier < block.skip_linear.weight.abs().max() <= xavier
        assert not block.skip_linear.bias.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs", [None, 1])
def test_a_converted_dit_is_the_dit_bit_for_bit(dtype, pairs):
    model = tiny("DiTTransformer2DModel", DIT).to(dtype)
    converted = SkipDiTTransformer2DModel.from_dit(model, pairs)
    assert converted.dtype == dtype
    assert not converted.training
    inputs = (IMAGES[0].to(dtype), *IMAGES[1:])
    assert torch.equal(converted(*inputs).sample, model(*inputs).sample)


def test_a_converted_dit_learns_with_all_its_skips():
    converted = SkipDiTTransformer2DModel.from_dit(tiny("DiTTransformer2DModel", DIT)).requires_grad_(True)
    converted(*IMAGES).sample.square().mean().backward()
    assert all(block.skip_linear.weight.grad.any() for block in converted.transformer_blocks[2:])


def test_converting_with_replacement_changes_the_function_and_keeps_the_weights():
    model = tiny("DiTTransformer2DModel", DIT)
    converted = SkipDiTTransformer2DModel.from_dit(model, fusion="replace")
    assert not torch.allclose(converted(*IMAGES).sample, model(*IMAGES).sample)
    weights = converted.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_a_converted_latte_is_the_latte():
    model = tiny("LatteTransformer3DModel", LATTE | {"num_layers": 4})
    converted = SkipLatteTransformer3DModel.from_latte(model)
    text = drawn(2, 5, LATTE["caption_channels"])
    for temporal in (True, False):
        inputs = (*VIDEOS, text, None, temporal)
        assert torch.equal(converted(*inputs).sample, model(*inputs).sample)


@pytest.mark.parametrize("layers", [1, 3, 7])
def test_an_odd_number_of_layers_is_refused(layers):
    for convert in (
        lambda: dit(layers),
        lambda: latte(TEXT, layers),
        lambda: SkipDiTTransformer2DModel.from_dit(DiTTransformer2DModel(**DIT | {"num_layers": layers})),
        lambda: SkipLatteTransformer3DModel.from_latte(LatteTransformer3DModel(**LATTE | {"num_layers": layers})),
    ):
        with pytest.raises(ValueError, match=f"num_layers must be even, got {layers}"):
            convert()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="skip_pairs must lie in 1 to 3 for 6 layers, got 4"):
        dit(skip_pairs=4)
    with pytest.raises(ValueError, match="replace, residual_zero; got 'add'"):
        dit(fusion="add")
    with pytest.raises(ValueError, match="has long skips already"):
        SkipDiTTransformer2DModel.from_dit(dit())
    with pytest.raises(ValueError, match=r"either text .* or classes"):
        latte(TEXT | CLASS)
    with pytest.raises(ValueError, match="class_labels"):
        latte(CLASS)(*VIDEOS)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        latte(TEXT)(*VIDEOS)
    with pytest.raises(ValueError, match="ada_norm_single"):
        SkipLatteTransformer3DModel.from_latte(
            LatteTransformer3DModel(**LATTE | {"norm_type": "layer_norm", "num_layers": 2})
        )


# -- as a diffusers model --------------------------------------------------------------------------------------------


@fusions
def test_a_saved_skip_dit_comes_back(tmp_path, fusion):
    model = dit(skip_pairs=2, fusion=fusion, frequency_shift=0.0)
    model.save_pretrained(tmp_path)
    back = SkipDiTTransformer2DModel.from_pretrained(tmp_path).eval()
    assert back.config.num_layers == 6
    assert back.config.fusion == fusion
    assert torch.equal(back(*IMAGES).sample, model(*IMAGES).sample)


@conditions
def test_a_saved_skip_latte_comes_back(tmp_path, condition):
    model = latte(CONFIGS[condition])
    model.save_pretrained(tmp_path)
    back = SkipLatteTransformer3DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(predict(back, condition), predict(model, condition))


def test_a_saved_pipeline_comes_back(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    back = DiTPipeline.from_pretrained(tmp_path)
    assert type(back.transformer) is SkipDiTTransformer2DModel
    assert torch.equal(generate(back), generate(pipe))


@pytest.mark.parametrize("condition", ["dit", *CONFIGS])
def test_checkpointed_gradients_are_the_same(condition):
    gradients = []
    for checkpointing in (False, True):
        model = dit() if condition == "dit" else latte(CONFIGS[condition])
        model.requires_grad_(True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        # Two calls before one backward: the skips of one must not serve the other.
        outputs = [
            model(IMAGES[0] * scale, *IMAGES[1:]).sample
            if condition == "dit"
            else predict(model, condition, (VIDEOS[0] * scale, VIDEOS[1]))
            for scale in (1.0, 2.0)
        ]
        sum(output.square().mean() for output in outputs).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_arguments_for_attention_still_reach_it():
    """What a caller passes to the attentions travels beside the skips."""
    model, seen = dit(), []
    model.transformer_blocks[4].attn1.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    model(*IMAGES, cross_attention_kwargs={"scale": None})
    assert seen[0].keys() == {"encoder_hidden_states", "attention_mask", "scale"}


# -- with methods ----------------------------------------------------------------------------------------------------


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False)


def pipeline(layers: int = 6) -> DiTPipeline:
    pipe = DiTPipeline(transformer=dit(layers), vae=tiny("AutoencoderKL", VAE), scheduler=scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


STEPS = 10


def generate(pipe: DiTPipeline) -> Tensor:
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe([3, 8], 3.0, generator, STEPS, output_type="pt", return_dict=False)[0]


@cache
def generated() -> Tensor:
    return generate(pipeline())


METHODS = (
    DeepCache(interval=3),
    SkipCache(interval=2, start_timestep=800),
    FORA(interval=2),
    DeltaDiT(interval=2, blocks=4, mode="middle"),
    SkipOffset(interval=2, depth=1, start_timestep=900),
    SkipForecast(interval=2, depth=1, start_timestep=1000, stop_timestep=0),
    SkipDrift(threshold=float("inf"), longest=3),
)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_methods_keep_the_laws_in_the_pipeline(method):
    pipe = pipeline()
    timesteps = scheduler()
    timesteps.set_timesteps(STEPS)
    plan = whenwhere.plan(pipe, method, steps=STEPS, images=2, scheduler=timesteps)
    with attach(pipe, method, guidance=True) as attachment:
        first, counted = count(lambda: generate(pipe), pipe.transformer)
        trace = attachment.trace
        assert torch.equal(generate(pipe), first)
    assert trace.rows == plan.rows
    assert counted == plan.cost.macs == trace.cost.macs
    assert plan.cost.macs.all < 0.8 * plan.cost.baseline.all
    assert trace.held == plan.cost.bytes
    assert not torch.allclose(first, generated())
    assert torch.equal(generate(pipe), generated())


@pytest.mark.parametrize(
    "method", [DeepCache(interval=1), SkipCache(interval=1), FORA(interval=1), SkipDrift(longest=1)], ids=str
)
def test_neutral_methods_change_nothing(method):
    pipe = pipeline()
    with attach(pipe, method, guidance=True), pytest.warns(UserWarning, match="changed nothing"):
        assert torch.equal(generate(pipe), generated())


def sample(predict: Any, start: Tensor) -> Tensor:
    """A plain DDIM loop over a denoiser: predict(latents, t, index)."""
    steps = scheduler()
    steps.set_timesteps(STEPS)
    for i, t in enumerate(steps.timesteps):
        start = steps.step(predict(start, t, i).chunk(2, 1)[0], t, start).prev_sample
    return start


def is_full(t: Tensor, i: int) -> bool:
    """N2-800-50 on 900, 800 ... 0: the last step is full by its number too."""
    return i % 2 == 0 or t >= 800


@pytest.mark.parametrize(
    ("layers", "pairs", "depth"),
    [(4, 2, 1), (6, 3, 1), (6, 3, 2), (10, 5, 3), (6, 2, 1), (6, 2, 2), (8, 1, 1)],  # the last three join outer pairs
)
def test_skip_cache_on_skip_dit_is_the_plain_loop(layers, pairs, depth):
    model, kept = dit(layers, skip_pairs=pairs), {}

    def plain(x: Tensor, t: Tensor, i: int) -> Tensor:
        rows = (x, t.expand(2), IMAGES[2])
        return naive_skip.skip_dit(model, *rows, pairs, kept=kept, depth=depth, partial=not is_full(t, i))

    naive = sample(plain, IMAGES[0])
    steps = scheduler()
    with attach(model, SkipCache(2, depth, 800, 50), scheduler=steps, guidance=False):
        steps.set_timesteps(STEPS)
        x = IMAGES[0]
        for t in steps.timesteps:
            x = steps.step(model(x, t.expand(2), IMAGES[2]).sample.chunk(2, 1)[0], t, x).prev_sample
    assert_equal(x, naive)


@conditions
@pytest.mark.parametrize(("layers", "depth"), [(4, 1), (6, 2)])
def test_skip_cache_on_skip_latte_is_the_plain_loop(layers, depth, condition):
    model, kept = latte(CONFIGS[condition], layers), {}

    def plain(x: Tensor, t: Tensor, i: int) -> Tensor:
        rows = (x, t.expand(2), CUES[condition])
        return naive_skip.skip_latte(model, *rows, layers // 2, kept=kept, depth=depth, partial=not is_full(t, i))

    naive = sample(plain, VIDEOS[0])
    steps = scheduler()
    with attach(model, SkipCache(2, depth, 800, 50), scheduler=steps, guidance=False) as attachment:
        steps.set_timesteps(STEPS)
        x = VIDEOS[0]
        for t in steps.timesteps:
            x = steps.step(predict(model, condition, (x, t.expand(2))).chunk(2, 1)[0], t, x).prev_sample
        assert attachment.trace.rows == attachment.plan.rows
        assert attachment.trace.held == attachment.plan.cost.bytes == x.shape[0] * FRAMES * 16 * 32 * 4
    assert_equal(x, naive)


@conditions
def test_a_plan_knows_skip_latte_without_running_it(condition):
    model = latte(CONFIGS[condition])
    plan = whenwhere.plan(model, FORA(interval=2), steps=4, guidance=False)
    _, counted = count(lambda: predict(model, condition), model)
    if condition != "text":  # whose length a bare model does not know
        assert plan.cost.baseline.all == 4 * counted.all // 2


def test_blocks_stand_on_the_mirrored_ladder():
    blocks = [site for site in walk(dit(6), SKIP_DIT) if site.depth is not None]
    assert [site.depth for site in blocks] == [0, 1, 2, 2, 1, 0]
    video = [site for site in walk(latte(CLASS), SKIP_LATTE) if site.depth is not None]
    assert [site.depth for site in video] == [0, 0, 1, 1, 1, 1, 0, 0]
