"""Faster Diffusion: its key steps, both forms against a naive loop, the noise that is added, its cost, its refusals."""

from collections.abc import Callable
from functools import cache
from typing import Any

import naive
import pytest
import torch
from diffusers import DiffusionPipeline
from naive import Ladder, Opening, _climb, combine, decoder_of, distance, encoder_of, fill, opening, rows_seen
from pipelines import build, run
from schedulers import SCHEDULERS, with_scheduler
from tiny_models import UNET, sd
from torch import Tensor

from whenwhere import NAG, DeepCache, FasterDiffusion, GuidanceStop, TGate, attach, plan
from whenwhere.methods.fasterdiffusion import PRESETS, rescaled
from whenwhere.pricing.cost import count

STEPS = 8
FORMS = [1, 2, STEPS]  # steps in one batch
U_NETS = ["sd", "sd-deep", "sdxl"]


@cache
def opened(name: str, prompts: int = 1, guidance: bool = True) -> Opening:
    return opening(name, build(name), prompts=prompts, guidance=guidance, steps=STEPS)


class Encoded(Ladder):
    """A U-Net whose encoder and middle run at key steps only; the decoder has the present time."""

    def _evaluate(self, inputs: dict[str, Any], partial: bool) -> Tensor:
        unet, control = self.unet, inputs.get("down_block_additional_residuals")
        emb, text = self._embed(inputs)
        if not partial:
            residuals = [unet.conv_in(inputs["sample"])]
            for rung in encoder_of(unet):
                residuals.append(_climb(rung, residuals[-1], emb, text))
            h = residuals[-1]
            if unet.mid_block is not None:
                h = unet.mid_block(h, emb, encoder_hidden_states=text)
            if control is not None:
                residuals = [residual + extra for residual, extra in zip(residuals, control, strict=True)]
                h = h + inputs["mid_block_additional_residual"]
            self.kept = [*residuals, h]
        *residuals, h = self.kept
        for rung, residual in zip(decoder_of(unet), reversed(residuals), strict=True):
            h = _climb(rung, torch.cat([h, residual], 1), emb, text)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def expected_of(
    pipe: DiffusionPipeline,
    start: Opening,
    keys: Callable[[int], bool],
    alpha: float = 0.0,
    late: float = 0.5,
    last: bool = False,
) -> Tensor:
    """The naive loop. Late latents get their noise before the encoder sees them, or last, before the scheduler does."""
    network, options = Encoded(pipe.unet, 0, keys), naive.fresh(start.options)
    scheduler, count, latest = naive.deepcopy(start.scheduler), len(start.timesteps), {}
    x = start.latents
    for s, t in enumerate(start.timesteps):
        noise = alpha * start.latents if s >= max(1, round(late * count)) else 0.0
        x = x if last else x + noise
        inputs = fill(start.inputs, scheduler.scale_model_input(x, t), t)
        if start.control and keys(s):
            now = {key: inputs[key] for key in ("sample", "timestep")}
            down, middle = pipe.controlnet(**start.control | now)
            latest = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        with torch.no_grad():
            output = network(s, inputs | latest)
        guided, x = len(output) > len(x), x + noise if last else x
        x = scheduler.step(combine(output, x) if guided else output, t, x, **options)[0]
    return x


def every(n: int) -> Callable[[int], bool]:
    return lambda s: s % n == 0


# -- key steps --------------------------------------------------------------------------------------------------------


