"""Published OpenVLA and OpenVLA-OFT checkpoints -> the state dict of policy.py; `policy.load_openvla` calls this.

Their vision towers carry timm's names, with q, k and v in one matrix; here they are transformers' Dinov2WithRegisters and Siglip.
"""
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data

PUBLISHED = (  # regular expressions in the names of OpenVLA's files (timm's names for the towers), replaced in turn -> ours
    (r"^vision_backbone\.featurizer\.", "tower.dino."), (r"^vision_backbone\.fused_featurizer\.", "tower.siglip."),
    (r"(dino|siglip)\.(cls_token|pos_embed|patch_embed)", r"\1.embeddings.\2"), (r"dino\.reg_token", "dino.embeddings.register_tokens"),
    (r"(dino.*)\.pos_embed$", r"\1.position_embeddings"), (r"(siglip.*)\.pos_embed$", r"\1.position_embedding.weight"),
    (r"(dino.*)\.patch_embed\.proj", r"\1.patch_embeddings.projection"), (r"(siglip.*)\.patch_embed\.proj", r"\1.patch_embedding"),
    (r"dino\.blocks", "dino.encoder.layer"), (r"siglip\.blocks", "siglip.encoder.layers"),
    (r"(dino.*)\.attn\.proj", r"\1.attention.o_proj"), (r"(siglip.*)\.attn\.proj", r"\1.self_attn.out_proj"),
    (r"(dino.*)\.attn\.qkv", r"\1.attention.qkv"), (r"(siglip.*)\.attn\.qkv", r"\1.self_attn.qkv"),
    (r"\.ls([12])\.(scale_factor|gamma)$", r".layer_scale\1.lambda1"), (r"(siglip.*)\.norm([12])", r"\1.layer_norm\2"),
    (r"dino\.norm", "dino.layernorm"), (r"siglip\.norm", "siglip.post_layernorm"), (r"^language_model\.model", "llama"),
    (r"projector\.fc1", "projector.0"), (r"projector\.fc2", "projector.2"), (r"^projector\.fc3", "projector.4"),
    (r"^action_head\.model\.layer_norm1", "action_head.stem.0"), (r"^action_head\.model\.fc1", "action_head.stem.1"),
    (r"^action_head\.model\.mlp_resnet_blocks\.(\d)\.ffn", r"action_head.blocks.\1"),
    (r"^action_head\.model\.layer_norm2", "action_head.out.0"), (r"^action_head\.model\.fc2", "action_head.out.1"))


def load_openvla(checkpoint_dir, suite="") -> dict:
    """A published OpenVLA or OpenVLA-OFT checkpoint (safetensors shards; with OFT also action head, proprio projector and the
    statistics of `suite`) -> state dict of `Policy` at preset paper, less the heads it does not have. Raises UserError."""
    folder, published, state = Path(checkpoint_dir), {}, {}
    shards = sorted(folder.glob("*.safetensors"))
    data.require(shards, f"{folder}: no *.safetensors inside, expected the files of a published OpenVLA or OpenVLA-OFT checkpoint")
    for shard in shards:
        published |= load_file(shard)
    for part in ("action_head", "proprio_projector"):
        for file in sorted(folder.glob(f"{part}--*.pt")):
            head = torch.load(file, map_location="cpu", weights_only=True)
            published |= {f"{part}.{name.removeprefix('module.')}": value for name, value in head.items()}
    unused = ("vision_backbone.fused_featurizer.attn_pool", "language_model.lm_head")  # SigLIP's pooling, action tokens of OpenVLA
    for name, value in ((n, v) for n, v in published.items() if not n.startswith(unused)):
        for pattern, ours in PUBLISHED:
            name = re.sub(pattern, ours, name)
        parts = {name.replace("qkv", f"{x}_proj"): piece for x, piece in zip("qkv", value.chunk(3))} if ".qkv." in name else {name: value}
        state |= parts
    dino = "tower.dino.embeddings."
    if f"{dino}position_embeddings" in state:  # timm added the one of the class token to the token
        state[f"{dino}position_embeddings"] = F.pad(state[f"{dino}position_embeddings"], (0, 0, 1, 0))
        state[f"{dino}mask_token"] = state[f"{dino}cls_token"].new_zeros(1, state[f"{dino}cls_token"].shape[-1])
    state = {name: value.squeeze(0) if name.endswith("position_embedding.weight") else value for name, value in state.items()}
    if (folder / "dataset_statistics.json").exists():
        norms = json.loads((folder / "dataset_statistics.json").read_text())
        for norm in (norms[key] for key in (suite, f"{suite}_no_noops") if key in norms):
            state |= {f"{name}_bounds": torch.tensor([norm[name]["q01"], norm[name]["q99"]]) for name in ("action", "proprio")}
    return state
