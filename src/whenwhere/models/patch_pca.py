"""An image autoencoder in closed form: principal components of small patches.

Flat drawings need no learned autoencoder. Every patch of pixels is projected on its leading principal components, which
is exact linear algebra, fitted in a second. The interface is that of `AutoencoderTiny`, so the model sits in the VAE
slot of an unmodified pipeline.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from torch.nn import functional


class PatchPCA(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Patches of 2 x 2 RGB pixels as their leading principal components: (B, 3, H, W) <-> (B, C, H/2, W/2).

    `block_out_channels` has one entry per power of two of the patch size and one more, as pipelines derive the scale
    factor from its length. Latents are not scaled; as with every diffusers autoencoder, the caller multiplies by
    `config.scaling_factor` to reach unit variance and divides by it before decoding.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 8,
        block_out_channels: tuple[int, ...] = (12, 8),
        scaling_factor: float = 1.0,  # noqa: ARG002 - read from the config by pipelines
    ) -> None:
        super().__init__()
        self.patch = 2 ** (len(block_out_channels) - 1)
        values = in_channels * self.patch**2
        if not 1 <= latent_channels <= values:
            raise ValueError(
                f"a patch has {values} values; latent_channels must be 1 to {values}, not {latent_channels}"
            )
        self.mean = torch.nn.Parameter(torch.zeros(values), requires_grad=False)  # (values,)
        self.basis = torch.nn.Parameter(torch.eye(latent_channels, values), requires_grad=False)  # (C, values)

    @classmethod
    def fit(cls, images: Tensor, latent_channels: int = 8) -> "PatchPCA":
        """The best autoencoder for these images, (B, 3, H, W) in [-1, 1]: least squared error at this many channels."""
        probe = cls(in_channels=images.shape[1], latent_channels=latent_channels)
        patches = functional.pixel_unshuffle(images.double(), probe.patch).transpose(0, 1).flatten(1)
        mean = patches.mean(dim=1)  # of (values, patches)
        variances, directions = torch.linalg.eigh(torch.cov(patches))  # ascending
        basis = directions.flip(1)[:, :latent_channels].T
        # Eigenvectors are known up to their sign; the largest entry is made positive so that every machine agrees.
        basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()
        scale = float(variances.flip(0)[:latent_channels].mean().rsqrt())
        model: PatchPCA = cls(images.shape[1], latent_channels, (patches.shape[0], latent_channels), scale)
        model.mean.data.copy_(mean)
        model.basis.data.copy_(basis)
        return model

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Latents (B, C, H/2, W/2) of images (B, 3, H, W) in [-1, 1], without the scaling factor."""
        patches = functional.pixel_unshuffle(x, self.patch) - self.mean[:, None, None]  # (B, values, H/2, W/2)
        latents = torch.einsum("cv,bvhw->bchw", self.basis, patches)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(
        self,
        z: Tensor,
        generator: torch.Generator | None = None,  # noqa: ARG002 - pipelines pass it to every autoencoder
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[Tensor]:
        """Images (B, 3, H, W) of latents (B, C, H/2, W/2); values may leave [-1, 1] a little. `generator` is unused."""
        patches = torch.einsum("cv,bchw->bvhw", self.basis, z) + self.mean[:, None, None]
        images = functional.pixel_shuffle(patches, self.patch)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """The images after a way through the latent space and back."""
        (latents,) = self.encode(sample, return_dict=False)
        return self.decode(latents, return_dict=return_dict)
