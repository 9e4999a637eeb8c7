"""The policy: OpenVLA-OFT with a Laplace scale head, and its supervised fine-tuning (SFT) on a few demonstrations.

One forward pass predicts a whole chunk of K actions (parallel decoding, OpenVLA-OFT arXiv 2502.19645):
  [BOS] [image patches] [proprio] [prompt] [K * tokens_per_action placeholders, zero embeddings]  ->  Llama, all see all
  the hidden states from the last prompt token on (one to the left of the placeholders) -> MLPResNet -> loc (B, K, 7)
A second head gives the log of a Laplace scale, so that the policy has a density (World-Env arXiv 2509.24948, section 3):
  p(a | o) = prod_d Laplace(a_d; loc_d, exp(log_scale_d))                       sampled, stored and updated with the same formula
SFT: mean |a - loc| on normalised actions; then, everything else frozen, the scale head by the negative log-likelihood
  mean[log_scale + |a - loc| / exp(log_scale)].
Dims: B batch, K chunk_size, P patches, D model width, H W pixels.

Differs from the paper: one camera; `tiny` trains from scratch, with a small ResNet instead of DINOv2 + SigLIP and one placeholder
per action instead of seven; log_scale has a floor, below which a PPO ratio is noise.
Reads: demonstrations (--demos).  Writes: runs/<run>/policy_sft.pt, policy.jsonl.

  python policy.py --tasks goal               # all ten tasks of LIBERO-Goal
  python policy.py --tasks goal:1,7,8 --steps 500
"""
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from tqdm import trange

import data


@dataclass
class Config:
    tasks: str = "goal"  # suite or choice of tasks: goal, object, spatial, long, all, goal:0,3,7, goal:1+object:2
    demos: str = "data"  # directory with LIBERO HDF5 files, searched recursively
    run: str = ""  # name below runs/; empty: tasks and preset, goal-tiny
    preset: str = "tiny"  # smoke or tiny; every other flag overrides it
    seed: int = 0  # of weights, batches and augmentation
    demos_per_task: int = 5  # the paper's few-shot setting
    image_size: int = 96  # H = W in pixels of the frames the policy sees
    chunk_size: int = 8  # K, actions per forward pass, all executed
    tower: tuple[int, ...] = (32, 64, 128)  # channels of the ResNet stages, each halving the resolution after a stem of 4
    width: int = 128  # D, hidden size of the Llama
    layers: int = 4  # of the Llama
    heads: int = 4  # of its attention
    tokens_per_action: int = 1  # placeholders per action; OpenVLA-OFT: 7, one per dimension
    prompt: str = "{}"  # around the instruction; OpenVLA: In: What action should the robot take to {}?\nOut:
    crop_area: float = 0.9  # random crop in training, centre crop otherwise (OpenVLA-OFT)
    jitter: float = 0.2  # brightness, contrast and saturation augmentation (OpenVLA-OFT)
    min_log_scale: float = -4.0  # floor of the Laplace log-scale; the paper names none
    steps: int = 1000  # SFT gradient steps
    scale_steps: int = 100  # then this many on the scale head alone
    batch_size: int = 64  # B
    lr: float = 1e-3  # AdamW, linear warm-up, cosine decay
    weight_decay: float = 0.01
    save_every: int = 100  # steps between checkpoints, what a kill can cost


PRESETS = {
    "tiny": Config(),
    "smoke": Config(preset="smoke", demos_per_task=2, image_size=32, tower=(8, 16), width=32, layers=2, heads=2, steps=20,
                    scale_steps=5, batch_size=16, save_every=10),
}


