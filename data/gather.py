"""The rollouts of all processes that `accelerate launch` started, on each of them."""
import torch
from accelerate.utils import gather_object


def gather(rollouts):
    """`ppo_loop.Rollouts` of this process's starts -> those of all starts, in their order; alone, the same."""
    parts, device = gather_object([vars(rollouts)]), rollouts.reward.device
    join = lambda values: torch.cat([value.to(device) for value in values]) if torch.is_tensor(values[0]) else sum(values, [])
    return type(rollouts)(**{key: join([part[key] for part in parts]) for key in parts[0]})
