"""The policy: OpenVLA-OFT with a Laplace scale head, and its supervised fine-tuning (SFT) on a few demonstrations.

One forward pass predicts a whole chunk of K actions (parallel decoding, OpenVLA-OFT arXiv 2502.19645):
  [BOS] [image patches] [proprio] [prompt] [K * tokens_per_action placeholders, zero embeddings] [EOS]  ->  Llama
  the hidden states from the last prompt token on (one to the left of the placeholders) -> MLPResNet -> loc (B, K, 7)
Attention `full` (OpenVLA-OFT): everything sees everything. `suffix`: what comes before the last prompt token does not see what
follows, so its keys and values can be computed once, without gradient where only the suffix is to learn (RIPT-VLA's PPO update).
A second head gives the log of a Laplace scale, so that the policy has a density (World-Env arXiv 2509.24948, section 3):
  p(a | o) = prod_d Laplace(a_d; loc_d, exp(log_scale_d))                       sampled, stored and updated with the same formula
SFT: mean |a - loc| on normalised actions; then, everything else frozen, the scale head by the negative log-likelihood
  mean[log_scale + |a - loc| / exp(log_scale)].
Dims: B batch, K chunk_size, P patches of all cameras, C their channels, D model width, L prompt tokens, H W pixels.

Differs from the paper: `tiny` and `base` train from scratch, with a small ResNet instead of DINOv2 + SigLIP and one placeholder per
action instead of seven; log_scale has a floor, below which a PPO ratio is noise; no JPEG round trip of the pictures. In `base`, and
for Long, proprio has an error that the actions make up for, because five demonstrations do not show the way back to them.
Reads: demonstrations (--demos), a published checkpoint (--pretrained).  Writes: runs/<run>/policy_sft.pt, policy.jsonl.

  python policy.py --tasks goal               # all ten tasks of LIBERO-Goal
  python policy.py --tasks goal:1,7,8 --steps 500
  python policy.py --tasks long --steps 6000 --proprio-noise 0.02 --octaves 4 --init-std 0.088
  accelerate launch policy.py --preset paper --tasks goal --pretrained openvla-7b/     # fine-tune the published 7B model
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

import data


@dataclass
class Config:
    tasks: str = "goal"  # suite or choice of tasks: goal, object, spatial, long, all, goal:0,3,7, goal:1+object:2
    demos: str = "data"  # directory with LIBERO HDF5 files, searched recursively
    run: str = ""  # name below runs/; empty: tasks and preset, goal-tiny
    preset: str = "tiny"  # smoke, tiny, base or paper; every other flag overrides it
    seed: int = 0  # of weights, batches and augmentation
    demos_per_task: int = 5  # the paper's few-shot setting
    pretrained: str = ""  # directory of a published OpenVLA or OpenVLA-OFT checkpoint; its sizes are preset paper's
    image_size: int = 96  # H = W in pixels of the frames the policy sees
    cameras: int = 1  # 1: agentview; 2: and the one in the hand, which the simulator does not imagine
    chunk_size: int = 8  # K, actions per forward pass, all executed
    tower: tuple[int, ...] = (32, 64, 128)  # channels of ResNet stages, the first at a quarter of the resolution; none: DINOv2 + SigLIP
    dino: tuple[int, ...] = (128, 4, 4)  # DINOv2 tower: width, blocks, heads
    siglip: tuple[int, ...] = (128, 4, 4, 512)  # SigLIP tower: width, blocks, heads, width of its MLP
    patch: int = 8  # pixels of a patch's side, in both
    width: int = 128  # D, hidden size of the Llama
    layers: int = 4  # of the Llama
    heads: int = 4  # of its attention
    mlp: int = 341  # hidden size of its MLP
    init_std: float = 0.02  # standard deviation of the Llama's first weights
    vocabulary: int = 0  # rows of its embedding; 0: one per token
    tokens_per_action: int = 1  # placeholders per action; OpenVLA-OFT: 7, one per dimension
    prompt: str = "{}"  # around the instruction
    attention: str = "full"  # full (OpenVLA-OFT) or suffix (RIPT-VLA)
    lora_rank: int = 0  # of adapters on every linear layer outside the heads; 0: everything is trained in full
    bf16: bool = False  # train the network in bfloat16 autocast; for a GPU
    compile: bool = False  # train the Llama compiled (torch.compile), twice as fast on a GPU; the first steps take a minute
    octaves: int = 0  # proprio is also given as sines and cosines of so many frequencies
    proprio_noise: float = 0.0  # m, standard deviation of an error of the hand in training, which the actions make up for
    crop_area: float = 0.9  # random crop in training, centre crop otherwise (OpenVLA-OFT)
    jitter: float = 0.2  # brightness, contrast and saturation augmentation, a quarter of it for hue (OpenVLA-OFT)
    min_log_scale: float = -3.0  # floor of the Laplace log-scale: with a lower one, PPO's gradient is noise; the paper names none
    steps: int = 4500  # SFT gradient steps
    scale_steps: int = 100  # then this many on the scale head alone
    batch_size: int = 32  # B, of all processes together
    lr: float = 1e-3  # AdamW, linear warm-up, cosine decay
    lr_heads: float = 1e-3  # of action and scale head
    weight_decay: float = 0.01
    save_every: int = 250  # steps between checkpoints, what a kill can cost


OPENVLA = dict(prompt="In: What action should the robot take to {}?\nOut:", tokens_per_action=7, bf16=True)
PRESETS = {
    "tiny": Config(),
    "smoke": Config(preset="smoke", demos_per_task=2, image_size=32, tower=(8, 16), width=32, layers=2, heads=2, mlp=64,
                    proprio_noise=0.02, steps=20, scale_steps=5, batch_size=16, save_every=10),
    "base": Config(preset="base", image_size=128, tower=(64, 128, 256), width=512, layers=8, heads=8, mlp=1376, init_std=0.044,
                   steps=10000, scale_steps=500, batch_size=128, lr=2.5e-4, lr_heads=2.5e-4, save_every=1000, compile=True,
                   proprio_noise=0.015, **OPENVLA | dict(tokens_per_action=1)),
    "paper": Config(preset="paper", image_size=224, tower=(), dino=(1024, 24, 16), siglip=(1152, 27, 16, 4304), patch=14, width=4096,
                    layers=32, heads=32, mlp=11008, vocabulary=32064, lora_rank=32, min_log_scale=-10.0, steps=50000,
                    scale_steps=2000, lr=5e-4, lr_heads=5e-4, save_every=2000, **OPENVLA),
}


# ---- model ---------------------------------------------------------------------------------------------------------------

class ResNet(nn.Module):
    """A small tower that learns from few demonstrations: (B, 3, H, W) in [0, 1] -> (B, P, C)."""

    def __init__(self, cfg: Config):
        super().__init__()
        from transformers import ResNetConfig, ResNetModel
        sizes = dict(embedding_size=cfg.tower[0], hidden_sizes=list(cfg.tower), depths=[1] * len(cfg.tower))
        self.resnet = ResNetModel(ResNetConfig(layer_type="basic", **sizes)).to(memory_format=torch.channels_last)  # a tenth faster
        self.channels, patches = cfg.tower[-1], (cfg.image_size // 2 ** (len(cfg.tower) + 1)) ** 2
        self.position = nn.Parameter(torch.randn(patches, self.channels))  # a convolution does not know where it is

    def forward(self, images):
        return rearrange(self.resnet(images * 2 - 1).last_hidden_state, "b c h w -> b (h w) c") + self.position


class MLPResNet(nn.Module):
    """OpenVLA-OFT's head: LN, Linear, ReLU, blocks of x + ReLU(Linear(LN(x))), LN, Linear."""

    def __init__(self, inputs, hidden, outputs, blocks=2):
        super().__init__()
        self.stem = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, hidden), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.ReLU()) for _ in range(blocks))
        self.out = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, outputs))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


