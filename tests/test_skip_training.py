"""Pieces of Skip-DiT's training: stages, DiT's loss against PyTorch's own distributions, labels, initialisation."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from test_skip_dit import CLASS, IMAGES, dit, latte
from tiny_models import DIT, tiny
from torch.distributions import Normal, kl_divergence

from whenwhere.models import SkipDiTTransformer2DModel
from whenwhere.train.skip import (
    drop_labels,
    enter_stage,
    fusion_penalty,
    hybrid_loss,
    initialise,
    limit_fusions,
    log_likelihood,
    plateaued,
    silence_label_dropout,
)

SCHEDULER = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)  # DiT's
KEPT = SCHEDULER.alphas_cumprod


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


# -- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [dit, lambda: latte(CLASS)], ids=["image", "video"])
def test_the_first_stage_trains_the_skips_alone(model):
    model = model()
    trained = enter_stage(model, "skips")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    skips = sum(hasattr(block, "skip_linear") for block in model.transformer_blocks)
    assert len(trained) == len(names) == 4 * skips
    assert all("skip_" in name for name in names)
    assert len(enter_stage(model, "all")) == len(list(model.parameters()))


def test_a_step_of_the_first_stage_changes_nothing_but_skips():
    model = dit()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.AdamW(enter_stage(model, "skips"), 1e-2)
    model(*IMAGES).sample.square().mean().backward()
    optimiser.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split(".")[2] for name in changed} == {"skip_norm", "skip_linear"}


def test_stages_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"has no long skips; .*from_dit adds them"):
        enter_stage(tiny("DiTTransformer2DModel", DIT), "skips")
    with pytest.raises(ValueError, match="stage must be"):
        enter_stage(dit(), "first")


def test_a_plateau_is_patience_without_improvement():
    assert not plateaued([3.0, 2.0], patience=2)
    assert not plateaued([3.0, 2.0, 1.9], patience=2)
    assert plateaued([3.0, 2.0, 2.1, 2.0], patience=2)
    assert plateaued([3.0, 2.0, 1.99, 1.99], patience=2, tolerance=0.01)


# -- labels ----------------------------------------------------------------------------------------------------------


def test_a_tenth_of_the_labels_is_dropped():
    labels = torch.arange(10_000) % 10
    dropped = drop_labels(labels, 0.1, 10, generator())
    assert 900 < (dropped == 10).sum() < 1100
    assert torch.equal(dropped[dropped != 10], labels[dropped != 10])
    assert torch.equal(drop_labels(labels, 0.0, 10, generator()), labels)
    assert torch.equal(drop_labels(labels, 0.1, 10, generator()), dropped)


def test_a_training_forward_is_repeatable_once_diffusers_drops_no_labels():
    model = dit().train()
    inputs = (drawn(64, 4, 8, 8), torch.full((64,), 500), torch.arange(64))
    assert not torch.equal(model(*inputs).sample, model(*inputs).sample)
    silence_label_dropout(model)
    assert torch.equal(model(*inputs).sample, model(*inputs).sample)
    assert torch.equal(model(*inputs).sample, model.eval()(*inputs).sample)


# -- loss ------------------------------------------------------------------------------------------------------------


def example(timesteps: list[int]) -> dict[str, torch.Tensor]:
    clean, noise = drawn(len(timesteps), 3, 4, 4).clamp(-0.9, 0.9), drawn(len(timesteps), 3, 2, 8).view(-1, 3, 4, 4)
    t = torch.tensor(timesteps)
    noisy = SCHEDULER.add_noise(clean, noise, t)
    return {"clean": clean, "noisy": noisy, "noise": noise, "timesteps": t, "alphas_cumprod": KEPT}


def test_the_perfect_prediction_loses_nothing():
    """The true noise, and the posterior's own variance, which is v = 0."""
    given = example([1, 10, 500, 999])
    loss = hybrid_loss(torch.cat([given["noise"], -torch.ones_like(given["noise"])], 1), **given)
    torch.testing.assert_close(loss.simple, torch.zeros(4))
    torch.testing.assert_close(loss.variational, torch.zeros(4), atol=1e-4, rtol=0)


