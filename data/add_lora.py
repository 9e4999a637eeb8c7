"""LoRA for policy.py at preset paper, which calls this."""
from peft import LoraConfig, inject_adapter_in_model
from torch import nn


def add_lora(policy):
    """LoRA on every linear layer of towers, projector and Llama (OpenVLA-OFT: alpha 16, gaussian start), heads stay in full."""
    body, rank = ("tower", "projector", "llama"), policy.cfg.lora_rank
    linear = [n for n, module in policy.named_modules() if isinstance(module, nn.Linear) and n.split(".")[0] in body]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=min(rank, 16), target_modules=linear, init_lora_weights="gaussian"), policy)
    for name, p in policy.named_parameters():
        p.requires_grad_("lora_" in name or name.split(".")[0] not in body)
        if policy.cfg.bf16 and not p.requires_grad:
            p.data = p.data.bfloat16()  # 14 GB instead of 28