PUBLISHED = {
    "sd-50": "50 49 48 47 45 40 35 25 15",
    "dreambooth-50": "50 49 48 47 45 40 35 25 15 10",
    "sd-20": "20 19 18 17 15 10 5",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_papers_lists_which_count_down(name):
    steps, keys = PRESETS[name]
    assert keys == tuple(steps - int(t) for t in PUBLISHED[name].split())


def test_the_presets_of_deepfloyd_are_its_rules():
    assert len(PRESETS["if-1"][1]) == 10 + 16 + 14
    assert PRESETS["if-3"][1] == (0, 2, 5, 9, 14, 20, 27, 35, 44, 54, 65)
    assert {i for i in range(50) if i not in PRESETS["if-2"][1]} == set(range(21, 41, 2))


def test_a_preset_is_for_its_number_of_steps_and_can_be_moved_to_another():
    assert FasterDiffusion(keys="sd-50").schedule(50) == PRESETS["sd-50"][1]
    with pytest.raises(ValueError, match=r"made for 50 steps, 20 are executed .*keys=rescaled\('sd-50', 20\)"):
        plan("sd15", FasterDiffusion(keys="sd-50"), steps=20)
    assert rescaled("sd-50", 50) == PRESETS["sd-50"][1]
    assert rescaled("sd-50", 100) == (0, 2, 4, 6, 10, 20, 30, 50, 70)
    assert rescaled("sd-50", 10) == (0, 1, 2, 3, 5, 7)
    assert rescaled("sd-50", 1) == (0,)


def test_without_keys_every_nth_step_is_one():
    assert FasterDiffusion(every=3).schedule(8) == (0, 3, 6)


def test_the_plan_runs_the_encoder_at_key_steps_and_adds_noise_before_late_steps():
    drawn = str(plan("sd15", FasterDiffusion(keys="sd-20"), steps=20)).split("\n\n")[0]
    assert (
        drawn
        == """\
model      ####################
stem       ####.#....#....#....
stage x5   ####.#....#....#....
scheduler  #########~~~~~~~~~~#"""
    )


def test_the_plan_of_the_parallel_form_runs_ahead_between_key_steps():
    whole = plan("sd15", FasterDiffusion(keys=(0, 1, 4), batch_cap=9, alpha=0), steps=8)
    assert whole.row("") == "#><<><<<"
    assert whole.row("mid_block") == "##  #   "
    capped = plan("sd15", FasterDiffusion(keys=(0, 1, 4), batch_cap=2, alpha=0), steps=8)
    assert capped.row("") == "#><#><><"
    assert capped.row("mid_block") == "## .# . "


# -- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "guidance"), [(1, True), (2, True), (1, False), (3, False)])
@pytest.mark.parametrize("cap", FORMS)
@pytest.mark.parametrize("name", U_NETS)
def test_a_naive_loop_agrees_in_both_forms(name, cap, prompts, guidance):
    pipe = build(name)
    expected = expected_of(pipe, opened(name, prompts, guidance), every(3), alpha=0.01)
    with attach(pipe, FasterDiffusion(every=3, alpha=0.01, batch_cap=cap)) as attachment:
        latents = run(name, pipe, prompts=prompts, guidance=guidance, steps=STEPS)
        made, trace = attachment.plan, attachment.trace
    assert distance(latents, expected) <= (1e-6 if cap == 1 else 1e-5)
    assert trace.held == made.cost.bytes
    assert trace.rows == made.rows


@pytest.mark.parametrize("name", ["sd-controlnet", "sdxl-controlnet"])
@pytest.mark.parametrize("cap", FORMS)
def test_a_controlnet_runs_at_key_steps_only(name, cap):
    pipe = build(name)
    expected = expected_of(pipe, opened(name), every(3), alpha=0.003)
    encoder = rows_seen(pipe.unet.down_blocks[0].resnets[0].conv1)
    control = rows_seen(pipe.controlnet.conv_in)
    with attach(pipe, FasterDiffusion(every=3, batch_cap=cap)):
        assert distance(run(name, pipe, steps=STEPS), expected) <= 1e-5
    assert encoder == control == [2] * 3  # steps 0, 3, 6; never the rows of the steps ahead


def test_a_listed_set_of_keys_is_followed_and_a_network_without_a_middle_accepted():
    pipe = sd(config=UNET | {"mid_block_type": None})
    start = opening("sd", pipe, steps=STEPS)
    expected = expected_of(pipe, start, (0, 1, 5).__contains__)
    with attach(pipe, FasterDiffusion(keys=[0, 1, 5], alpha=0)) as attachment:
        assert distance(run("sd", pipe, steps=STEPS), expected) <= 1e-6
    assert attachment.trace.row("down_blocks.0") == "##...#.."


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_both_forms_agree_with_every_scheduler(kind):
    """Also with those that scale their input, evaluate twice, or draw noise."""
    latents = {}
    for cap in (1, 3, 50):
        pipe = with_scheduler(kind)
        with attach(pipe, FasterDiffusion(every=4, alpha=0.01, batch_cap=cap)):
            latents[cap] = run("sd", pipe, steps=10, prompts=2)
    assert distance(latents[3], latents[1]) <= 1e-5
    assert distance(latents[50], latents[1]) <= 1e-5


@pytest.mark.parametrize("kind", ["DDIM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete"])
def test_a_naive_loop_agrees_with_schedulers_of_all_kinds(kind):
    pipe = with_scheduler(kind)
    start = opening("sd", pipe, steps=STEPS)
    expected = expected_of(pipe, start, every(3), alpha=0.01, late=0.3)
    for cap in FORMS:
        with attach(pipe, FasterDiffusion(every=3, alpha=0.01, start=0.3, batch_cap=cap)):
            assert distance(run("sd", pipe, steps=STEPS), expected) <= 1e-5


FAMILIES = {  # (split, what attach must be told, noise)
    "svd": (0, None, 0.003),
    "sd-pag": (0, None, 0.003),
    "sd-pix2pix": (0, None, 0.003),
    "sd-lcm": (0, None, 0.003),
    "sd-ip-adapter": (0, None, 0.003),
    "sd-inpaint9": (0, None, 0.003),
    "sd-img2img": (0, None, 0.0),
    "hunyuan-dit": (0, None, 0.003),
    "dit": (3, True, 0.0),
    "pixart-alpha": (2, True, 0.003),
    "latte": (2, None, 0.003),
    "sana": (1, None, 0.003),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_both_forms_agree_on_every_family_and_cost_and_hold_what_was_promised(name):
    split, guidance, alpha = FAMILIES[name]
    pipe = build(name)
    _, whole = count(lambda: run(name, pipe, prompts=2, steps=STEPS))
    latents = {}
    for cap in (1, STEPS):
        method = FasterDiffusion(every=3, alpha=alpha, split=split, batch_cap=cap)
        with attach(pipe, method, guidance=guidance) as attachment:
            latents[cap], counted = count(lambda: run(name, pipe, prompts=2, steps=STEPS))
            made, trace = attachment.plan, attachment.trace
        assert trace.rows == made.rows == plan(pipe, method, steps=made.steps).rows
        assert trace.held == made.cost.bytes
        if name != "sd-pag":  # whose perturbed rows cost less than the others
            assert counted - made.cost.macs == whole - made.cost.baseline
        assert distance(latents[cap], latents[1]) <= 1e-5


@pytest.mark.parametrize("name", ["sana", "wan", "wan-two"])
def test_both_forms_agree_where_the_timestep_is_scaled_or_guidance_is_a_second_call_or_a_network_takes_over(name):
    latents, steps = {}, 6
    for cap in (1, 2, steps):
        pipe = build(name)
        if name == "sana":
            pipe.transformer.register_to_config(timestep_scale=0.01)
        with attach(pipe, FasterDiffusion(every=4, split=1, batch_cap=cap)):
            latents[cap] = run(name, pipe, steps=steps)
    assert distance(latents[2], latents[1]) <= 1e-5
    assert distance(latents[steps], latents[1]) <= 1e-5


def test_a_timestep_that_the_pipeline_transforms_runs_one_by_one_only():
    pipe = build("sana-sprint")
    plain = run("sana-sprint", pipe, steps=4)
    words = r"called with timestep 1, but the scheduler's is 1\.5708: .* cannot be known. Set batch_cap=1"
    ahead = FasterDiffusion(every=2, alpha=0, split=1, batch_cap=2)
    with attach(pipe, ahead), pytest.raises(RuntimeError, match=words):
        run("sana-sprint", pipe, steps=4)
    with attach(pipe, FasterDiffusion(every=2, alpha=0, split=1)) as attachment:
        assert torch.isfinite(run("sana-sprint", pipe, steps=4)).all()
    assert attachment.trace.row("transformer_blocks.0") == "#.#."
    assert torch.equal(run("sana-sprint", pipe, steps=4), plain)


def test_a_split_network_reuses_what_its_last_encoder_block_put_out():
    pipe = build("dit")
    with naive.frozen_between(pipe.transformer.transformer_blocks[1], pipe.transformer, every(3)):
        expected = run("dit", pipe, steps=STEPS)
    with attach(pipe, FasterDiffusion(every=3, split=2, alpha=0)) as attachment:
        assert distance(run("dit", pipe, steps=STEPS), expected) <= 1e-6
    rows, tokens, width = 2, 16, 32
    with attach(pipe, FasterDiffusion(every=3, split=2, alpha=0), guidance=True) as attachment:
        run("dit", pipe, steps=STEPS)
    assert attachment.trace.held == rows * tokens * width * 4


# -- the initial noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl", "hunyuan-dit"])
def test_all_keys_without_noise_are_the_plain_run_bit_for_bit(name):
    pipe = build(name)
    plain = run(name, pipe)
    before = set(vars(pipe.scheduler))
    for cap in FORMS:
        with (
            attach(pipe, FasterDiffusion(every=1, alpha=0, batch_cap=cap)),
            pytest.warns(UserWarning, match="every step is a key step"),
        ):
            assert torch.equal(run(name, pipe), plain)
    assert set(vars(pipe.scheduler)) == before
    assert torch.equal(run(name, pipe), plain)


def test_where_guidance_is_a_second_call_the_initial_noise_is_remembered_once():
    with attach(pipe := build("wan"), FasterDiffusion(every=1, split=1)) as attachment:
        latents = run("wan", pipe, steps=3)
    assert attachment.trace.held == attachment.plan.cost.bytes == latents.nbytes


@pytest.mark.parametrize("steps", [2, 5, 6])
@pytest.mark.parametrize("start", [0.1, 0.5, 0.7])
def test_noise_alone_is_added_before_every_late_step(start, steps):
    pipe = build("sd")
    plain = opening("sd", pipe, steps=steps)
    expected = expected_of(pipe, plain, every(1), alpha=0.02, late=start)
    with attach(pipe, FasterDiffusion(every=1, alpha=0.02, start=start)) as attachment:
        assert distance(run("sd", pipe, steps=steps), expected) <= 1e-6
    assert attachment.trace.held == attachment.trace.cost.bytes


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_order_of_the_authors_parallel_form_can_be_had_in_both_forms(name):
    pipe, latents = build(name), {}
    first, last = (expected_of(pipe, opened(name), every(3), alpha=1.0, last=last) for last in (False, True))
    assert distance(first, last) > 1e-4
    for cap in FORMS:
        with attach(pipe, FasterDiffusion(every=3, alpha=1.0, batch_cap=cap, noise_last=True)) as attachment:
            latents[cap] = run(name, pipe, steps=STEPS)
        assert distance(latents[cap], last) <= 1e-5
        assert attachment.trace.row("scheduler") == "####~~~~"
        assert attachment.trace.held == attachment.plan.cost.bytes


def test_the_latents_of_a_callback_and_of_an_object_answer_carry_the_noise():
    pipe, seen = build("sd"), {}

    def note(_: Any, step: int, __: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen[step] = inputs["latents"].clone()
        return {}

    start = opening("sd", pipe, steps=4)
    run("sd", pipe, steps=4, callback=note)
    plain = dict(seen)
    with attach(pipe, FasterDiffusion(every=1, alpha=0.5)):
        run("sd", pipe, steps=4, callback=note)
    assert torch.equal(seen[0], plain[0])
    assert torch.equal(seen[1], plain[1] + 0.5 * start.latents)  # steps 2 and 3 of 4 are late

    scheduler, x = pipe.scheduler, torch.ones(1, 4, 8, 8)
    with attach(pipe.unet, FasterDiffusion(every=1, alpha=0.5, start=0.1), scheduler=scheduler, guidance=False):
        scheduler.set_timesteps(3)
        text = torch.zeros(1, 3, 16)
        moved = scheduler.step(pipe.unet(x, scheduler.timesteps[0], text).sample, scheduler.timesteps[0], x)
    scheduler.set_timesteps(3)
    bare = scheduler.step(pipe.unet(x, scheduler.timesteps[0], text).sample, scheduler.timesteps[0], x)
    assert torch.equal(moved.prev_sample, bare.prev_sample + 0.5 * x)


def test_pictures_to_start_from_have_no_initial_noise():
    pipe = build("sd-img2img")
    with attach(pipe, FasterDiffusion()), pytest.raises(ValueError, match=r"starts from a picture .* Set alpha=0"):
        run("sd-img2img", pipe)
    assert torch.equal(run("sd-img2img", pipe), run("sd-img2img", build("sd-img2img")))


# -- the laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", FORMS)
def test_generations_are_independent_and_nothing_is_left(cap):
    pipe = build("sd")
    plain, before = run("sd", pipe), set(vars(pipe.scheduler))
    with attach(pipe, FasterDiffusion(every=3, batch_cap=cap)):
        first = run("sd", pipe)
        run("sd", pipe, steps=9, prompts=2, size=24, seed=5)
        run("sd", pipe, guidance=False)
        assert torch.equal(run("sd", pipe), first)
    assert set(vars(pipe.scheduler)) == before
    assert not any("forward" in vars(module) for module in pipe.unet.modules())
    assert torch.equal(run("sd", pipe), plain)


@pytest.mark.parametrize("cap", FORMS)
@pytest.mark.parametrize("name", ["sdxl", "sd-controlnet", "svd"])
def test_a_batch_equals_its_prompts(name, cap):
    pipe = build(name)
    with attach(pipe, FasterDiffusion(every=3, batch_cap=cap)):
        alone = [run(name, pipe, seed=seed) for seed in range(3)]
        assert distance(run(name, pipe, prompts=3), torch.cat(alone)) < 1e-5


@pytest.mark.parametrize("m", [2, 3, 4])
def test_with_tgate_the_gate_step_and_the_next_are_key_steps(m):
    pipe = build("sd")
    for methods in ((TGate(m, sp_interval=1), FasterDiffusion(every=6)), (FasterDiffusion(every=6), TGate(m))):
        with attach(pipe, *methods) as attachment:
            run("sd", pipe)
        keys = {i for i, symbol in enumerate(attachment.trace.row("mid_block")) if symbol == "#"}
        assert keys == {0, m - 1, m}
        assert "~" in attachment.trace.row("scheduler")
        assert attachment.trace.held == attachment.trace.cost.bytes


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1, 4, 50])
def test_the_encoder_is_saved_off_the_key_steps(cap):
    """(1 - |K| / T) M_E / (M_E + M_D), whatever the form."""
    cost = plan("sd15", FasterDiffusion(keys="sd-50", batch_cap=cap), steps=50).cost
    assert 1 - cost.macs.papers / cost.baseline.papers == pytest.approx((1 - 9 / 50) * 105.5 / 338.6, abs=2e-4)
    assert 1 - cost.macs.all / cost.baseline.all == pytest.approx((1 - 9 / 50) * 130.7 / 401.6, abs=2e-4)


# Table 1: giga-operations of DDIM and of DPM-Solver on Stable Diffusion; only ratios compare.
@pytest.mark.parametrize(("preset", "published"), [("sd-50", 27350 / 37050), ("sd-20", 11743 / 14821)])
def test_the_share_that_is_left_is_the_published_one_within_a_per_cent(preset, published):
    cost = plan("sd15", FasterDiffusion(keys=preset), steps=PRESETS[preset][0]).cost
    assert cost.macs.papers / cost.baseline.papers == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize(("name", "mebibytes"), [("sd15", 26), ("sd21", 58), ("sdxl", 103)])
def test_the_memory_is_the_encoders_outputs(name, mebibytes):
    held = plan(name, FasterDiffusion(every=4, alpha=0), steps=8).cost.bytes / 2**20
    assert held == pytest.approx(mebibytes, abs=0.6)


def test_computing_ahead_holds_predictions_in_place_of_features():
    held = {
        cap: plan("sd15", FasterDiffusion(keys="sd-50", alpha=0, batch_cap=cap), steps=50).cost.bytes for cap in (1, 50)
    }
    prediction = 2 * 4 * 64 * 64 * 2  # two branches, half precision
    assert held[50] == 14 * prediction < held[1]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"every": 2.5}, TypeError, "every must be a whole number"),
        ({"keys": (1, 3)}, ValueError, "keys must ascend from 0"),
        ({"keys": (0, 3, 2)}, ValueError, "keys must ascend from 0"),
        ({"keys": (0, 3, 3)}, ValueError, "each once"),
        ({"keys": (0, 1.5)}, TypeError, r"keys\[1\] must be a whole number"),
        ({"keys": (0, -1)}, ValueError, r"keys\[1\] must be at least 0"),
        ({"keys": "50ls"}, ValueError, "keys must be one of 'sd-50'"),
        ({"alpha": -0.1}, ValueError, "alpha must be at least 0"),
        ({"alpha": float("nan")}, ValueError, "alpha must be at least 0"),
        ({"start": 1.0}, ValueError, "start must be a fraction"),
        ({"split": -1}, ValueError, "split must be at least 0"),
        ({"batch_cap": 0}, ValueError, "batch_cap must be at least 1"),
        ({"noise_last": "yes"}, ValueError, "noise_last must be one of False, True"),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_refused(fields, error, words):
    with pytest.raises(error, match=words):
        FasterDiffusion(**fields)


