"""Published OpenVLA and OpenVLA-OFT checkpoints -> the state dict of policy.py; `policy.load_openvla` calls this.

Their two vision towers carry timm's names, with query, key and value in one matrix; policy.py has transformers' classes.
"""
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data

# published beginning of a name -> ours, and then the parts of names that differ below it
PARTS = {
    "vision_backbone.featurizer.": ("tower.dino.", {
        "cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks.": "encoder.layer.", "attn.qkv": "attention.qkv",
        "attn.proj": "attention.o_proj", "ls1.scale_factor": "layer_scale1.lambda1", "ls2.scale_factor": "layer_scale2.lambda1",
        "dino.norm.": "dino.layernorm."}),
    "vision_backbone.fused_featurizer.": ("tower.siglip.", {
        "pos_embed": "embeddings.position_embedding.weight", "patch_embed.proj": "embeddings.patch_embedding",
        "siglip.norm.": "siglip.post_layernorm.", "blocks.": "encoder.layers.", "attn.qkv": "self_attn.qkv",
        "attn.proj": "self_attn.out_proj", ".norm1": ".layer_norm1", ".norm2": ".layer_norm2"}),
    "projector.": ("projector.", {"fc1": "0", "fc2": "2", "fc3": "4"}),
    "language_model.model.": ("llama.", {}),
    "proprio_projector.": ("proprio_projector.", {"fc1": "0", "fc2": "2"}),
    "action_head.model.": ("action_head.", {
        "layer_norm1": "stem.0", "fc1": "stem.1", "mlp_resnet_blocks": "blocks", "ffn.": "", "layer_norm2": "out.0", "fc2": "out.1"})}
UNUSED = "vision_backbone.fused_featurizer.attn_pool", "language_model.lm_head"  # SigLIP's pooling, OpenVLA's action tokens


def load_openvla(checkpoint_dir, suite="") -> dict:
    """A published OpenVLA or OpenVLA-OFT checkpoint (safetensors shards; with OFT also action head, proprio projector and the
    statistics of `suite`) -> state dict of `Policy` at preset paper, less the heads it does not have. Raises UserError."""
    folder, published, state = Path(checkpoint_dir), {}, {}
    shards = sorted(folder.glob("*.safetensors"))
    for pattern, found in (("*.safetensors", shards), ("tokenizer.json", (folder / "tokenizer.json").exists())):
        data.require(found, f"{folder}: no {pattern} inside, expected the files of a published OpenVLA or OpenVLA-OFT checkpoint")
    for file in (*shards, *sorted(folder.glob("action_head--*.pt")), *sorted(folder.glob("proprio_projector--*.pt"))):
        try:
            weights = load_file(file) if file in shards else torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # safetensors and torch raise a dozen types for a damaged file
            raise data.UserError(f"{file}: not a readable file of weights ({type(error).__name__}); download it again") from None
        prefix = "" if file in shards else file.name.split("--")[0] + "."
        published |= {prefix + name.removeprefix("module."): value for name, value in weights.items()}  # `module.`: DDP's
    for name, value in published.items():
        if name.startswith(UNUSED):
            continue
        beginning = next((b for b in PARTS if name.startswith(b)), "")
        ours, changes = PARTS.get(beginning, ("", {}))
        name = ours + name.removeprefix(beginning)
        for theirs, new in changes.items():
            name = name.replace(theirs, new)
        thirds = zip("qkv", value.chunk(3)) if ".qkv." in name else [("", value)]
        state |= {name.replace("qkv", f"{letter}_proj"): piece for letter, piece in thirds}
    dino, siglip = "tower.dino.embeddings.", "tower.siglip.embeddings.position_embedding.weight"
    if f"{dino}position_embeddings" in state:
        state[siglip] = state[siglip][0]
        # timm has added the class token's position to the token; a mask token only serves DINO's own training
        state[f"{dino}position_embeddings"] = F.pad(state[f"{dino}position_embeddings"], (0, 0, 1, 0))
        state[f"{dino}mask_token"] = torch.zeros_like(state[f"{dino}cls_token"][0])
    if (folder / "dataset_statistics.json").exists():
        norms = json.loads((folder / "dataset_statistics.json").read_text())
        for norm in (norms[key] for key in (suite, f"{suite}_no_noops") if key in norms):
            state |= {f"{name}_bounds": torch.tensor([norm[name]["q01"], norm[name]["q99"]]) for name in ("action", "proprio")}
    return state
