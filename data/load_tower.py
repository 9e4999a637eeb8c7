"""Starts a vision tower from what the policy's learned. Called by reflector.py."""
import data


def load_tower(path, resnet):
    """The ResNet of the policy checkpoint `path` -> `resnet`, in place. Raises UserError where they differ in shape, or there is none."""
    weights = data.load_checkpoint(path, "policy")["model"]
    weights = {name.removeprefix("tower.resnet."): x for name, x in weights.items() if name.startswith("tower.resnet.")}
    shapes = lambda state: {name: x.shape for name, x in state.items()}
    data.require(shapes(weights) == shapes(resnet.state_dict()), f"{path}: its vision tower has other sizes than the reflector's --tower "
                 f"{' '.join(map(str, resnet.config.hidden_sizes))}, expected the same; pass --tower-from '' to start from random weights")
    resnet.load_state_dict(weights)
