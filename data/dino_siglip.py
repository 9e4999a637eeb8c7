"""The vision tower of policy.py at preset paper, which calls this."""
import torch
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel

IMAGENET = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)  # as published: rounded to bfloat16


class DinoSiglip(nn.Module):
    """OpenVLA's towers: (B, 3, H, W) in [0, 1] -> (B, P, C), DINOv2's channels first. Of each the second-to-last block, without
    the final norm and without class and register tokens."""

    def __init__(self, cfg):
        super().__init__()
        sizes = lambda width, layers, heads: dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                                                  image_size=cfg.image_size, patch_size=cfg.patch)
        self.dino = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=4, **sizes(*cfg.dino)))
        self.siglip = SiglipVisionModel(SiglipVisionConfig(intermediate_size=cfg.siglip[3], hidden_act="gelu", vision_use_head=False,
                                                           **sizes(*cfg.siglip[:3])))
        self.channels = cfg.dino[0] + cfg.siglip[0]

    def forward(self, images):
        mean, std = images.new_tensor(IMAGENET)[..., None, None]
        dino = self.dino((images - mean) / std, output_hidden_states=True).hidden_states[-2][:, 5:]
        return torch.cat([dino, self.siglip(images * 2 - 1, output_hidden_states=True).hidden_states[-2]], -1)


dino_siglip = DinoSiglip  # the name by which `data.beside` finds it