# ---- model ---------------------------------------------------------------------------------------------------------------

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
    """obs = dict(frames (B, 3, H, W) uint8, proprio (B, 8), instruction list of B str)."""

    def __init__(self, cfg: Config, tokenizer, stats=None):
        super().__init__()
        from transformers import LlamaConfig, LlamaModel, ResNetConfig, ResNetModel
        self.cfg, self.tokenizer = cfg, tokenizer
        self.noise_scale = 1.0  # multiplies the Laplace scale, in sampling and in density
        D = cfg.width
        self.tower = ResNetModel(ResNetConfig(embedding_size=cfg.tower[0], hidden_sizes=list(cfg.tower), depths=[1] * len(cfg.tower),
                                              layer_type="basic"))
        patches = (cfg.image_size // 2 ** (len(cfg.tower) + 1)) ** 2
        self.projector = nn.Sequential(nn.Linear(cfg.tower[-1], D), nn.GELU(), nn.Linear(D, D))
        self.patch_position = nn.Parameter(torch.randn(patches, D) * 0.02)  # a convolution does not know where it is
        self.proprio_projector = nn.Sequential(nn.Linear(8, D), nn.GELU(), nn.Linear(D, D))
        self.llama = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), hidden_size=D, intermediate_size=D * 8 // 3,
                                            num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads))
        self.action_head = MLPResNet(cfg.tokens_per_action * D, D, 7)
        self.scale_trunk = MLPResNet(cfg.tokens_per_action * D, D, D)
        self.scale_out = nn.Linear(D, 7)
        nn.init.xavier_uniform_(self.scale_out.weight, gain=0.01)
        nn.init.constant_(self.scale_out.bias, -3.0)
        stats = stats or dict(action=np.stack([-np.ones(7), np.ones(7)]), proprio=np.stack([-np.ones(8), np.ones(8)]))
        self.register_buffer("action_bounds", torch.tensor(stats["action"], dtype=torch.float32))    # (2, 7) 1 % and 99 % quantiles
        self.register_buffer("proprio_bounds", torch.tensor(stats["proprio"], dtype=torch.float32))  # (2, 8)

    def forward(self, obs):
        """-> loc, log_scale: (B, K, 7) each, normalised actions, float32. Raises UserError on frames of another size."""
        hidden = self.hidden(obs)
        return self.action_head(hidden).float(), self.log_scale(hidden)

    def log_scale(self, hidden):
        return self.scale_out(self.scale_trunk(hidden)).float().clamp(min=self.cfg.min_log_scale) + np.log(self.noise_scale)

    def hidden(self, obs):
        """-> (B, K, tokens_per_action * D), what both heads read."""
        cfg = self.cfg
        images = self.augment(data.check_frames(obs["frames"], cfg.image_size, "policy").float() / 255)
        patches = self.tower(images * 2 - 1).last_hidden_state                                       # (B, C, h, w)
        patches = self.projector(rearrange(patches, "b c h w -> b (h w) c")) + self.patch_position   # (B, P, D)
        proprio = self.proprio_projector(normalise(obs["proprio"], self.proprio_bounds))[:, None]    # (B, 1, D)
        ids, attend = self.tokens(obs["instruction"])                                                # (B, L) each, padded on the left
        prompt = self.llama.embed_tokens(ids)
        bos = self.llama.embed_tokens(torch.full_like(ids[:, :1], self.tokenizer.bos_token_id))
        slots = prompt.new_zeros(len(ids), cfg.chunk_size * cfg.tokens_per_action, cfg.width)
        x = torch.cat([bos, patches, proprio, prompt, slots], 1)
        seen = torch.cat([attend.new_ones(len(ids), 2 + patches.shape[1]), attend, attend.new_ones(slots.shape[:2])], 1)  # (B, S)
        # additive, never bool: eager attention adds a bool mask as 0 / 1
        mask = torch.zeros(seen.shape, device=x.device).masked_fill(seen == 0, torch.finfo(torch.float32).min)
        mask = repeat(mask, "b k -> b 1 q k", q=x.shape[1])
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        states = self.llama(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        return rearrange(states[:, -slots.shape[1] - 1:-1], "b (k n) d -> b k (n d)", k=cfg.chunk_size)

    def tokens(self, instructions):
        prompts = [self.cfg.prompt.format(text.lower()) for text in instructions]
        batch = self.tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False).to(self.patch_position.device)
        return batch["input_ids"], batch["attention_mask"]

    def augment(self, images):
        """(B, 3, H, W) in [0, 1]: in training a random crop of `crop_area`, brightness, contrast, saturation; else the centre crop."""
        B, side = len(images), self.cfg.crop_area ** 0.5
        shift, gain = torch.zeros(B, 2), torch.ones(3, B, 1, 1, 1)
        if self.training:
            shift = (torch.rand(B, 2) * 2 - 1) * (1 - side)
            gain = 1 + (torch.rand(3, B, 1, 1, 1) * 2 - 1) * self.cfg.jitter
        shift, (bright, contrast, saturation) = shift.to(images.device), gain.to(images.device)
        affine = torch.cat([repeat(torch.eye(2, device=images.device) * side, "i j -> b i j", b=B), shift[..., None]], 2)
        grid = F.affine_grid(affine, images.shape, align_corners=False)
        images = F.grid_sample(images, grid, align_corners=False, padding_mode="border")
        if self.training:
            images = images * bright
            images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)
            images = torch.lerp(images.mean(1, keepdim=True), images, saturation)
        return images.clamp(0, 1)

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
        error = (self.action_head(self.hidden(obs)).float() - action_chunk).abs().mean(-1)
        loss = (error * mask).sum() / mask.sum()
        return loss, dict(l1=loss.detach())

    def scale_loss(self, obs, action_chunk, mask):
        """Negative log-likelihood for the scale head alone (World-Env): optimum scale = E|a - loc|."""
        with torch.no_grad():
            hidden = self.hidden(obs)
            loc = self.action_head(hidden).float()
        log_scale = self.log_scale(hidden)
        nll = -laplace_log_prob(action_chunk, loc, log_scale)
        loss = (nll * mask).sum() / mask.sum() / 7
        return loss, dict(nll=loss.detach(), log_scale=log_scale.detach().mean())

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


