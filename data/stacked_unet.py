"""The denoiser of world_sim.py at presets tiny and smoke, which calls this."""
import torch
from diffusers import UNet2DModel
from torch import nn


class StackedUNet(nn.Module):
    """A 2-D U-Net with the frames of memory and chunk as channels of one picture; the actions join its time embedding.
    80 channels are an action map, 5 dots at 4 x 4 points per latent cell; 24 say how to copy one of n frames, see `WorldSim.copy`."""

    def __init__(self, cfg, size):
        super().__init__()
        C, chunk, levels, refer = cfg.latent_channels, cfg.frames_per_chunk, len(cfg.channels), cfg.references > 0
        outputs, self.inputs = torch.zeros(chunk, C + 24 * (cfg.memory + 1 + refer) * cfg.warp), cfg.memory + refer * chunk
        self.unet = UNet2DModel(in_channels=(chunk + self.inputs) * C + 80 * (chunk + 1) + 16, out_channels=outputs.numel(),
                                block_out_channels=cfg.channels, layers_per_block=1, norm_num_groups=8,
                                down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels,
                                class_embed_type="identity", resnet_time_scale_shift="scale_shift")
        self.embed = nn.Sequential(nn.Linear(8 + 15 * cfg.chunk_size, cfg.hidden), nn.SiLU(), nn.Linear(cfg.hidden, 4 * cfg.channels[0]))
        self.position = nn.Parameter(torch.randn(16, size, size))  # a convolution does not know where it is
        if cfg.warp:  # begin with the last memory frame as it is: its mask is the largest
            outputs[:, C + 8 * (cfg.memory + 1 + refer):][:, 16 * (cfg.memory - 1):16 * cfg.memory] = 3
            nn.init.zeros_(self.unet.conv_out.weight)
            self.unet.conv_out.bias.data.copy_(outputs.flatten())

    def forward(self, noisy, timestep, known, maps, steps, proprio):
        """(B, F, C, h, w), (B,), known (B, M + F, C, h, w), maps (B, M + F, 80, h, w), steps (B, K, 15), (B, 8) -> (B, F, C', h, w), C' = C
        without `warp`, else C + 24 n"""
        chunk = noisy.shape[1]  # known repeats its last memory frame over the chunk unless there are references, maps are black before it
        x = [part.flatten(1, 2) for part in (noisy, known[:, :self.inputs], maps[:, -chunk - 1:])]
        x = torch.cat([*x, self.position.expand(len(noisy), -1, -1, -1)], 1)
        return self.unet(x, timestep, class_labels=self.embed(torch.cat([proprio, steps.flatten(1)], 1))).sample.unflatten(1, (chunk, -1))


stacked_unet = StackedUNet  # the name by which `data.beside` finds it
