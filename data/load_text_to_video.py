"""Weights of a published text-to-video model for world_sim.py at preset paper, which calls this."""
import torch.nn.functional as F

import data


def load_text_to_video(world_sim):
    """VAE and video U-Net of the text-to-video model `pretrained` into a simulator of its sizes; input channels that the published
    U-Net lacks (condition latent, mask, action map) start at zero. Raises UserError."""
    from diffusers import AutoencoderKL, UNet3DConditionModel
    name, unet = world_sim.cfg.pretrained, world_sim.denoiser.unet
    try:
        weights = UNet3DConditionModel.from_pretrained(name, subfolder="unet").state_dict()
        conv = weights["conv_in.weight"]
        weights["conv_in.weight"] = F.pad(conv, (0, 0, 0, 0, 0, unet.conv_in.in_channels - conv.shape[1]))
        unet.load_state_dict(weights)
        world_sim.vae.load_state_dict(AutoencoderKL.from_pretrained(name, subfolder="vae").state_dict())
    except (OSError, RuntimeError) as error:
        raise data.UserError(f"--pretrained {name}: {str(error).strip().splitlines()[0][:120]}; expected the name or directory of a "
                             "published text-to-video model, and --preset paper") from None