class Policy(nn.Module):
    """obs = dict(frames (B, 3, H, W) uint8, with two cameras wrist_frames too, proprio (B, 8), instruction list of B str)."""

    def __init__(self, cfg: Config, tokenizer, stats=None, weights=None):
        """`stats` action (2, 7) and proprio (2, 8): 1 % and 99 % quantiles. `weights` of `load_openvla` go in before LoRA does."""
        super().__init__()
        from transformers import LlamaConfig, LlamaModel
        self.cfg, self.tokenizer = cfg, tokenizer
        self.noise_scale = 1.0  # multiplies the Laplace scale, in sampling and in density
        self.prompt_gradient = True  # False: only the suffix learns; what comes before it runs without gradient
        # in training a random crop with other colours, else the centre crop; and a hand that is not quite where a demonstration was
        self.augment, self.disturb = data.beside("augment"), data.beside("disturb")
        D, inputs = cfg.width, cfg.tokens_per_action * cfg.width
        self.tower = ResNet(cfg) if cfg.tower else data.beside("dino_siglip")(cfg)
        C = self.tower.channels
        self.projector = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, D), nn.GELU(), nn.Linear(D, D))
        self.proprio_projector = nn.Sequential(nn.Linear(8 + 16 * cfg.octaves, D), nn.GELU(), nn.Linear(D, D))
        self.llama = LlamaModel(LlamaConfig(vocab_size=cfg.vocabulary or len(tokenizer), hidden_size=D, intermediate_size=cfg.mlp,
                                            num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, initializer_range=cfg.init_std))
        self.action_head = MLPResNet(inputs, D, 7)
        self.scale_trunk, self.scale_out = MLPResNet(inputs, D, D), nn.Linear(D, 7)
        nn.init.xavier_uniform_(self.scale_out.weight, gain=0.01)
        nn.init.constant_(self.scale_out.bias, -3.0)
        stats = stats or dict(action=np.stack([-np.ones(7), np.ones(7)]), proprio=np.stack([-np.ones(8), np.ones(8)]))
        self.register_buffer("action_bounds", torch.tensor(stats["action"], dtype=torch.float32))    # (2, 7)
        self.register_buffer("proprio_bounds", torch.tensor(stats["proprio"], dtype=torch.float32))  # (2, 8)
        if weights:
            data.beside("fill_openvla")(self, weights)
        if cfg.lora_rank:
            data.beside("add_lora")(self)

    def parameter_groups(self, lr, lr_heads):
        """What is to be trained, for AdamW: the rest (or its LoRA) and the two heads; `peak` is what a schedule multiplies."""
        heads = {id(p) for module in (self.action_head, self.scale_trunk, self.scale_out) for p in module.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = ([p for p in trained if id(p) not in heads], lr), ([p for p in trained if id(p) in heads], lr_heads)
        return [dict(params=params, lr=rate, peak=rate) for params, rate in groups]

    def forward(self, obs):
        """-> loc, log_scale: (B, K, 7) each, normalised actions, float32. Raises UserError on frames of another size."""
        hidden = self.hidden(obs)
        return self.action_head(hidden), self.log_scale(hidden)

    def log_scale(self, hidden):
        return self.scale_out(self.scale_trunk(hidden)).clamp(min=self.cfg.min_log_scale) + np.log(self.noise_scale)

    def hidden(self, obs):
        """-> (B, K, tokens_per_action * D) float32, what both heads read."""
        from transformers import DynamicCache
        cfg, cache = self.cfg, DynamicCache()
        with torch.autocast(self.action_bounds.device.type, torch.bfloat16, enabled=cfg.bf16):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.prompt_gradient):
                prefix, suffix, seen = self.embed(obs)
                if cfg.attention == "suffix":
                    self.attend(prefix, seen[:, :prefix.shape[1]], cache)
                    prefix = prefix[:, :0]
            states = self.attend(torch.cat([prefix, suffix], 1), seen, cache)
        return rearrange(states[:, -cfg.chunk_size * cfg.tokens_per_action - 2:-2].float(), "b (k n) d -> b k (n d)", k=cfg.chunk_size)

    def embed(self, obs):
        """-> prefix (B, S, D), suffix (B, n + 2, D) from the last prompt token on, seen (B, S + n + 2): 0 at padding."""
        cfg, prompts = self.cfg, [self.cfg.prompt.format(text.lower()) for text in obs["instruction"]]
        text = self.tokenizer(prompts, padding=True, pad_to_multiple_of=64 if cfg.compile else None,  # every length is compiled anew
                              return_tensors="pt", add_special_tokens=False).to(self.action_bounds.device)
        ids = text["input_ids"]                                                                      # (B, L) padded on the left
        views = [data.check_frames(obs[key], cfg.image_size, "policy") for key in ("frames", "wrist_frames")[:cfg.cameras]]
        views = [self.augment(view.float() / 255, cfg, self.training) for view in views]
        patches = torch.cat([self.projector(self.tower(view)) for view in views], 1)                 # (B, P, D)
        proprio = normalise(obs["proprio"], self.proprio_bounds)
        waves = [wave(proprio * np.pi * 2 ** o) for o in range(cfg.octaves) for wave in (torch.sin, torch.cos)]
        proprio = self.proprio_projector(torch.cat([proprio, *waves], -1))[:, None]                  # (B, 1, D)
        # "▁" ends OpenVLA's prompts
        special = ids.new_tensor(self.tokenizer.convert_tokens_to_ids(["<s>", "▁", "</s>"])).expand(len(ids), 3)
        bos, last, eos = self.llama.embed_tokens(special).split(1, 1)
        slots = last.new_zeros(len(ids), cfg.chunk_size * cfg.tokens_per_action, cfg.width)
        prefix, suffix = torch.cat([bos, patches, proprio, self.llama.embed_tokens(ids)], 1), torch.cat([last, slots, eos], 1)
        return prefix, suffix, F.pad(text["attention_mask"], (2 + patches.shape[1], suffix.shape[1]), value=1)

    def attend(self, x, seen, cache):
        """Llama on the last positions x (B, q, D) of seen (B, S), behind those in the cache; each sees all of them."""
        # additive, never bool: eager attention adds a bool mask as 0 / 1
        mask = torch.zeros(seen.shape, device=x.device).masked_fill(seen == 0, torch.finfo(torch.float32).min)
        mask, positions = repeat(mask, "b k -> b 1 q k", q=x.shape[1]), (seen.cumsum(1) - 1).clamp(min=0)[:, -x.shape[1]:]
        return self.llama(None, mask, positions, cache, x).last_hidden_state  # by position: transformers 5.24 renamed the cache's keyword

    # ---- the density ----
    def act(self, obs, deterministic=False):
        """-> action_chunk (B, K, 7) normalised, log_prob (B, K)."""
        loc, log_scale = self(obs)
        noise = torch.zeros_like(loc) if deterministic else torch.distributions.Laplace(0.0, 1.0).sample(loc.shape).to(loc)
        action_chunk = loc + log_scale.exp() * noise
        return action_chunk, laplace_log_prob(action_chunk, loc, log_scale)

    def log_prob(self, obs, action_chunk):
        """(B, K): the one density, used to sample, to store and to update."""
        return laplace_log_prob(action_chunk, *self(obs))

    # ---- training ----
    def loss(self, obs, action_chunk, mask):
        """L1 on normalised actions (OpenVLA-OFT). action_chunk (B, K, 7), mask (B, K): 0 past the episode's end."""
        error = (self.action_head(self.hidden(obs)) - action_chunk).abs().mean(-1)
        loss = (error * mask).sum() / mask.sum()
        return loss, dict(l1=loss.detach())

    def scale_loss(self, obs, action_chunk, mask):
        """Negative log-likelihood for the scale head alone (World-Env): optimum scale = E|a - loc|."""
        with torch.no_grad():
            hidden = self.hidden(obs)
            loc = self.action_head(hidden)
        log_scale = self.log_scale(hidden)
        nll = -laplace_log_prob(action_chunk, loc, log_scale)
        loss = (nll * mask).sum() / mask.sum() / 7
        return loss, dict(nll=loss.detach()) | {f"log_scale_{d}": mean for d, mean in enumerate(log_scale.detach().mean((0, 1)))}

    # ---- conventions ----
    def from_env(self, actions):
        """LIBERO actions (..., 7) -> normalised: quantiles to [-1, 1], gripper -1 open / +1 close -> 1 open / 0 close."""
        return torch.cat([normalise(actions, self.action_bounds)[..., :6], (1 - actions[..., 6:].clamp(-1, 1)) / 2], -1)

    def to_env(self, action_chunk):
        """Normalised actions -> LIBERO actions in [-1, 1]; the gripper is thresholded at 1/2."""
        low, high = self.action_bounds
        motion = (action_chunk[..., :6] + 1) / 2 * (high - low + 1e-8)[:6] + low[:6]
        return torch.cat([motion.clamp(-1, 1), torch.where(action_chunk[..., 6:] > 0.5, -1.0, 1.0)], -1)


