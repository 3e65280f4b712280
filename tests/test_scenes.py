"""Controlled scenes: what is drawn can be read, and captions say what was drawn."""

import pytest
import torch

from whenwhere.models.patch_pca import PatchPCA
from whenwhere.train.scenes import (
    COUNTS,
    FACTORS,
    NAMES,
    Reader,
    SceneOdds,
    caption,
    choose_scenes,
    draw_scenes,
    every_scene,
    render,
)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def index(scene: dict[str, str]) -> list[int]:
    return [FACTORS[name].index(scene[name]) for name in NAMES]


RED_CIRCLE = {
    "size": "large",
    "texture": "plain",
    "colour": "red",
    "shape": "circle",
    "accessory": "without halo",
    "position": "at centre middle",
    "background": "on black",
}


def test_every_combination_is_there_once():
    scenes = every_scene()
    assert scenes.shape == (5184, 7)
    assert len(scenes.unique(dim=0)) == 5184
    assert scenes.amax(dim=0).tolist() == [count - 1 for count in COUNTS]


def test_a_plain_circle_is_its_ink_inside_and_its_paper_outside():
    pixels = (render(torch.tensor([index(RED_CIRCLE)]))[0] + 1) * 127.5
    assert pixels[:, 16, 16].round().tolist() == [220, 30, 30]
    assert pixels[:, 0, 0].round().tolist() == [16, 16, 16]
    covered = ((pixels[0] - 16) / (220 - 16)).sum()
    assert covered == pytest.approx(torch.pi * 6.5**2, rel=0.01)  # smooth edges keep the area


def test_a_scene_moves_by_its_jitter():
    scene = torch.tensor([index(RED_CIRCLE)])
    there = render(scene)
    assert torch.allclose(render(scene, torch.tensor([[2.0, 0, 0]])), there.roll(2, dims=3), atol=1e-4)
    assert torch.allclose(render(scene, torch.tensor([[0, -3.0, 0]])), there.roll(-3, dims=2), atol=1e-4)


def test_a_halo_surrounds_the_shape_and_stripes_darken_it():
    plain = render(torch.tensor([index(RED_CIRCLE)]))
    halo = render(torch.tensor([index(RED_CIRCLE | {"accessory": "with halo"})]))
    striped = render(torch.tensor([index(RED_CIRCLE | {"texture": "striped"})]))
    assert torch.equal(halo[..., 12:20, 12:20], plain[..., 12:20, 12:20])
    assert halo[0, 2].sum() > plain[0, 2].sum() + 10
    assert striped.sum() < plain.sum()


def test_every_scene_reads_as_itself(reader):
    scenes = every_scene()[::23]
    reading = reader(render(scenes))
    assert torch.equal(reading.factors, scenes)
    assert reading.error.max() < 0.01


def test_jittered_scenes_are_read_right_more_than_99_times_of_100(reader):
    scenes = draw_scenes(500, generator())
    right = (reader(scenes.pixels).factors == scenes.factors).all(dim=1).float().mean()
    assert right > 0.99


def test_scenes_are_read_right_after_the_autoencoder(reader):
    scenes = draw_scenes(500, generator(1))
    decoded = PatchPCA.fit(scenes.pixels, 8)(scenes.pixels).sample
    right = (reader(decoded).factors == scenes.factors).all(dim=1).float().mean()
    assert right > 0.98


def test_noise_is_far_from_every_scene(reader):
    assert reader(torch.randn(4, 3, 32, 32, generator=generator()).clamp(-1, 1)).error.min() > 0.4


def test_captions_state_some_factors_in_their_order():
    scene = index(RED_CIRCLE)
    assert caption(scene, [True] * 7) == "large plain red circle without halo at centre middle on black"
    assert caption(scene, [name in ("colour", "shape") for name in NAMES]) == "red circle"
    assert caption(scene, [False] * 7) == ""


def test_captions_take_each_form_as_often_as_the_odds_say():
    _, stated = choose_scenes(20_000, generator(), SceneOdds(empty=0.1, single=0.2))
    count = stated.sum(dim=1)
    assert (count == 0).float().mean() == pytest.approx(0.1, abs=0.01)
    # A single factor is the shape in a seventh of the single captions, and stands alone in 2^-6 of the others.
    assert ((count == 1) & ~stated[:, NAMES.index("shape")]).float().mean() == pytest.approx(0.2 * 6 / 7, abs=0.01)
    long = stated[count > 1]
    assert long[:, NAMES.index("shape")].all()


def test_unstated_factors_are_biased_and_stated_ones_are_not():
    factors, stated = choose_scenes(20_000, generator(), SceneOdds())
    colour, told = factors[:, NAMES.index("colour")], stated[:, NAMES.index("colour")]
    assert (colour[~told] == 0).float().mean() == pytest.approx(0.7, abs=0.02)
    assert (colour[told] == 0).float().mean() == pytest.approx(1 / 6, abs=0.02)
    halo, told = factors[:, NAMES.index("accessory")], stated[:, NAMES.index("accessory")]
    assert halo[~told].float().mean() == pytest.approx(0.7, abs=0.02)


def test_a_seed_gives_the_same_scenes():
    assert torch.equal(draw_scenes(8, generator(3)).pixels, draw_scenes(8, generator(3)).pixels)
