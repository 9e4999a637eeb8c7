"""The autoencoders of world_sim.py, which calls this: folded pictures (B, D, h, w) <-> latents (B, C, h', w')."""
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from torch import nn


class LinearVAE(nn.Module):
    """Probabilistic PCA of patches, the optimum of a VAE without hidden layers.
    What two cores buy: 33 dB PSNR on held-out frames of Goal in closed form; an AutoencoderKL (16 latents) had 23 dB after 90 s."""

    def __init__(self, inputs, latents, size):
        super().__init__()
        self.register_buffer("background", torch.zeros(inputs, size, size))  # mean frame: the cameras stand still
        self.register_buffer("basis", torch.eye(inputs, latents))

    @torch.no_grad()
    def fit(self, folded):
        self.background.copy_(folded.mean(0))
        patches = rearrange(folded - self.background, "b d h w -> (b h w) d")
        self.basis.copy_(torch.linalg.eigh(patches.T @ patches)[1].flip(1)[:, :self.basis.shape[1]])  # by falling variance

    def encode(self, folded):
        return torch.einsum("bdhw,dc->bchw", folded - self.background, self.basis)

    def decode(self, latents):
        return torch.einsum("bchw,dc->bdhw", latents, self.basis) + self.background


class ConvVAE(AutoencoderKL):
    """diffusers' convolutional VAE, which has to be trained or loaded."""

    def fit(self, folded):
        pass

    def encode(self, folded):
        return super().encode(folded).latent_dist.mode()

    def decode(self, latents):
        return super().decode(latents).sample

    def loss(self, folded):
        """Reconstruction, and a KL term that only keeps the latents bounded."""
        posterior = super().encode(folded).latent_dist
        error = F.mse_loss(self.decode(posterior.sample()), folded)
        return error + 1e-6 * posterior.kl().mean(), dict(vae_psnr=10 * torch.log10(4 / error.detach()))


def vae(cfg, inputs, size):
    levels = len(cfg.vae_channels)
    if not levels:
        return LinearVAE(inputs, cfg.latent_channels, size)
    return ConvVAE(inputs, inputs, ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels, cfg.vae_channels, 2,
                   latent_channels=cfg.latent_channels, norm_num_groups=min(32, cfg.vae_channels[0] // 2))
