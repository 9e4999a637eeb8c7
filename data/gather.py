"""The rollouts of all processes that `accelerate launch` started, on each of them."""
import torch
from accelerate.utils import gather_object


def gather(rollouts):
    """A list of `ppo_loop.Rollouts`, this process's starts in parts -> those of all starts of all processes, in their order."""
    parts, device = gather_object([vars(part) for part in rollouts]), rollouts[0].reward.device
    join = lambda values: torch.cat([value.to(device) for value in values]) if torch.is_tensor(values[0]) else sum(values, [])
    return type(rollouts[0])(**{key: join([part[key] for part in parts]) for key in parts[0]})
