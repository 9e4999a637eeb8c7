"""Real | imagined | difference as one picture; `world_sim.train` writes them of held-out episodes."""
import imageio
import numpy as np

import data


def save_strip(path, episode, imagined, gap, columns=10):
    """Every `gap` control steps of an episode: real frames above, below the imagined ones (chunks + 1, 3, H, W), and their difference."""
    real = {int(s) // gap: f for s, f in zip(episode.frame_steps, episode.frames) if s % gap == 0}
    shown = sorted(real)[::max(1, -(-len(real) // columns))]
    real, imagined = np.concatenate([real[i] for i in shown], -1), np.concatenate(list(imagined[shown]), -1)
    strip = np.concatenate([real, imagined, abs(real.astype(int) - imagined).astype(np.uint8)], 1)
    with data.atomic(path) as part:
        imageio.imwrite(part, np.moveaxis(strip, 0, -1))