def test_a_key_beyond_the_last_step_is_refused_and_the_pipeline_stays_usable():
    pipe = build("sd")
    plain = run("sd", pipe)
    with attach(pipe, FasterDiffusion(keys=(0, 6))), pytest.raises(ValueError, match="only the steps 0 to 5"):
        run("sd", pipe)
    assert torch.equal(run("sd", pipe), plain)


@pytest.mark.parametrize("name", ["pixart-alpha", "dit", "latte"])
def test_a_model_without_skip_connections_needs_a_split(name):
    blocks = 3 if name == "latte" else 4
    for split in (0, blocks):
        with pytest.raises(ValueError, match=rf"by split, 1 to {blocks - 1} \(experimental\), or use FORA or DeltaDiT"):
            attach(build(name), FasterDiffusion(split=split))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_joint_attention_is_told_what_fits(name):
    with pytest.raises(ValueError, match="FORA works on it"):
        attach(build(name), FasterDiffusion(split=2))


def test_skip_connections_leave_nothing_to_split():
    with pytest.raises(ValueError, match="leave split at 0"):
        attach(build("sd"), FasterDiffusion(split=2))


def test_adapters_that_change_features_in_place_are_refused():
    pipe = build("sd")
    pipe.adapter = torch.nn.Identity()
    with pytest.raises(ValueError, match="T2I-Adapter"):
        attach(pipe, FasterDiffusion())