def test_the_bound_is_the_divergence_of_two_gaussians():
    given, t = example([7, 300, 998]), [7, 300, 998]
    guess, raw = drawn(3, 3, 16).view(3, 3, 4, 4), drawn(3, 48).view(3, 3, 4, 4)
    loss = hybrid_loss(torch.cat([guess, raw], 1), **given)
    torch.testing.assert_close(loss.simple, (guess - given["noise"]).square().mean((1, 2, 3)))
    for i, step in enumerate(t):
        kept, before = KEPT[step].double(), KEPT[step - 1].double()
        beta = 1 - kept / before
        variance = beta * (1 - before) / (1 - kept)
        noisy = given["noisy"][i].double()

        def mean(picture, beta=beta, before=before, kept=kept, noisy=noisy):
            return (before.sqrt() * beta * picture + (kept / before).sqrt() * (1 - before) * noisy) / (1 - kept)

        picture = (noisy - (1 - kept).sqrt() * guess[i]) / kept.sqrt()
        share = (raw[i].double() + 1) / 2
        deviation = (share * beta.log() + (1 - share) * variance.log()).exp().sqrt()
        truth = Normal(mean(given["clean"][i].double()), variance.sqrt())
        nats = kl_divergence(truth, Normal(mean(picture), deviation)).mean()
        assert float(loss.variational[i]) == pytest.approx(float(nats / math.log(2)), rel=1e-3)


def test_the_bound_trains_the_variance_and_not_the_mean():
    given = example([50])
    prediction = drawn(1, 6, 4, 4).requires_grad_(True)
    hybrid_loss(prediction, **given).variational.sum().backward()
    assert not prediction.grad[:, :3].any()
    assert prediction.grad[:, 3:].all()


def test_the_first_step_is_the_likelihood_of_bins():
    given = example([0])
    prediction = drawn(1, 6, 4, 4)
    loss = hybrid_loss(prediction, **given)
    assert torch.isfinite(loss.variational).all()
    assert loss.variational > 0
    bins = torch.arange(256) / 127.5 - 1
    mass = log_likelihood(bins, torch.tensor(0.3), torch.tensor(-3.0)).exp()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-4)
    inner = Normal(0.3, math.exp(-1.5))
    expected = inner.cdf(bins[100] + 1 / 255) - inner.cdf(bins[100] - 1 / 255)
    assert float(mass[100]) == pytest.approx(float(expected), rel=1e-4)


# -- initialisation and the penalty ----------------------------------------------------------------------------------


def test_dit_s_initialisation_starts_blocks_as_the_identity():
    model = DiTTransformer2DModel(**DIT).requires_grad_(False)
    initialise(model, generator())
    silence_label_dropout(model)
    x = drawn(2, 16, 32)
    block = model.transformer_blocks[1]
    assert torch.equal(block(x, timestep=IMAGES[1], class_labels=IMAGES[2]), x)
    assert not model(*IMAGES).sample.any()
    bound = (6 / (32 + 128)) ** 0.5
    assert 0.9 * bound < block.ff.net[0].proj.weight.abs().max() <= bound
    assert float(block.norm1.emb.class_embedder.embedding_table.weight.std()) == pytest.approx(0.02, rel=0.05)
    again = DiTTransformer2DModel(**DIT)
    initialise(again, generator())
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_initialisation_leaves_skips_as_they_are():
    model = SkipDiTTransformer2DModel(**DIT)
    before = {name: p.clone() for name, p in model.named_parameters() if "skip_" in name}
    initialise(model, generator())
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_penalty_by_hand():
    model = dit(4)
    for block, norm in zip(model.transformer_blocks[2:], (3.0, 0.5), strict=True):
        block.skip_linear.weight.zero_()
        block.skip_linear.weight[1, 2] = norm
    assert float(fusion_penalty(model)) == pytest.approx(4.0)
    assert float(fusion_penalty(model, limit=0.25)) == pytest.approx(2.75**2 + 0.25**2)
    model.requires_grad_(True)
    fusion_penalty(model).backward()
    assert float(model.transformer_blocks[2].skip_linear.weight.grad[1, 2]) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="nothing to penalise"):
        fusion_penalty(tiny("DiTTransformer2DModel", DIT))


def test_the_limit_by_hand():
    model = dit(4)
    for block, norm in zip(model.transformer_blocks[2:], (3.0, 0.5), strict=True):
        block.skip_linear.weight.zero_()
        block.skip_linear.weight[1, 2] = norm
    assert limit_fusions(model, 1.0) == 1
    assert [float(block.skip_linear.weight.max()) for block in model.transformer_blocks[2:]] == [1.0, 0.5]
    with pytest.raises(ValueError, match="limit must be above 0, got 0"):
        limit_fusions(model, 0)
    with pytest.raises(ValueError, match="nothing to penalise or to limit"):
        limit_fusions(tiny("DiTTransformer2DModel", DIT))