def laplace_log_prob(action_chunk, loc, log_scale):
    """(B, K, 7) x 3 -> (B, K): sum over dimensions of log Laplace(a; loc, exp(log_scale)), float32."""
    return (-log_scale - (action_chunk - loc).abs() * (-log_scale).exp() - np.log(2)).sum(-1)


def normalise(x, bounds):
    """1 % / 99 % quantiles -> [-1, 1], clipped; a dimension that never moves becomes 0 (OpenVLA-OFT)."""
    low, high = bounds
    return torch.where(high - low < 1e-6, 0.0, (2 * (x - low) / (high - low + 1e-8) - 1).clamp(-1, 1))


def load_policy(path, device="cpu") -> Policy:
    """A policy from `policy_sft.pt` or `policy_rl.pt`, in eval mode, in float32 but for LoRA's. Raises UserError."""
    checkpoint = data.load_checkpoint(path, "policy", device)
    cfg = data.from_config(Config, checkpoint["config"])  # PPO's ratios need float32, bfloat16 rounds otherwise in another batch
    cfg = replace(cfg, bf16=cfg.bf16 and cfg.lora_rank > 0, compile=False)
    policy = Policy(cfg, data.beside("load_tokenizer")(checkpoint["tokenizer"])).to(device)
    policy.load_state_dict(checkpoint["model"])
    return policy.eval()


