"""Augmentation of the reflector's frames. Called by reflector.py."""
import torch
import torch.nn.functional as F


def augment_video(frames, cfg):
    """(B, T, 3, H, W), 0 to 255 -> the same, float: brightness, contrast, a shift of up to 4 pixels, and blur for half of the samples,
    because imagined frames are softer than real ones; alike for all frames of one."""
    B, frames = len(frames), frames.float()
    gain, bias = 1 + cfg.jitter * (torch.rand(2, B, 1, 1, 1, 1, device=frames.device) * 2 - 1)
    frames = ((frames - 128) * gain + 128 * bias).clamp(0, 255)
    dx, dy, size = *torch.randint(0, 9, (2,)).tolist(), cfg.image_size
    frames = F.pad(frames.flatten(0, 1), (4, 4, 4, 4), mode="replicate")[..., dy:dy + size, dx:dx + size]
    soft = F.interpolate(F.avg_pool2d(frames, 2), scale_factor=2, mode="bilinear").unflatten(0, (B, -1))
    return torch.where(torch.rand(B, 1, 1, 1, 1, device=frames.device) < 0.5, soft, frames.unflatten(0, (B, -1)))
