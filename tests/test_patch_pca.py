"""The patch-PCA autoencoder: exact algebra, the autoencoder interface, and the VAE slot of a pipeline."""

import pytest
import torch

from whenwhere.models.patch_pca import PatchPCA


def pictures(count: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_all_components_lose_nothing():
    images = pictures()
    assert torch.allclose(PatchPCA.fit(images, latent_channels=12)(images).sample, images, atol=1e-5)


def test_patches_that_lie_on_a_line_need_one_component():
    direction = torch.linspace(-1, 1, 12).view(1, 12, 1, 1)
    strength = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.pixel_shuffle(0.1 + direction * strength, 2)
    assert torch.allclose(PatchPCA.fit(images, latent_channels=1)(images).sample, images, atol=1e-5)


def test_each_component_more_lowers_the_error():
    images = pictures()
    errors = [(PatchPCA.fit(images, count)(images).sample - images).square().mean() for count in (2, 5, 8, 11)]
    assert errors == sorted(errors, reverse=True)


def test_scaled_latents_have_unit_variance_and_no_mean():
    images = pictures(32)
    model = PatchPCA.fit(images)
    latents = model.encode(images).latents * model.config.scaling_factor
    assert latents.shape == (32, 8, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-4


def test_tuples_are_returned_on_demand():
    model, images = PatchPCA(), pictures()
    (latents,) = model.encode(images, return_dict=False)
    (decoded,) = model.decode(latents, return_dict=False, generator=torch.Generator())
    assert torch.equal(latents, model.encode(images).latents)
    assert torch.equal(decoded, model.decode(latents).sample)


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    model, images = PatchPCA.fit(pictures()), pictures()
    model.save_pretrained(tmp_path)
    again = PatchPCA.from_pretrained(tmp_path)
    assert again.config.scaling_factor == model.config.scaling_factor
    assert torch.equal(again(images).sample, model(images).sample)


def test_more_components_than_values_are_refused():
    with pytest.raises(ValueError, match="1 to 12, not 13"):
        PatchPCA(latent_channels=13)