def train_tokenizer() -> str:
    """A byte-level BPE tokenizer of LIBERO's own instructions, as JSON: the small presets need no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    instructions = [task.instruction for task in data.parse_tasks("all+libero_90")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(instructions, trainer)
    return tokenizer.to_str()


def load_tokenizer(text: str):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   padding_side="left")


def load_policy(path, device="cpu") -> Policy:
    """A policy from `policy_sft.pt` or `policy_rl.pt`, in eval mode. Raises UserError."""
    checkpoint = data.load_checkpoint(path, "policy", device)
    policy = Policy(data.from_config(Config, checkpoint["config"]), load_tokenizer(checkpoint["tokenizer"]))
    policy.load_state_dict(checkpoint["model"])
    return policy.to(device).eval()


# ---- training ------------------------------------------------------------------------------------------------------------

def dataset(episodes, chunk_size):
    """Every state with a frame and the K actions that follow: frames, proprio, instruction, actions (n, K, 7), mask (n, K)."""
    rows = [(e, i, t) for e in episodes for i, t in enumerate(e.frame_steps) if t < len(e.actions)]
    steps = [np.arange(t, t + chunk_size) for _, _, t in rows]
    return dict(frames=torch.from_numpy(np.stack([e.frames[i] for e, i, _ in rows])),
                proprio=torch.from_numpy(np.stack([e.proprio[t] for e, _, t in rows])),
                instruction=[e.instruction for e, _, _ in rows],
                actions=torch.from_numpy(np.stack([e.actions[s.clip(max=len(e.actions) - 1)] for (e, *_), s in zip(rows, steps)])),
                mask=torch.from_numpy(np.stack([s < len(e.actions) for (e, *_), s in zip(rows, steps)])).float())


def train(cfg: Config):
    run, device = data.run_dir(cfg), "cuda" if torch.cuda.is_available() else "cpu"
    path, total = run / "policy_sft.pt", cfg.steps + cfg.scale_steps
    checkpoint, finished = data.resume(path, "policy_sft", cfg, device)
    if finished:
        return print(f"{path} is finished ({total} steps); delete it to train again")
    torch.manual_seed(cfg.seed)
    episodes = data.load_episodes(cfg.demos, data.parse_tasks(cfg.tasks), cfg.demos_per_task, image_size=cfg.image_size)
    samples = dataset(episodes, cfg.chunk_size)
    quantiles = lambda x: np.quantile(np.concatenate(x), [0.01, 0.99], axis=0)
    stats = dict(action=quantiles([e.actions for e in episodes]), proprio=quantiles([e.proprio for e in episodes]))
    tokenizer = checkpoint["tokenizer"] if checkpoint else train_tokenizer()
    policy = Policy(cfg, load_tokenizer(tokenizer), stats).to(device)
    samples["actions"] = policy.from_env(samples["actions"].to(device)).cpu()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    start = 0
    if checkpoint:
        policy.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
    print(f"policy: {sum(p.numel() for p in policy.parameters()) / 1e6:.1f} M parameters, {len(episodes)} demonstrations, "
          f"{len(samples['frames'])} samples, steps {start} to {total}")
    policy.train()
    began = time.time()
    for step in (bar := trange(start, total, initial=start, total=total, desc="policy", mininterval=2)):
        torch.manual_seed(cfg.seed * 1_000_003 + step)  # a step's randomness depends on its number alone: resuming is exact
        rows = torch.randint(len(samples["frames"]), (cfg.batch_size,))
        obs = dict(frames=samples["frames"][rows].to(device), proprio=samples["proprio"][rows].to(device),
                   instruction=[samples["instruction"][i] for i in rows])
        target, mask = samples["actions"][rows].to(device), samples["mask"][rows].to(device)
        fitting_scale = step >= cfg.steps
        if fitting_scale:
            policy.eval()  # the frozen rest, as it will act
        progress = (step - cfg.steps) / cfg.scale_steps if fitting_scale else step / cfg.steps
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * progress))
        loss, metrics = (policy.scale_loss if fitting_scale else policy.loss)(obs, target, mask)
        optimizer.zero_grad(set_to_none=True)  # parameters without gradient are skipped by AdamW: frozen
        loss.backward()
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0 or step + 1 == total:
            bar.set_postfix({k: f"{float(v):.3f}" for k, v in metrics.items()})
            data.log(run, "policy", step + 1, metrics)
        if (step + 1) % cfg.save_every == 0 or step + 1 == total:
            data.save_checkpoint(path, "policy_sft", cfg, policy, optimizer=optimizer.state_dict(), step=step + 1,
                                 finished=step + 1 == total, metrics={k: float(v) for k, v in metrics.items()}, tokenizer=tokenizer,
                                 demos={f"{e.task}/demo_{e.index}": len(e.actions) for e in episodes})
    print(f"wrote {path} after {time.time() - began:.0f} s")


if __name__ == "__main__":
    data.command_line(train, PRESETS, __doc__)