def load_openvla(checkpoint_dir, suite="") -> dict:
    """A published OpenVLA or OpenVLA-OFT checkpoint (its LIBERO statistics those of `suite`) -> state dict of `Policy` at preset
    paper, less the heads it does not have: see data/load_openvla.py. Raises UserError."""
    return data.beside("load_openvla")(checkpoint_dir, suite)


# ---- training ------------------------------------------------------------------------------------------------------------

def dataset(episodes, chunk_size, device="cpu"):
    """Every state with a frame and the K actions that follow: frames, proprio, instruction, actions (n, K, 7), mask (n, K)."""
    rows = [(e, i, t) for e in episodes for i, t in enumerate(e.frame_steps) if t < len(e.actions)]
    steps = [np.arange(t, t + chunk_size) for _, _, t in rows]
    as_tensor = lambda values: torch.from_numpy(np.stack(values)).to(device)
    return dict({key: as_tensor([getattr(e, key)[i] for e, i, _ in rows])
                 for key in ("frames", "wrist_frames") if getattr(episodes[0], key) is not None},
                proprio=as_tensor([e.proprio[t] for e, _, t in rows]), instruction=[e.instruction for e, _, _ in rows],
                actions=as_tensor([e.actions[s.clip(max=len(e.actions) - 1)] for (e, *_), s in zip(rows, steps)]),
                mask=as_tensor([s < len(e.actions) for (e, *_), s in zip(rows, steps)]).float())


