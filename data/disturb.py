"""The way back to a demonstration, which no demonstration shows: in SFT, and in LOOP for the demonstrations beside its rollouts."""
import torch


def disturb(proprio, actions, noise):
    """Proprio (B, 8) with a random error of the gripper's position, `noise` m, and LIBERO actions (B, K, 7) that lead from there to where
    the chunk ended: the way back, which no demonstration shows. After DART (arXiv 1703.09327), without a simulator."""
    if not noise:
        return proprio, actions
    error = noise * torch.randn_like(proprio[:, :3])
    back = error[:, None] / (0.012 * actions.shape[1])  # told to go 5 cm, the arm goes 1.2 cm in a control step (measured)
    return torch.cat([proprio[:, :3] + error, proprio[:, 3:]], 1), torch.cat([(actions[..., :3] - back).clamp(-1, 1), actions[..., 3:]], 2)
