"""Diagnostics of smoothness, on functions and matrices whose answers are known."""

import math

import pytest
import torch
from diffusers import HunyuanDiT2DModel
from test_skip_dit import CUES, IMAGES, TEXT, VIDEOS, dit, latte
from tiny_models import DIT, HUNYUAN, tiny
from torch import nn

from whenwhere.metrics.smoothness import (
    change_map,
    perturbation_surface,
    random_direction,
    recorded,
    roughness,
    similarity,
)
from whenwhere.metrics.spectra import block_jacobian_norms, fusion_spectra, jacobian_norm


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer


# -- the surface -----------------------------------------------------------------------------------------------------


def test_a_direction_has_the_norms_of_what_it_is_added_to():
    layer = nn.Linear(3, 4)
    by_row, by_tensor = (random_direction(layer, generator(), per) for per in ("row", "tensor"))
    torch.testing.assert_close(by_row["weight"].norm(dim=1), layer.weight.norm(dim=1))
    torch.testing.assert_close(by_tensor["weight"].norm(), layer.weight.norm())
    assert not torch.allclose(by_tensor["weight"].norm(dim=1), layer.weight.norm(dim=1))
    for direction in (by_row, by_tensor):
        torch.testing.assert_close(direction["bias"].norm(), layer.bias.norm())
    assert torch.equal(random_direction(layer, generator())["weight"], by_row["weight"])


def test_a_surface_by_hand():
    """The weight (1, 0) moves along (0, 1) and (1, 0): the observed vector is (1 + beta, alpha)."""
    model = linear([[1.0], [0.0]])
    up, on = {"weight": torch.tensor([[0.0], [1.0]])}, {"weight": torch.tensor([[1.0], [0.0]])}
    surface = perturbation_surface(model, lambda: model(torch.ones(2, 1)), (up, on), [0.0, 1.0], [0.0, 1.0])
    torch.testing.assert_close(surface, torch.tensor([[1.0, 1.0], [1 / math.sqrt(2), 2 / math.sqrt(5)]]))
    assert torch.equal(model.weight, torch.tensor([[1.0], [0.0]]))
    mean, worst = roughness(surface)
    assert worst == pytest.approx(1 - 1 / math.sqrt(2))
    assert mean == pytest.approx((2 - 1 / math.sqrt(2) - 2 / math.sqrt(5)) / 4)


def test_weights_come_back_after_an_exception():
    model, calls = linear([[1.0], [2.0]]), []

    def observe():
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError
        return model(torch.ones(1, 1))

    direction = random_direction(model, generator())
    with pytest.raises(ArithmeticError):
        perturbation_surface(model, observe, (direction, direction), [1.0], [1.0])
    assert torch.equal(model.weight, torch.tensor([[1.0], [2.0]]))


def test_the_middle_of_a_network_s_surface_is_one():
    model = dit(4)
    pair = (random_direction(model, generator(1)), random_direction(model, generator(2)))
    surface = perturbation_surface(model, lambda: model(*IMAGES).sample, pair, [-0.1, 0.0], [0.0, 0.1])
    assert surface[1, 0] == pytest.approx(1, abs=1e-9)
    assert (surface.flatten()[torch.tensor([0, 1, 3])] < 0.999).all()


# -- change ----------------------------------------------------------------------------------------------------------


def test_a_change_map_by_hand():
    """Block 0 doubles: no turn. Block 1's first token turns by 90 degrees, its second stands still."""
    before = [torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 0.0], [4.0, 0.0]]])]
    now = [torch.tensor([[[2.0, 4.0]]]), torch.tensor([[[0.0, 3.0], [4.0, 0.0]]])]
    found = change_map([before, now, now])
    torch.testing.assert_close(found.relative, torch.tensor([[1.0, 0.0], [6 / 7, 0.0]]))
    torch.testing.assert_close(found.turned, torch.tensor([[0.0, 0.0], [0.5, 0.0]]))
    torch.testing.assert_close(found.turned_whole, torch.tensor([[0.0, 0.0], [1 - 16 / 25, 0.0]]))


