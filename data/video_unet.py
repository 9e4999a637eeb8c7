"""The denoiser of world_sim.py at presets base and paper, which calls this."""
import torch
from diffusers import UNet3DConditionModel
from torch import nn


class VideoUNet(nn.Module):
    """A text-to-video U-Net over the frames of memory and chunk; in place of a text it attends to proprio and the K actions."""

    def __init__(self, cfg):
        super().__init__()
        levels = len(cfg.channels) - 1
        self.unet = UNet3DConditionModel(in_channels=2 * cfg.latent_channels + 81, out_channels=cfg.latent_channels,
                                         block_out_channels=cfg.channels, cross_attention_dim=cfg.hidden,
                                         norm_num_groups=min(32, cfg.channels[0] // 2), attention_head_dim=min(64, cfg.channels[0] // 2),
                                         down_block_types=("CrossAttnDownBlock3D",) * levels + ("DownBlock3D",),
                                         up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * levels)
        self.embed_steps, self.embed_proprio = nn.Linear(15, cfg.hidden), nn.Linear(8, cfg.hidden)
        self.order = nn.Parameter(torch.randn(cfg.chunk_size, cfg.hidden))

    def forward(self, noisy, timestep, known, maps, steps, proprio):
        """As `StackedUNet.forward` of world_sim.py."""
        memory = known.shape[1] - noisy.shape[1]
        mask = (torch.arange(known.shape[1], device=noisy.device) < memory).float()[:, None, None, None].expand_as(maps[:, :, :1])
        x = torch.cat([torch.cat([known[:, :memory], noisy], 1), known, mask, maps], 2)
        tokens = torch.cat([self.embed_proprio(proprio)[:, None], self.embed_steps(steps) + self.order], 1)
        return self.unet(x.transpose(1, 2), timestep, encoder_hidden_states=tokens).sample.transpose(1, 2)[:, memory:]

video_unet = VideoUNet  # the name by which `data.beside` finds it
