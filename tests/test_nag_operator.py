"""The operators of guidance inside attention: bounded, finite, and what the papers write down."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from whenwhere.guidance.operator import bound, nag, nasa, vsf

B, N, D = 3, 5, 64
S, TAU, ALPHA = 5.0, 2.5, 0.25
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (B, N, D)), generator=torch.Generator().manual_seed(seed))


def as_written(positive, negative, scale, tau, alpha, order=1):
    """The paper's algorithm 1, line by line, in double precision."""
    positive, negative = positive.double(), negative.double()
    guided = positive + (scale - 1) * (positive - negative)
    ratio = guided.norm(p=order, dim=-1, keepdim=True) / positive.norm(p=order, dim=-1, keepdim=True)
    guided = guided * (ratio.clamp(max=tau) / ratio)
    return alpha * guided + (1 - alpha) * positive


def norms(tensor: Tensor) -> Tensor:
    return tensor.double().abs().sum(-1)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("scale", [1.5, 3.0, 11.0])
def test_it_is_what_the_paper_writes(norm, scale):
    z, n = draw(), draw(seed=1)
    expected = as_written(z, n, scale, TAU, ALPHA, 1 if norm == "l1" else 2)
    torch.testing.assert_close(nag(z, n, scale, TAU, ALPHA, norm).double(), expected, rtol=1e-5, atol=1e-6)


def test_numbers_to_follow_by_hand():
    z, n = torch.tensor([[[2.0, 2.0]]]), torch.tensor([[[2.0, -2.0]]])
    # G = 3 Z+ - 2 Z- = (2, 10), R = 12 / 4 = 3, clipped to 2: (4/3, 20/3); half of it and half of Z+
    assert torch.allclose(nag(z, n, 3.0, 2.0, 0.5), torch.tensor([[[5 / 3, 13 / 3]]]))
    assert bound(z, n, 3.0, 2.0).ratio.item() == 3
    assert bound(z, n, 3.0, 4.0).factor.item() == 1


# The eight properties


@pytest.mark.parametrize("dtype", DTYPES)
def test_1_equal_texts_change_nothing(dtype):
    z = draw().to(dtype)
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(nag(z, z, 9.0, 1.0, 0.7), z, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("scale", "alpha"), [(1.0, ALPHA), (S, 0.0)])
def test_2_scale_one_or_alpha_zero_change_nothing(scale, alpha):
    z = draw()
    assert torch.equal(nag(z, draw(seed=1), scale, TAU, alpha), z)


