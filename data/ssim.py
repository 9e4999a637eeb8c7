"""Structural similarity of two frames, for the reality gap of evaluate.py."""
import torch


def ssim(a, b):
    """uint8 frames (3, H, W) x 2 -> structural similarity (Wang et al. 2004), Gaussian window of 11 pixels, mean over channels."""
    window = torch.exp(-torch.arange(-5.0, 6, dtype=torch.float64) ** 2 / (2 * 1.5 ** 2))
    window = (window[:, None] * window / window.sum() ** 2)[None, None]
    a, b = (torch.from_numpy(x.astype(float))[:, None] for x in (a, b))
    blur = lambda x: torch.nn.functional.conv2d(x, window)
    c1, c2, ma, mb = (0.01 * 255) ** 2, (0.03 * 255) ** 2, blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma ** 2, blur(b * b) - mb ** 2, blur(a * b) - ma * mb
    return float(((2 * ma * mb + c1) * (2 * cov + c2) / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2))).mean())
