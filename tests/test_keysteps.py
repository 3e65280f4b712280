"""Faster Diffusion's key steps: functions of the number of steps, and a choice by what the encoder's outputs change."""

from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from naive import distance, rows_seen
from pipelines import build, run
from schedulers import with_scheduler
from tiny_models import UNET, WIDTH, tiny
from torch import Tensor

from whenwhere import FasterDiffusion, attach, plan
from whenwhere.decisions.encoderchange import EncoderNotes, EncoderRecorder
from whenwhere.decisions.keysteps import spread_by_change
from whenwhere.expression import parse, write
from whenwhere.methods.fasterdiffusion import PRESETS, rescaled

# -- functions ---------------------------------------------------------------------------------------------------------


def halves(steps: int) -> list[int]:
    return [0, steps // 2]


def test_keys_may_be_a_function_of_the_number_of_steps():
    method = FasterDiffusion(keys=halves)
    assert method.schedule(8) == (0, 4)
    assert method.schedule(50) == (0, 25)
    assert FasterDiffusion(keys=partial(rescaled, "sd-50")).schedule(100) == rescaled("sd-50", 100)
    pipe = build("sd")
    with attach(pipe, method) as attachment:
        run("sd", pipe)
    assert attachment.trace.row("mid_block") == "#..#.."


def test_a_method_with_such_a_function_is_hashable_and_says_its_name_but_is_not_read_from_a_text():
    method = FasterDiffusion(keys=halves, alpha=0)
    assert method == FasterDiffusion(keys=halves, alpha=0)
    assert len({method, FasterDiffusion(keys=halves, alpha=0), FasterDiffusion(keys=len, alpha=0)}) == 2
    assert write([method]) == "FasterDiffusion(keys=halves, alpha=0)"
    assert "keys=rescaled," in repr(FasterDiffusion(keys=partial(rescaled, "sd-50")))
    with pytest.raises(ValueError, match="keys must be one of 'sd-50'"):
        parse(write([method]))


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ([1, 4], ValueError, r"gives \[1, 4\] for 8 steps: keys must ascend from 0"),
        ([], ValueError, r"gives \[\] for 8 steps: keys must ascend from 0"),
        ([0, 1.5], TypeError, r"keys\[1\] must be a whole number"),
        ([0, 8], ValueError, "only the steps 0 to 7 are executed, and the last key is 8"),
        (3, TypeError, "keys=answered gives 3 for 8 steps"),
    ],
)
def test_an_answer_that_is_no_set_of_key_steps_is_refused(answer, error, words):
    def answered(_: int) -> Any:
        return answer

    with pytest.raises(error, match=words):
        FasterDiffusion(keys=answered).schedule(8)


def test_a_solver_that_executes_one_step_more_is_told_what_to_write():
    pipe = with_scheduler("PNDM")
    words = r"made for 50 steps, 51 are executed \(PNDM .* keys=rescaled\('sd-50', 51\)"
    with attach(pipe, FasterDiffusion(keys="sd-50")), pytest.raises(ValueError, match=words):
        run("sd", pipe, steps=50)
    with attach(pipe, FasterDiffusion(keys=rescaled("sd-50", 51))) as attachment:
        run("sd", pipe, steps=50)
    assert len(attachment.trace.row("mid_block")) == 51


# -- by what was measured ----------------------------------------------------------------------------------------------


def naive_changes(pipe: DiffusionPipeline, seeds: range) -> dict[int, list[float]]:
    """Equation 2 by resolution, as the mean over its features and over runs."""
    runs = []
    for seed in seeds:
        steps: list[list[Tensor]] = []
        handles = [
            pipe.unet.conv_in.register_forward_hook(lambda _, __, output, steps=steps: steps.append([output])),
            *(
                block.register_forward_hook(lambda _, __, output, steps=steps: steps[-1].extend(output[1]))
                for block in pipe.unet.down_blocks
            ),
            pipe.unet.mid_block.register_forward_hook(lambda _, __, output, steps=steps: steps[-1].append(output)),
        ]
        run("sd", pipe, steps=5, seed=seed)
        for handle in handles:
            handle.remove()
        runs.append(steps)
    found: dict[int, list[float]] = {}
    for edge in (16, 8):
        found[edge**2] = [0.0]
        for s in range(1, 5):
            changes = [
                float((new - old).norm() ** 2 / new.numel())
                for steps in runs
                for old, new in zip(steps[s - 1], steps[s], strict=True)
                if new.shape[-1] == edge
            ]
            found[edge**2].append(sum(changes) / len(changes))
    return found