def test_a_change_map_needs_two_like_steps():
    for features in ([[torch.ones(1, 1, 1)]], [[torch.ones(1, 1, 1)], []]):
        with pytest.raises(ValueError, match="two steps or more"):
            change_map(features)


def test_recording_a_network_gives_a_row_for_every_block():
    model = dit(4)
    with recorded(list(model.transformer_blocks)) as features:
        for t in (900, 500, 100):
            model(IMAGES[0], torch.full((2,), t), IMAGES[2])
    model(*IMAGES)
    found = change_map(features)
    assert found.relative.shape == (4, 2)
    assert (found.turned > 0).all()


def test_similarity_by_hand():
    plain = [torch.tensor([[1.0, 0.0], [0.0, 2.0]])] * 2
    cached = [plain[0] * 3, torch.tensor([[1.0, 0.0], [2.0, 0.0]])]
    mean, deviation = similarity(cached, plain)
    assert mean.tolist() == [1.0, 0.5]
    assert deviation.tolist() == [0.0, 0.5]


# -- norms -----------------------------------------------------------------------------------------------------------


def test_the_jacobian_norm_of_a_matrix_is_its_largest_singular_value():
    matrix = torch.randn(5, 7, generator=generator(3))
    found = jacobian_norm(lambda x: x @ matrix.T, torch.zeros(1, 7), generator(), iterations=100)
    assert found == pytest.approx(float(torch.linalg.matrix_norm(matrix, ord=2)), rel=1e-5)


def test_the_jacobian_norm_of_a_square_is_twice_its_largest_entry():
    assert jacobian_norm(torch.square, torch.tensor([[1.0, -3.0, 2.0]]), generator(), 50) == pytest.approx(6.0)
    assert jacobian_norm(lambda x: 0 * x, torch.ones(2, 2), generator()) == 0.0


def test_block_jacobians_are_those_of_autograd():
    model = dit(4)
    blocks = list(model.transformer_blocks)
    inputs = tuple(x[:1] for x in IMAGES)
    norms = block_jacobian_norms(blocks, lambda: model(*inputs), generator(), iterations=60)
    seen = {}
    for block in blocks:
        block.register_forward_pre_hook(lambda b, args, kwargs: seen.update({b: (args[0], kwargs)}), with_kwargs=True)
    model(*inputs)
    for i in (1, 3):  # one without and one with a fusion
        stream, kwargs = seen[blocks[i]]
        jacobian = torch.autograd.functional.jacobian(lambda x, b=blocks[i], k=kwargs: b.forward(x, **k), stream)
        exact = float(torch.linalg.matrix_norm(jacobian.reshape(stream.numel(), -1), ord=2))
        assert norms[i] == pytest.approx(exact, rel=1e-2)
        assert norms[i] <= exact * (1 + 1e-5)


def test_block_jacobians_of_a_video_network():
    model = latte(TEXT, 2)
    run = lambda: model(*VIDEOS, CUES["text"])  # noqa: E731
    assert all(norm > 0 for norm in block_jacobian_norms(list(model.transformer_blocks), run, generator(), 5))


def test_fusion_spectra_by_hand():
    model = dit(2)
    weight = model.transformer_blocks[1].skip_linear.weight
    weight.zero_()
    weight[0, 0], weight[0, 32], weight[1, 33] = 3.0, 4.0, 2.0
    (found,) = fusion_spectra(model)
    assert found.path == "transformer_blocks.1"
    for values, expected in ((found.whole, [5, 2, 0]), (found.stream, [3, 0, 0]), (found.skip, [4, 2, 0])):
        torch.testing.assert_close(values[:3], torch.tensor(expected).float())


def test_fusion_spectra_of_other_networks():
    hunyuan = HunyuanDiT2DModel(**HUNYUAN)
    assert [found.path for found in fusion_spectra(hunyuan)] == ["blocks.4", "blocks.5"]
    with pytest.raises(ValueError, match="DiTTransformer2DModel has no long skips"):
        fusion_spectra(tiny("DiTTransformer2DModel", DIT))