@pytest.mark.parametrize("other", [TGate(3), DeepCache(), GuidanceStop(3), NAG(negative_prompt="")], ids=repr)
def test_nothing_goes_beside_several_steps_in_one_call(other):
    ahead = FasterDiffusion(batch_cap=2)
    for methods in ((ahead, other), (other, ahead)):
        with pytest.raises(ValueError, match=r"decoders of several steps in one call, .* set batch_cap=1"):
            plan(build("sd"), *methods, steps=6)


def test_running_ahead_needs_to_know_the_branches():
    pipe = build("sd")
    pipe.scheduler.set_timesteps(4)
    attached = attach(pipe.unet, FasterDiffusion(batch_cap=2), scheduler=pipe.scheduler)
    with attached, pytest.raises(RuntimeError, match="guidance=True"):
        pipe.unet(torch.zeros(2, 4, 8, 8), pipe.scheduler.timesteps[0], torch.zeros(2, 3, 16))


def test_guidance_that_ends_in_the_middle_of_a_span_computes_the_next_step():
    pipe = build("sd")

    def switch_off(pipe: Any, step: int, _: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if step != 3:
            return inputs
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": inputs["prompt_embeds"].chunk(2)[1]}

    for cap in FORMS:
        encoder = rows_seen(pipe.unet.mid_block.resnets[0].conv1)
        with attach(pipe, FasterDiffusion(every=6, batch_cap=cap)):
            latents = run(
                "sd", pipe, steps=6, callback=switch_off, callback_on_step_end_tensor_inputs=["prompt_embeds"]
            )
            assert torch.isfinite(latents).all()
        pipe._guidance_scale = 3.0
        assert encoder[0] == 2
        assert set(encoder[1:]) == {1}


@pytest.mark.parametrize(("cap", "first"), [(1, 2), (2, 2), (3, 3), (STEPS, 4)])
def test_a_prompt_that_a_callback_changes_within_a_span_takes_effect_with_the_next_batch_of_decoders(cap, first):
    """The prompt changes after step 1; keys are 0 and 4. The encoder reads it at step 4 in any form."""
    pipe = build("sd")

    def latents_of(change: bool) -> list[Tensor]:
        seen = []

        def note(_: Any, step: int, __: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append(inputs["latents"].clone())
            return {"prompt_embeds": inputs["prompt_embeds"].flip(-1)} if change and step == 1 else {}

        with attach(pipe, FasterDiffusion(every=4, alpha=0, batch_cap=cap)) as attachment:
            run("sd", pipe, callback=note, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
        assert [step for step, symbol in enumerate(attachment.trace.row("mid_block")) if symbol == "#"] == [0, 4]
        return seen

    plain, changed = latents_of(change=False), latents_of(change=True)
    equal = [torch.equal(one, other) for one, other in zip(plain, changed, strict=True)]
    assert equal == [step < first for step in range(6)]


def test_a_size_that_changes_between_key_steps_is_an_error():
    pipe = build("sd")
    text = torch.zeros(1, 3, 16)
    pipe.scheduler.set_timesteps(4)
    t = pipe.scheduler.timesteps[0]
    method = FasterDiffusion(every=4, alpha=0)
    with attach(pipe.unet, method, scheduler=pipe.scheduler, guidance=False):
        x = torch.zeros(1, 4, 8, 8)
        pipe.scheduler.step(pipe.unet(x, t, text).sample, t, x)
        with pytest.raises(RuntimeError, match="must not change within a generation"):
            pipe.unet(torch.zeros(1, 4, 16, 16), t, text)


def test_deepcache_is_not_concerned_by_the_stem():
    made = plan("sd15", DeepCache(branch=0), steps=4)
    assert not any(site.kind == "stem" for site in made.sites)
    assert "stem" in {site.kind for site in plan("sd15", FasterDiffusion(), steps=4).sites}