def share_of_loss(policy, loss, samples, batch):
    """`loss` (`policy.loss` or `policy.scale_loss`) on this process's share of rows `batch` of a `dataset` -> loss, metrics.
    Shares are weighted by their steps, so that the mean over processes is the loss of the batch. The scale head learns from samples as
    they are; the errors of the others are drawn for the whole batch, by every process alike, in LOOP as in SFT."""
    mask, share = samples["mask"], slice((processes := data.processes()).process_index, None, processes.num_processes)
    obs = {key: value[batch] if torch.is_tensor(value) else [value[i] for i in batch] for key, value in samples.items()}
    obs["proprio"], obs["actions"] = policy.disturb(obs["proprio"], obs["actions"], policy.cfg.proprio_noise * (loss == policy.loss))
    obs = {key: value[share].to(policy.action_bounds.device) if torch.is_tensor(value) else value[share] for key, value in obs.items()}
    value, metrics = loss(obs, policy.from_env(obs.pop("actions")), obs.pop("mask"))
    return value * (mask[batch[share]].sum() / mask[batch].sum() * processes.num_processes), metrics


def train(cfg: Config):
    device = data.processes().device
    path, tasks, total = data.run_dir(cfg) / "policy_sft.pt", data.parse_tasks(cfg.tasks), cfg.steps + cfg.scale_steps
    data.require(cfg.attention in ("full", "suffix") and cfg.cameras in (1, 2), f"got --attention {cfg.attention} --cameras "
                 f"{cfg.cameras}, expected full or suffix, and 1 or 2")
    checkpoint, finished = data.resume(path, "policy_sft", cfg, device)
    if finished:
        return print(f"{path} is finished ({total} steps); delete it to train again")
    torch.manual_seed(cfg.seed)
    episodes = data.load_episodes(cfg.demos, tasks, cfg.demos_per_task, image_size=cfg.image_size, wrist=cfg.cameras == 2)
    samples, weights = dataset(episodes, cfg.chunk_size, device), None
    quantiles = lambda x: np.quantile(np.concatenate(x), [0.01, 0.99], axis=0)
    stats = dict(action=quantiles([e.actions for e in episodes]), proprio=quantiles([e.proprio for e in episodes]))
    tokenizer = checkpoint["tokenizer"] if checkpoint else data.beside("train_tokenizer")()
    if cfg.pretrained and not checkpoint:
        weights, tokenizer = load_openvla(cfg.pretrained, tasks[0].suite), (Path(cfg.pretrained) / "tokenizer.json").read_text("utf-8")
    with torch.device(device):
        policy = Policy(cfg, data.beside("load_tokenizer")(tokenizer), stats, weights)
    if cfg.compile:
        policy.llama.compile()
    optimizer = torch.optim.AdamW(policy.parameter_groups(cfg.lr, cfg.lr_heads), weight_decay=cfg.weight_decay, fused=True)
    print(f"policy: {sum(p.numel() for p in policy.parameters()) / 1e6:.1f} M parameters, {len(episodes)} demonstrations, "
          f"{len(samples['frames'])} samples, {total} steps of {cfg.batch_size}")

    def loss_of(phase, step):  # phase 0: the policy, 1: its scale head, the frozen rest as it will act
        policy.train(phase == 0)
        batch = torch.randint(len(samples["mask"]), (cfg.batch_size,))
        return share_of_loss(policy, (policy.loss, policy.scale_loss)[phase], samples, batch)

    data.fit(cfg, "policy_sft", policy, optimizer, checkpoint, (cfg.steps, cfg.scale_steps), loss_of, tokenizer=tokenizer,
             demos={f"{e.task}/demo_{e.index}": len(e.actions) for e in episodes})


if __name__ == "__main__":
    data.command_line(train, PRESETS, __doc__)
