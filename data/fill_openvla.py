"""Published weights for policy.py at preset paper, which calls this."""
import data


def fill_openvla(policy, weights):
    """Load what `load_openvla` gave into a `Policy`: all of it must fit, and only the heads may be missing, which OpenVLA itself does
    not have. Raises UserError."""
    heads = "action_", "scale_", "proprio"
    own = {(n, v.shape) for n, v in policy.state_dict().items() if n in weights or not n.startswith(heads)}
    wrong = sorted({n for n, _ in own ^ {(n, v.shape) for n, v in weights.items()}})
    data.require(not wrong, f"{policy.cfg.pretrained}: {len(wrong)} weights do not fit, such as {wrong[:1]}; it takes --preset paper")
    policy.load_state_dict(weights, strict=False)
