"""Students learn where the guided teacher ends."""

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from whenwhere.train.diffusion import Batch
from whenwhere.train.distil import DistilConfig, GuidedTeacher, student_timesteps, turn


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )


def knowing(ids):
    """A denoiser that believes every picture to have the number of its caption in all places."""

    def told(noisy, timesteps):
        kept = scheduler().alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return (kept.sqrt() * noisy - ids.float().view(-1, 1, 1, 1)) / (1 - kept).sqrt()

    return told


def teacher(tell=knowing, **settings: object) -> GuidedTeacher:
    def draw(size, generator):
        ids = torch.randint(1, 4, (size, 1), generator=generator)
        return Batch(torch.zeros(size, 1, 2, 2), ids)

    config = DistilConfig(**{"chunk": 8, "reuse": 2, "capacity": 20} | settings)
    return GuidedTeacher(tell, torch.zeros(1, 1, dtype=torch.long), scheduler(), draw, config)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_students_are_taught_where_the_scheduler_evaluates(steps):
    clock = LCMScheduler.from_config(scheduler().config, original_inference_steps=steps)
    clock.set_timesteps(steps)
    assert clock.timesteps.tolist() == student_timesteps(1000, steps)


@pytest.mark.parametrize("timestep", [249, 999])
def test_the_velocity_leads_to_the_guided_picture_in_one_step(timestep):
    lesson = teacher(guidance=3.0).answer(5, timestep, torch.Generator().manual_seed(0))
    kept = scheduler().alphas_cumprod[timestep]
    picture = kept.sqrt() * lesson.given.noisy - (1 - kept).sqrt() * lesson.given.velocity
    # The empty caption is 0, so guidance of 3 shows three times the caption.
    assert torch.allclose(picture, 3.0 * lesson.input_ids.view(-1, 1, 1, 1).expand_as(picture), atol=1e-3)


def test_the_way_of_the_teacher_is_that_of_the_ddim_scheduler():
    def turning(ids):
        return lambda noisy, timesteps: torch.sin(3 * noisy + (ids + timesteps.view(-1, 1) / 1000).view(-1, 1, 1, 1))

    noisy, ids = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([[1], [2]])
    clock, sample = scheduler(), noisy
    clock.set_timesteps(10)
    for timestep in clock.timesteps:
        plain, told = (turning(captions)(sample, timestep.expand(2)) for captions in (torch.zeros(2, 1), ids))
        sample = clock.step(plain + 2.0 * (told - plain), timestep, sample).prev_sample
    ours = teacher(turning, guidance=2.0, teacher_steps=10)
    assert torch.allclose(ours.follow(noisy, ids, 999), sample, atol=1e-5)


def test_answers_are_reused_as_often_as_told_and_the_oldest_go():
    lessons, generator = teacher(), torch.Generator().manual_seed(0)
    sizes = []
    for _ in range(12):
        lessons(4, generator)
        sizes.append((lessons.made, len(lessons.pool)))
    # 8 answers, each used twice, are 4 batches of 4; of the third chunk the pool keeps room for 4.
    assert sizes == [(1, 8)] * 4 + [(2, 16)] * 4 + [(3, 20)] * 4


def test_all_timesteps_of_the_student_take_turns():
    lessons, generator = teacher(capacity=100), torch.Generator().manual_seed(0)
    for _ in range(16):
        lessons(4, generator)
    assert {int(lesson.given.timesteps) for lesson in lessons.pool} == {999, 749, 499, 249}


@pytest.mark.parametrize(
    ("noisiest", "expected"),
    [(0.25, "0123" * 5), (0.4, "01023" * 4), (0.5, "01020301020301020301"), (1.0, "0" * 20), (0.0, "123" * 6 + "12")],
)
def test_the_noisiest_timestep_gets_its_share_and_the_others_the_rest_in_turn(noisiest, expected):
    order = [turn(made, 4, noisiest) for made in range(20)]
    assert "".join(map(str, order)) == expected
    assert order.count(0) == 20 * noisiest


def test_one_timestep_is_always_next():
    assert [turn(made, 1, 0.25) for made in range(4)] == [0] * 4


def test_a_larger_share_at_the_noisiest_timestep_is_drawn_more_often():
    lessons, generator = teacher(capacity=1000, noisiest=0.6), torch.Generator().manual_seed(0)
    for _ in range(20):
        lessons.refill(generator)
    found = [int(lesson.given.timesteps) for lesson in lessons.pool]
    assert found.count(999) == 0.6 * len(found)