@pytest.mark.parametrize(
    ("tau", "alpha", "most"), [(2.5, 0.25, 1.375), (2.5, 0.5, 1.75), (2.5, 0.125, 1.1875), (3.5, 0.5, 2.25)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_3_the_norm_is_bounded(tau, alpha, most, dtype):
    z, n = draw().to(dtype), 3 * draw(seed=1).to(dtype)
    growth = norms(nag(z, n, 30.0, tau, alpha)) / norms(z)
    slack = 1e-6 if dtype is torch.float32 else 2e-2
    assert growth.max() <= most + slack
    assert bound(z, n, 30.0, tau).factor.max() < 1


def test_4_where_nothing_is_clipped_only_alpha_phi_matters():
    z, n = draw(), draw(seed=1)
    one, other = nag(z, n, 5.0, 1e6, 0.25), nag(z, n, 2.0, 1e6, 1.0)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one, z + (z - n))


def test_5_a_large_scale_only_turns_the_output_towards_the_difference():
    z, n = draw(), draw(seed=1)
    guided = nag(z, n, 1e6, TAU, 1.0)
    direction = (z - n) / norms(z - n)[..., None].float()
    torch.testing.assert_close(guided, direction * TAU * norms(z)[..., None].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_6_it_is_homogeneous(factor):
    z, n = draw(), draw(seed=1)
    scaled = nag(factor * z, factor * n, S, TAU, ALPHA)
    torch.testing.assert_close(scaled, factor * nag(z, n, S, TAU, ALPHA), rtol=1e-5, atol=1e-6 * factor)


def test_7_samples_and_tokens_are_on_their_own():
    z, n = draw(), draw(seed=1)
    whole = nag(z, n, S, TAU, ALPHA)
    rows, tokens = torch.tensor([2, 0, 1]), torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(nag(z[rows][:, tokens], n[rows][:, tokens], S, TAU, ALPHA), whole[rows][:, tokens])
    assert torch.equal(nag(z[:1, :1], n[:1, :1], S, TAU, ALPHA), whole[:1, :1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_8_zero_rows_are_finite(dtype):
    z, n = draw().to(dtype), draw(seed=1).to(dtype)
    z[0, 0] = 0  # nothing positive
    z[0, 1] = n[0, 1] = 0  # nothing at all
    n[0, 2] = z[0, 2] * 2  # G = 2 Z+ - Z- = 0
    guided = nag(z, n, 2.0, TAU, ALPHA)
    assert guided.isfinite().all()
    assert not guided[0, :2].any()
    torch.testing.assert_close(guided[0, 2], (1 - ALPHA) * z[0, 2])


# Numbers of limited range


def test_float16_norms_above_its_largest_number_keep_the_guidance():
    d = 4096
    z, n = (25 * draw(1, 2, d)).half(), (25 * draw(1, 2, d, seed=1)).half()
    assert z.abs().sum(-1).isinf().all()  # what the public code divides by
    guided = nag(z, n, 9.0, TAU, ALPHA)
    assert guided.isfinite().all()
    expected = as_written(z, n, 9.0, TAU, ALPHA)
    assert (guided.double() - expected).norm() / expected.norm() < 1e-3
    assert (guided.double() - (1 - ALPHA) * z.double()).norm() / expected.norm() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["1e4", "one-hot", "heavy-tailed"])
def test_adversarial_inputs_agree_with_the_paper_in_double_precision(dtype, kind):
    z, n = draw(), draw(seed=1)
    if kind == "1e4":
        z, n = 1e4 * z.clamp(-2, 2), 1e4 * n.clamp(-2, 2)
    elif kind == "one-hot":
        z, n = torch.eye(D)[:N].repeat(B, 1, 1), torch.eye(D)[-N:].repeat(B, 1, 1)
    else:
        z, n = z / draw(seed=2).abs().clamp(min=0.05), n / draw(seed=3).abs().clamp(min=0.05)
    z, n = z.to(dtype), n.to(dtype)
    guided, expected = nag(z, n, S, TAU, ALPHA), as_written(z, n, S, TAU, ALPHA)
    assert guided.dtype is dtype
    assert guided.isfinite().all()
    assert (guided.double() - expected).norm() / expected.norm() < {torch.float32: 1e-6}.get(dtype, 4e-3)


def test_a_sparse_difference_is_clipped_by_the_second_norm_and_not_by_the_first():
    z = draw(1, 64, 1024)
    n = z.clone()
    n[..., :16] += 6 * draw(1, 64, 16, seed=1)
    assert (bound(z, n, 5.0, TAU, "l1").factor == 1).all()
    assert (bound(z, n, 5.0, TAU, "l2").factor < 1).float().mean() > 0.5


def test_gradients_flow_and_inputs_stay():
    z, n = draw().requires_grad_(), draw(seed=1)
    before = z.detach().clone()
    nag(z, n, S, TAU, ALPHA).square().sum().backward()
    assert z.grad.isfinite().all()
    assert torch.equal(z.detach(), before)


# The siblings


def test_nasa_subtracts_and_shrinks_even_equal_texts():
    z, n = draw(), draw(seed=1)
    torch.testing.assert_close(nasa(z, n, 0.3), z - 0.3 * n)
    torch.testing.assert_close(nasa(z, z, 0.3), 0.7 * z)
    assert torch.equal(nasa(z, n, 0.0), z)


def test_vsf_is_one_softmax_with_the_negative_values_turned():
    q, k, v = (draw(2, 3, 4, 8, seed=i) for i in range(3))
    nk, nv = draw(2, 3, 6, 8, seed=4), draw(2, 3, 6, 8, seed=5)
    logits = torch.cat([q @ k.mT, q @ nk.mT], -1) / 8**0.5
    logits[..., 4:] -= 0.2
    p = logits.softmax(-1)
    expected = p[..., :4] @ v - 3.0 * (p[..., 4:] @ nv)
    torch.testing.assert_close(vsf(q, k, v, nk, nv, scale=3.0, offset=0.2), expected)
    far = vsf(q, k, v, nk, nv, scale=3.0, offset=1e4)
    torch.testing.assert_close(far, scaled_dot_product_attention(q, k, v))