def test_the_change_of_the_encoder_is_that_of_equation_2_and_leaves_the_run_as_it_is():
    pipe, notes = build("sd"), EncoderNotes()
    expected, plain = naive_changes(pipe, range(2)), run("sd", pipe, steps=5)
    with attach(pipe, EncoderRecorder(notes)):
        assert torch.equal(run("sd", pipe, steps=5), plain)
        run("sd", pipe, steps=5, seed=1)
    changes = notes.changes()
    assert list(changes) == [256, 64]
    for positions, row in changes.items():
        assert row == pytest.approx(expected[positions], rel=1e-5)


def test_a_step_is_a_key_step_where_the_changes_add_up_to_more_than_the_threshold():
    changes = {64: (0.0, 5.0, 3.0, 1.0, 1.0, 1.0), 16: (0.0, 0.0, 0.0, 0.0, 9.0, 0.0)}
    assert spread_by_change(changes, 4.0) == (0, 1, 4)  # 5; 3 + 1 is not more, then 9 at the other resolution
    assert spread_by_change(changes, 0.0) == (0, 1, 2, 3, 4, 5)
    assert spread_by_change(changes, float("inf")) == (0,)
    with pytest.raises(ValueError, match="threshold must be at least 0, got -1"):
        spread_by_change(changes, -1)


def test_a_method_is_made_from_plain_runs():
    pipe, notes = build("sd"), EncoderNotes()
    with attach(pipe, EncoderRecorder(notes)):
        run("sd", pipe)
    largest = max(max(row) for row in notes.changes().values())
    keys = {
        share: FasterDiffusion.measured(pipe, lambda: run("sd", pipe), share * largest, alpha=0).schedule(6)
        for share in (0.0, 1.0, 1e9)
    }
    assert keys[0.0] == (0, 1, 2, 3, 4, 5)
    assert keys[1.0] == spread_by_change(notes.changes(), largest) == (0, 2, 4)
    assert keys[1e9] == (0,)
    with attach(pipe, FasterDiffusion(keys=keys[1.0], alpha=0)) as attachment:
        run("sd", pipe)
    assert attachment.trace.row("mid_block") == "#.#.#."


def test_runs_that_tell_nothing_are_refused():
    pipe = build("sd")
    with pytest.raises(ValueError, match="found none"):
        FasterDiffusion.measured(pipe, lambda: None, 1.0)
    with pytest.raises(ValueError, match="found 4, 5"):
        FasterDiffusion.measured(pipe, lambda: [run("sd", pipe, steps=steps) for steps in (4, 5)], 1.0)
    with pytest.raises(ValueError, match="no skip connections"):
        FasterDiffusion.measured(build("dit"), lambda: None, 1.0)


# -- DeepFloyd-IF ------------------------------------------------------------------------------------------------------


def deepfloyd() -> DiffusionPipeline:
    """Stage 1: pixels, attention that reads image and text at once, a variance beside the noise, DDPM."""
    simple = {
        "in_channels": 3,
        "out_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "attention_head_dim": 4,
        "encoder_hid_dim": WIDTH,
        "encoder_hid_dim_type": "text_proj",
        "resnet_time_scale_shift": "scale_shift",
    }
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True)
    names = ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
    pipe = diffusers.IFPipeline(
        unet=tiny("UNet2DConditionModel", UNET | simple),
        scheduler=scheduler,
        requires_safety_checker=False,
        **dict.fromkeys(names),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_preset_of_deepfloyd_runs_on_its_pipeline_in_both_forms():
    pipe, generator = deepfloyd(), torch.Generator().manual_seed(0)
    text, pixels = torch.randn(2, 1, 6, WIDTH, generator=generator), {}
    for cap in (1, 5):
        seen = rows_seen(pipe.unet.mid_block.resnets[0].conv1)
        with attach(pipe, FasterDiffusion(keys="if-1", batch_cap=cap)) as attachment:
            pixels[cap] = pipe(
                prompt_embeds=text[0],
                negative_prompt_embeds=text[1],
                num_inference_steps=100,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            ).images
        assert seen == [2] * len(PRESETS["if-1"][1])
        assert attachment.trace.held == attachment.plan.cost.bytes
    assert distance(pixels[5], pixels[1]) <= 1e-5


# -- published cost ----------------------------------------------------------------------------------------------------


# Table 5, giga-operations of DDIM with 50 steps and 25, 9 and 5 keys; only shares of the plain 37050 compare.
@pytest.mark.parametrize(("every", "published"), [(2, 31011), (6, 27350), (10, 26370)])
def test_the_share_of_uniform_keys_is_the_published_one_within_a_per_cent(every, published):
    cost = plan("sd15", FasterDiffusion(every=every), steps=50).cost
    assert cost.macs.papers / cost.baseline.papers == pytest.approx(published / 37050, abs=0.01)
