"""The pictures that policy.py sees, which calls this."""
import math

import torch
import torch.nn.functional as F
from einops import repeat


def augment(images, cfg, training):
    """(B, 3, H, W) in [0, 1]: in training a random crop of `crop_area`, brightness, contrast, saturation, hue; else the centre crop."""
    B, side = len(images), cfg.crop_area ** 0.5
    draw = (torch.rand(6, B) * 2 - 1).to(images.device) if training else images.new_zeros(6, B)
    affine = torch.cat([repeat(torch.eye(2, device=images.device) * side, "i j -> b i j", b=B), draw[:2].T[..., None] * (1 - side)], 2)
    images = F.grid_sample(images, F.affine_grid(affine, images.shape, align_corners=False), align_corners=False, padding_mode="border")
    if training:
        bright, contrast, saturation = (1 + draw[2:5] * cfg.jitter)[..., None, None, None]
        images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast) * bright
        images = torch.lerp(images.mean(1, keepdim=True), images, saturation)
        turn = images.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) * 3 ** -0.5  # of colours around grey
        hue = torch.matrix_exp(turn * (draw[5] * cfg.jitter / 4 * 2 * math.pi)[:, None, None])
        images = torch.einsum("bij,bjhw->bihw", hue, images)
    return images.clamp(0, 1)
