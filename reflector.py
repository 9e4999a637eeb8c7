"""The instant reflector: p(task done | frames so far, instruction), a LLaVA with a reward head (World-Env, arXiv 2509.24948).

  h_t = hidden states of LLaVA over [instruction] [tokens of `frames` frames, uniformly picked from o_1..o_t], mean over o_t's tokens
  p_t = sigmoid(head(h_t)),  trained with BCE against y_t = 1[LIBERO's success predicate holds at t]
  a rollout stops at the first t with p_t > threshold, `patience` times in a row; p there is its reward (the paper's threshold is
  0.5, here it is chosen on held-out episodes)
Labels are not latched: when a bowl falls off its plate, success is lost. Of each task's samples half are positive, so that its
instruction does not tell the answer, a quarter are near misses, up to 32 steps before success: a stop too early ends a rollout
before what decides it, and LOOP never learns that. The other negatives are the rest of its episodes. Where every task has a scene of
its own, none of that makes the instruction worth reading, so there is a contrast beside the BCE: the logit of a successful frame must
be higher with its own instruction than with those of other tasks (InfoNCE, arXiv 1807.03748).
Dims: B batch, T frames so far, P tokens per frame, D width, H W pixels.

Differs from the paper: `tiny` trains a small LLaVA from scratch instead of a head on a frozen one, its vision tower a ResNet that
starts from the policy's; it sees 2 frames, first and last, instead of 32, blurred at random in training because imagined frames are
softer than real ones. (Trained from scratch, a head on the last text token learned nothing in 300 steps; the mean over o_t's tokens
does.)
`--judge binary` stands for a LLaVA that is asked whether the task is done: the same network, but its answer is yes or no, and it
has seen nothing but demonstrations, as a model asked without a reward head has seen no rollout of this policy.
Reads: demonstrations (--demos), runs/<run>/explore/, imagined/, policy_sft.pt.  Writes: runs/<run>/reflector.pt, reflector.jsonl.

  python reflector.py --demos data/
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import data


@dataclass
class Config:
    tasks: str = "goal"  # suite or choice of tasks: goal, object, spatial, long, all, goal:0,3,7, goal:1+object:2
    demos: str = "data"  # directory with LIBERO HDF5 files, searched recursively
    run: str = ""  # name below runs/; empty: tasks and preset, goal-tiny
    preset: str = "tiny"  # smoke, tiny or base; every other flag overrides it
    seed: int = 0  # of weights and batches
    demos_per_task: int = 5  # expert demonstrations used
    kinds: tuple[str, ...] = ("expert", "explore", "imagined")  # training data
    judge: str = "reward_head"  # or binary, the paper's baseline: says yes or no, learned from demonstrations alone
    image_size: int = 96  # H = W in pixels
    tower_from: str = "policy_sft.pt"  # checkpoint in runs/<run>/ whose ResNet the vision tower starts from; empty: random weights
    frames: int = 2  # frames seen at once, uniformly picked from those so far; the paper: 32
    tower: tuple[int, ...] = (32, 64, 128)  # channels of the ResNet stages, each halving the resolution after a stem of 4
    width: int = 96  # D, of the language model
    layers: int = 2  # of the language model
    heads: int = 4  # of attention
    min_steps: int = 0  # scored frames before a rollout may stop
    patience: int = 2  # consecutive scores above the threshold needed to stop
    wrong_instructions: int = 3  # other tasks' instructions that a frame is read with too
    contrast: float = 0.6  # weight of the loss that wants a successful frame's own instruction on top of those
    jitter: float = 0.2  # brightness and contrast augmentation
    steps: int = 1500  # gradient steps
    batch_size: int = 32  # B
    lr: float = 1e-3  # AdamW, linear warm-up, cosine decay
    save_every: int = 100  # steps between checkpoints, what a kill can cost


PRESETS = {
    "tiny": Config(),
    "smoke": Config(preset="smoke", demos_per_task=2, image_size=32, tower=(8, 16), frames=3, width=32, layers=1, heads=2, steps=20,
                    batch_size=8, save_every=10),
    "base": Config(preset="base", image_size=128, frames=8, tower=(64, 128, 256), width=512, layers=8, heads=8, steps=10000,
                   batch_size=64, lr=3e-4, save_every=1000),
}


# ---- model ---------------------------------------------------------------------------------------------------------------

class Reflector(nn.Module):
    def __init__(self, cfg: Config, tokenizer):
        super().__init__()
        from transformers import LlamaConfig, LlavaConfig, LlavaModel, ResNetConfig
        self.cfg, self.tokenizer, self.augment = cfg, tokenizer, data.beside("augment_video")  # other light, a shift, and blur
        vision = ResNetConfig(embedding_size=cfg.tower[0], hidden_sizes=list(cfg.tower), depths=[1] * len(cfg.tower),
                              layer_type="basic", hidden_size=cfg.tower[-1])
        # first weights of 1 / sqrt(D): with the usual 0.02 attention starts out uniform, and learning to read takes 2.5 times the steps
        text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=cfg.width, intermediate_size=cfg.width * 4, num_hidden_layers=cfg.layers,
                           num_attention_heads=cfg.heads, max_position_embeddings=4096, initializer_range=cfg.width ** -0.5)
        self.llava = LlavaModel(LlavaConfig(vision_config=vision, vision_feature_layer=-1, text_config=text))
        self.head = nn.Sequential(nn.LayerNorm(cfg.width), nn.Linear(cfg.width, cfg.width // 4), nn.GELU(),
                                  nn.Linear(cfg.width // 4, 1))
        self.register_buffer("threshold", torch.tensor(0.5))

    def see(self, frames):
        """uint8 (..., 3, H, W) -> tokens (..., P, D). Computed once per frame and reused. Raises UserError on another size."""
        data.check_frames(frames, self.cfg.image_size, "reflector")
        maps = self.llava.vision_tower(frames.flatten(0, -4).float() / 127.5 - 1).last_hidden_state  # (b, C, h, w)
        tokens = rearrange(F.avg_pool2d(maps, 2), "b c h w -> b (h w) c")                            # 2 x 2 pooled, as in LLaVA-Video
        return self.llava.multi_modal_projector(tokens).unflatten(0, frames.shape[:-3])

    def read(self, tokens, instruction):
        """tokens (B, T, P, D) of the frames so far, instruction list of B str -> logit (B,)."""
        tokens = tokens[:, pick(tokens.shape[1], self.cfg.frames)]
        text = self.tokenizer([t.lower() for t in instruction], padding=True, return_tensors="pt", add_special_tokens=False)
        text, llama = text.to(tokens.device), self.llava.language_model                              # padded on the left
        x = torch.cat([llama.embed_tokens(text["input_ids"]), tokens.flatten(1, 2)], 1)
        mask = F.pad(text["attention_mask"], (0, x.shape[1] - text["input_ids"].shape[1]), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = llama(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        logit = self.head(hidden[:, -tokens.shape[2]:].mean(1)).float()[:, 0]
        return logit if self.training or self.cfg.judge == "reward_head" else torch.where(logit > 0, 1e3, -1e3)  # p is 1 or 0

    def forward(self, frames, instruction):
        """uint8 frames so far (B, T, 3, H, W), instruction list of B str -> logit (B,)."""
        return self.read(self.see(frames[:, pick(frames.shape[1], self.cfg.frames)]), instruction)

    def loss(self, frames, instructions, label):
        """BCE of the success label (B,) of frames (B, T, 3, H, W), read with the first of n `instructions`, B lists of str, and, where it
        is 1, the cross-entropy of that one among the n."""
        tokens, n = self.see(self.augment(frames, self.cfg) if self.training else frames), len(instructions[0])
        logits = self.read(tokens.repeat_interleave(n, 0), sum(instructions, [])).unflatten(0, (-1, n))
        bce, contrast = F.binary_cross_entropy_with_logits(logits[:, 0], label), -(label * logits.log_softmax(1)[:, 0]).mean()
        return bce + self.cfg.contrast * contrast, dict(bce=bce.detach(), contrast=contrast.detach())

    @torch.no_grad()
    def score(self, episode):
        """p_success at each stored frame of an episode -> (F,) numpy."""
        device = self.threshold.device
        tokens = torch.cat([self.see(part) for part in torch.from_numpy(episode.frames).to(device).split(64)])
        seen = torch.stack([tokens[:t + 1][pick(t + 1, self.cfg.frames)] for t in range(len(tokens))])      # (F, frames, P, D)
        return torch.cat([self.read(part, [episode.instruction] * len(part)).sigmoid() for part in seen.split(64)]).cpu().numpy()

    def judge(self, instruction):
        """A judge for one real episode: judge(frames (T, 3, H, W) so far, step) -> p_success, stop."""
        scores = []

        @torch.no_grad()
        def judge(frames, step):
            scores.append(float(self(torch.from_numpy(frames)[None].to(self.threshold.device), [instruction]).sigmoid()))
            return scores[-1], bool(stops(torch.tensor([scores]), self.threshold, self.cfg.min_steps, self.cfg.patience)[0, -1])
        return judge


def pick(so_far, size):
    """Indices of `size` frames uniformly over those so far, first and last included; few frames repeat."""
    return np.linspace(0, so_far - 1, size).round().astype(int)


def stops(p_success, threshold, min_steps=0, patience=1):
    """p_success (B, T) -> (B, T) bool: at t, `patience` scores in a row lie above the threshold, none of the first `min_steps`."""
    above = (p_success > threshold) & (torch.arange(p_success.shape[1], device=p_success.device) >= min_steps)
    return F.pad(above, (patience - 1, 0)).unfold(1, patience, 1).all(-1)


def finish_step(p_success, threshold, min_steps=0, patience=1):
    """p_success (B, T) -> (B,) first score at which a rollout stops, T - 1 for those that never do (World-Env: p > 0.5)."""
    hit = stops(p_success, threshold, min_steps, patience)
    return torch.where(hit.any(1), hit.float().argmax(1), p_success.shape[1] - 1)


def choose_threshold(p_success, label, min_steps=0, patience=1) -> float:
    """Scores and truth of n episodes, (n, T) padded with 0, or (n,) -> the threshold of best F0.5, where an episode counts as found if
    the frame that stops it is a success: a stop too early ruins a rollout, a late one costs a few steps. 0.5 unless both labels occur."""
    p, label = (torch.as_tensor(np.asarray(x, kind)).reshape(len(x), -1) for x, kind in ((p_success, np.float32), (label, bool)))
    if label.any(1).all() or not label.any():
        return 0.5
    grid = np.linspace(0.05, 0.95, 181)
    hits = torch.stack([stops(p, threshold, min_steps, patience) for threshold in grid])                 # (181, n, T)
    called = hits.any(-1)
    right = called & label.expand_as(hits).gather(-1, hits.float().argmax(-1, keepdim=True))[..., 0]
    f = 1.25 * right.sum(1) / (called.sum(1) + 0.25 * label.any(1).sum())
    return float(np.median(grid[(f == f.max()).numpy()]))


def load_reflector(path, device="cpu") -> Reflector:
    """A reflector from `reflector.pt`, in eval mode. Raises UserError."""
    checkpoint = data.load_checkpoint(path, "reflector", device)
    reflector = Reflector(data.from_config(Config, checkpoint["config"]), data.beside("load_tokenizer")(checkpoint["tokenizer"]))
    reflector.load_state_dict(checkpoint["model"])
    return reflector.to(device).eval()


# ---- training ------------------------------------------------------------------------------------------------------------

def make_batch(tasks, instructions, cfg, rng):
    """-> what `Reflector.loss` takes: half positives and a quarter near misses where there are any, all with the instructions of some
    other tasks after their own. `tasks`: for each task positives, near misses and negatives, lists of (episode, frame)."""
    samples = []
    for b in range(cfg.batch_size):
        positives, near, negatives = tasks[rng.integers(len(tasks))]  # half of each task: its instruction must not tell the answer
        rows = positives if positives and (b % 2 or not negatives) else near if near and b % 4 else negatives
        e, f = rows[rng.integers(len(rows))]
        others = rng.permutation([text for text in instructions if text != e.instruction])[:cfg.wrong_instructions]
        samples.append((e.frames[pick(f + 1, cfg.frames)], [e.instruction, *others], float(rows is positives)))
    frames, texts, labels = zip(*samples)
    return torch.from_numpy(np.stack(frames)), list(texts), torch.tensor(labels)


def train(cfg: Config):
    processes, path = data.processes(), data.run_dir(cfg) / "reflector.pt"
    checkpoint, finished = data.resume(path, "reflector", cfg, device := processes.device)
    if finished:
        return print(f"{path} is finished ({cfg.steps} steps); delete it to train again")
    data.require(cfg.judge in ("reward_head", "binary"), f"got --judge {cfg.judge}, expected reward_head or binary")
    torch.manual_seed(cfg.seed)
    kinds = cfg.kinds if cfg.judge == "reward_head" else ("expert",)
    episodes, held_out = data.training_episodes(cfg, cfg.image_size, cfg.demos_per_task, kinds)
    judged = [e for e in held_out if e.source == "imagined"] or held_out or episodes  # to choose the threshold on, as LOOP will use it
    instructions, tasks = sorted({e.instruction for e in episodes}), []
    for text in instructions:  # `ahead`: is the task done at this frame, and in the 32 steps after it?
        rows = [(e, f, e.success[s:s + 33]) for e in episodes if e.instruction == text for f, s in enumerate(e.frame_steps)]
        wanted = lambda ahead: ahead[0], lambda ahead: ahead.any() and not ahead[0], lambda ahead: not ahead[0]
        tasks.append([[(e, f) for e, f, ahead in rows if kind(ahead)] for kind in wanted])
    tokenizer = checkpoint["tokenizer"] if checkpoint else data.beside("train_tokenizer")()
    reflector = Reflector(cfg, data.beside("load_tokenizer")(tokenizer)).to(device)
    if cfg.tower_from and not checkpoint:
        data.beside("load_tower")(path.parent / cfg.tower_from, reflector.llava.vision_tower)  # as LLaVA starts from CLIP
    optimizer = torch.optim.AdamW([dict(params=list(reflector.parameters()), peak=cfg.lr)], lr=cfg.lr, weight_decay=0.05, fused=True)
    print(f"reflector: {sum(p.numel() for p in reflector.parameters()) / 1e6:.1f} M parameters, {len(episodes)} episodes, "
          f"{sum(len(t[0]) for t in tasks)} positive frames ({len(held_out)} episodes held out), {cfg.steps} steps")

    def loss_of(phase, step):
        reflector.train()
        batch, rank = make_batch(tasks, instructions, cfg, np.random.default_rng((cfg.seed, step))), processes.process_index
        frames, texts, label = (part[rank::processes.num_processes] for part in batch)
        return reflector.loss(frames.to(device), texts, label.to(device))

    def choose_where_training_did_not_look(step):
        if step == cfg.steps and cfg.judge == "reward_head":
            reflector.eval()
            pad = lambda rows: nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)
            p, label = pad([reflector.score(e) for e in judged]), pad([e.success[e.frame_steps] for e in judged])
            reflector.threshold.fill_(choose_threshold(p, label, cfg.min_steps, cfg.patience))
        return dict(threshold=reflector.threshold)

    data.fit(cfg, "reflector", reflector, optimizer, checkpoint, (cfg.steps,), loss_of, choose_where_training_did_not_look,
             tokenizer=tokenizer)
    if processes.is_main_process:  # the one that chose it
        print(f"threshold {float(reflector.threshold):.2f} from {len(judged)} {'held-out' if held_out else 'training'} episodes")


if __name__ == "__main__":
    data.command_line(train, PRESETS, __doc__)
