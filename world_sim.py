"""The world simulator: p(next frames, next proprio | memory frames, proprio, action chunk), a latent video diffusion model.

The recipe of EnerVerse-AC (EVAC, arXiv 2505.09723), which World-Env builds on, at a size two CPU cores can train:
  every frame is encoded by a VAE; memory = M latents picked sparsely from the past: first, 1/3, 2/3, last
  the chunk's F frames are denoised together, the memory frames beside them; of each frame the U-Net gets the noisy latent, the known
    one (of the chunk the last of the memory), a mask, and an *action map*: the gripper's pose projected with the camera onto the image
    plane, black background, opening as brightness; and the K actions, with the change of pose each leads to, as tokens
  v-prediction, zero terminal SNR, DDIM with trailing steps; so that errors do not pile up, training adds noise to the memory, or lets
    the simulator imagine the chunks before the one that it learns from
  proprio: an analytic step of the OSC controller, corrected by what is learned (`Dynamics`)
Chunk after chunk, the last predicted frame and proprio go back to the policy, the latents into the memory: no physics.
Dims: B batch, K chunk_size, F frames_per_chunk, M memory, C latent channels, h w latent size, H W pixels.

Differs from EVAC: no CLIP tokens, no ray maps; `paper` starts from ModelScope's text-to-video model. `tiny` and `smoke` stack the frames
as channels of a 2-D U-Net (7-20 times cheaper than a video U-Net on a CPU), the actions in its time embedding; `tiny` and `base` denoise
the change since the last memory frame: most of the scene stands still. `tiny` predicts the clean sample, copies what moves from the
memory, has a linear VAE, and one frame per chunk, all that the policy sees.
Reads: demonstrations (--demos), runs/<run>/explore/.  Writes: runs/<run>/world_sim.pt, world_sim.jsonl, world_sim_*.png.

  python world_sim.py --demos data/
"""
from dataclasses import dataclass

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
    seed: int = 0  # of weights, batches and noise
    demos_per_task: int = 5  # expert demonstrations used
    kinds: tuple[str, ...] = ("expert", "explore")  # training data; the paper's ablation is expert alone
    image_size: int = 96  # H = W in pixels, as the policy's
    chunk_size: int = 8  # K, actions per prediction, as the policy's
    frames_per_chunk: int = 1  # F, predicted at equal distances, the last at the chunk's end; EVAC: K
    memory: int = 4  # M, frames the prediction sees: first, sparse ones between, last
    pretrained: str = ""  # name or directory of a published text-to-video model; its sizes are preset paper's
    patch: int = 8  # pixels per side folded into channels before the VAE
    vae_channels: tuple[int, ...] = ()  # per level of a convolutional VAE, each after the first halving the size; empty: linear VAE
    latent_channels: int = 32  # C
    video_unet: bool = False  # U-Net over frames with attention to action tokens (EVAC) instead of 2-D with frames as channels
    channels: tuple[int, ...] = (64, 128)  # of the denoising U-Net, per level
    hidden: int = 256  # width of action tokens (or their embedding) and of `Dynamics`
    bf16: bool = False  # run the U-Net in bfloat16 autocast; for a GPU
    memory_noise: float = 0.2  # largest standard deviation of the noise on memory latents in training
    own_chunks: int = 6  # in the end, up to so many chunks that the simulator imagined itself come before the one it learns from
    condition_dropout: float = 0.0  # share of training samples without action map, and without actions
    residual: bool = True  # denoise the change since the last memory frame, not the frame
    warp: bool = True  # the 2-D U-Net also copies from the memory: each frame as it is and moved with the gripper, bent by a flow
    pure_noise: float = 0.9  # share of training samples that start from noise alone, as sampling in one step does
    prediction: str = "sample"  # what the U-Net outputs, in diffusers' words: sample (easy where nothing moves) or v_prediction (EVAC)
    sampling_steps: int = 1  # DDIM steps; EVAC: 27
    vae_steps: int = 0  # gradient steps of a convolutional VAE; the linear one is solved in closed form
    dynamics_steps: int = 6000  # then gradient steps of `Dynamics`, on single control steps, milliseconds each
    steps: int = 4500  # then gradient steps of the U-Net
    batch_size: int = 16  # B, chunks of all processes together; frames per VAE step
    lr: float = 1e-3  # AdamW, linear warm-up, cosine decay, for each of these phases
    save_every: int = 500  # steps between checkpoints, what a kill can cost, and between looks at held-out episodes


EVAC = dict(frames_per_chunk=8, patch=1, vae_channels=(128, 256, 512, 512), latent_channels=4, video_unet=True, bf16=True,
            condition_dropout=0.1, warp=False, pure_noise=0.3, prediction="v_prediction", save_every=1000)
PRESETS = {
    "tiny": Config(),
    "smoke": Config(preset="smoke", demos_per_task=2, image_size=32, frames_per_chunk=2, patch=4, vae_channels=(16, 16), latent_channels=4,
                    channels=(16, 32), hidden=32, own_chunks=1, condition_dropout=0.2, warp=False, prediction="v_prediction",
                    sampling_steps=2, vae_steps=20, dynamics_steps=20, steps=20, batch_size=8, save_every=10),
    "base": Config(preset="base", image_size=128, **EVAC | dict(vae_channels=(64, 128, 256, 256), frames_per_chunk=2),
                   channels=(128, 256, 256), hidden=512, sampling_steps=8, vae_steps=10000, steps=30000, lr=2e-4),
    "paper": Config(preset="paper", image_size=224, **EVAC | dict(pure_noise=0), pretrained="ali-vilab/text-to-video-ms-1.7b",
                    channels=(320, 640, 1280, 1280), hidden=1024, residual=False, sampling_steps=27, steps=100000, batch_size=64, lr=5e-5),
}


# ---- model ---------------------------------------------------------------------------------------------------------------

@dataclass
class Memory:  # what a batch of rollouts has seen so far
    latents: torch.Tensor  # (B, n, C, h, w) every frame since the start, in order
    camera: torch.Tensor   # (B, 3, 4) world -> image, `Task.camera`
    velocity: torch.Tensor  # (B, 8) change of proprio in the last control step
    action: torch.Tensor    # (B, 7) the last one

    def select(self, rows):
        return Memory(self.latents[rows], self.camera[rows], self.velocity[rows], self.action[rows])


class Dynamics(nn.Module):
    """Proprio after each action: the OSC controller as a damped spring, plus what is learned: how the spring's axes are coupled at a pose,
    and a residual. Lengths in m, angles in rad. The controller lags: where the arm goes next depends on how fast it moves and on what it
    was told before."""

    def __init__(self, chunk_size, hidden):
        super().__init__()
        self.chunk_size = chunk_size
        self.gain = nn.Parameter(torch.tensor([[0.6 / chunk_size] * 6 + [0.3 / chunk_size] * 2, [0.1] * 8, [0.02] * 6 + [0.0] * 2]))
        self.coupling, self.residual = (nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                                      nn.Linear(hidden, outputs)) for inputs, outputs in ((8, 8 * 24), (32, 8)))
        for p in (*self.coupling[-1].parameters(), *self.residual[-1].parameters()):
            nn.init.zeros_(p)
        for name in ("mean", "std", "scale"):  # of proprio, and size of its change over a chunk
            self.register_buffer(name, torch.full((8,), float(name != "mean")))

    def step(self, proprio, velocity, previous, action):
        """(B, 8), (B, 8), (B, 7), (B, 7) -> (B, 8): x' - x = gain . [way of a chunk at this velocity, ways to the goals of a_t and a_{t-1}]
        + learned. What goes in is bounded, lest errors feed on errors."""
        ways = torch.stack([self.chunk_size * velocity, goal(proprio, action), goal(proprio, previous)], 1)              # (B, 3, 8)
        ways, pose = (ways / self.scale).clamp(-10, 10), ((proprio - self.mean) / self.std).clamp(-3, 3)
        learned = torch.einsum("b i j, b j -> b i", self.coupling(pose).unflatten(1, (8, 24)), f := ways.flatten(1))
        return self.scale * ((self.gain * ways).sum(1) + (learned + self.residual(torch.cat([pose, f], 1))) / self.chunk_size)

    def forward(self, proprio, velocity, previous, actions):
        """(B, 8), (B, 8), (B, 7), (B, T, 7) -> (B, T, 8)"""
        path = []
        for action in actions.unbind(1):
            velocity = self.step(proprio, velocity, previous, action)
            proprio, previous = proprio + velocity, action
            path.append(proprio)
        return torch.stack(path, 1)


def goal(proprio, action):
    """(B, 8), (B, 7) -> (B, 8): how far the controller is told to go; +-1 is 5 cm, 0.5 rad in the world frame, fingers closed or open."""
    _, rotation, fingers = proprio.split((3, 3, 2), -1)
    opened = torch.where(action[:, 6:] < 0, 0.04, 0.0) * fingers.new_tensor([1.0, -1.0])
    return torch.cat([0.05 * action[:, :3], turn(rotation, 0.5 * action[:, 3:6]), opened - fingers], -1)


def turn(axis_angle, delta):
    """Change of `axis_angle` (B, 3) when a small world-frame rotation `delta` (B, 3) follows: the inverse left Jacobian of SO(3)."""
    angle = axis_angle.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    axis = axis_angle / angle
    c = angle / 2 / torch.tan(angle / 2)
    return c * delta + (1 - c) * (axis * delta).sum(-1, keepdim=True) * axis - angle / 2 * torch.linalg.cross(axis, delta)


def project(proprio, camera):
    """Gripper poses (B, n, 8), cameras (B, 3, 4) -> (B, n, 2, 4): u, v in [-1, 1] of the grip site and the tips of its axes (10 cm)."""
    x, y, z, o = *proprio[..., 3:6].unbind(-1), torch.zeros_like(proprio[..., 0])
    rotation = torch.matrix_exp(rearrange(torch.stack([o, -z, y, z, o, -x, -y, x, o], -1), "b n (i j) -> b n i j", i=3))
    points = proprio[..., :3, None] + F.pad(0.1 * rotation, (1, 0))                                       # (B, n, 3, 4)
    uvd = camera[:, None, :, :3] @ points + camera[:, None, :, 3:]
    return uvd[..., :2, :] / uvd[..., 2:, :] * 2 - 1


def action_map(points, fingers, size):
    """Draw what `project` gave, with fingers (B, n, 2) -> (B, n, 5, size, size): a soft dot for each point, and the first again times
    the opening. After EVAC's action map; black where there is no gripper."""
    cells = (torch.arange(size, device=points.device) + 0.5) / size * 2 - 1
    du, dv = (points[..., None] - cells).unbind(2)                                                        # (B, n, 4, size)
    dots = torch.exp(-(dv[..., :, None] ** 2 + du[..., None, :] ** 2) / (2 * (4 / size) ** 2))            # (B, n, 4, size, size)
    return torch.cat([dots, dots[:, :, :1] * ((fingers[..., :1] - fingers[..., 1:]) / 0.08)[..., None, None]], 2)


class StackedUNet(nn.Module):
    """A 2-D U-Net with the frames of memory and chunk as channels of one picture; the actions join its time embedding.
    80 channels are an action map, 5 dots at 4 x 4 points per latent cell; 24 say how to copy one known frame, see `WorldSim.copy`."""

    def __init__(self, cfg: Config, size):
        super().__init__()
        from diffusers import UNet2DModel
        C, chunk, levels = cfg.latent_channels, cfg.frames_per_chunk, len(cfg.channels)
        outputs = torch.zeros(chunk, C + 24 * (cfg.memory + 1) * cfg.warp)
        self.unet = UNet2DModel(in_channels=(chunk + cfg.memory) * C + 80 * (chunk + 1) + 16, out_channels=outputs.numel(),
                                block_out_channels=cfg.channels, layers_per_block=1, norm_num_groups=8,
                                down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels,
                                class_embed_type="identity", resnet_time_scale_shift="scale_shift")
        self.embed = nn.Sequential(nn.Linear(8 + 15 * cfg.chunk_size, cfg.hidden), nn.SiLU(), nn.Linear(cfg.hidden, 4 * cfg.channels[0]))
        self.position = nn.Parameter(torch.randn(16, size, size))  # a convolution does not know where it is
        if cfg.warp:  # begin with the last memory frame as it is: its mask is the largest
            outputs[:, -32:-16] = 3
            nn.init.zeros_(self.unet.conv_out.weight)
            self.unet.conv_out.bias.data.copy_(outputs.flatten())

    def forward(self, noisy, timestep, known, maps, steps, proprio):
        """(B, F, C, h, w), (B,), known (B, M + F, C, h, w), maps (B, M + F, 80, h, w), steps (B, K, 15), (B, 8) -> (B, F, C', h, w), C' = C
        without `warp`, else C + 24 (M + 1)"""
        chunk = noisy.shape[1]  # known repeats its last memory frame over the chunk, maps are black before it
        x = [part.flatten(1, 2) for part in (noisy, known[:, :-chunk], maps[:, -chunk - 1:])]
        x = torch.cat([*x, self.position.expand(len(noisy), -1, -1, -1)], 1)
        return self.unet(x, timestep, class_labels=self.embed(torch.cat([proprio, steps.flatten(1)], 1))).sample.unflatten(1, (chunk, -1))


class WorldSim(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        from diffusers import DDIMScheduler
        data.require(not cfg.warp or (cfg.prediction == "sample" and cfg.residual and not cfg.video_unet), "--warp gives the change of a "
                     "frame: it takes --prediction sample, --residual and --no-video-unet; or pass --no-warp")
        self.cfg, gap = cfg, cfg.chunk_size // cfg.frames_per_chunk
        self.size = cfg.image_size // cfg.patch // 2 ** max(0, len(cfg.vae_channels) - 1)
        self.frames_at = slice(gap - 1, None, gap)  # the actions after which frames are predicted
        self.vae = data.beside("vae")(cfg, 3 * cfg.patch ** 2, self.size)
        self.denoiser = data.beside("video_unet")(cfg) if cfg.video_unet else StackedUNet(cfg, self.size)
        self.dynamics = Dynamics(cfg.chunk_size, cfg.hidden)
        self.scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                       prediction_type=cfg.prediction, rescale_betas_zero_snr=True, timestep_spacing="trailing")
        # change: z_f - z_last; its weight in the loss: how much of the picture a channel moves
        for name in ("latent_mean", "latent_std", "change_std", "change_weight"):
            self.register_buffer(name, torch.full((cfg.latent_channels, 1, 1), float(name != "latent_mean")))

    def fold(self, frames):
        """(B, 3, H, W), 0 to 255 -> [-1, 1] (B, 3 p p, H/p, W/p). Raises UserError on frames of another size."""
        data.check_frames(frames, self.cfg.image_size, "simulator")
        return rearrange(frames.float() / 127.5 - 1, "b c (h p) (w q) -> b (c p q) h w", p=self.cfg.patch, q=self.cfg.patch)

    def to_latents(self, frames):  # (B, 3, H, W), 0 to 255 -> (B, C, h, w), standardised
        return (self.vae.encode(self.fold(frames)) - self.latent_mean) / self.latent_std

    def to_frames(self, latents):  # (..., C, h, w) -> (..., 3, H, W), about 0 to 255
        folded, p = self.vae.decode(latents.flatten(0, -4) * self.latent_std + self.latent_mean), self.cfg.patch
        return (rearrange(folded, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p).unflatten(0, latents.shape[:-3]) + 1) * 127.5

    @torch.no_grad()
    def encode(self, frames):  # uint8 (..., 3, H, W) -> (..., C, h, w)
        return torch.cat([self.to_latents(part) for part in frames.flatten(0, -4).split(64)]).unflatten(0, frames.shape[:-3])

    def decode(self, latents):  # (..., C, h, w) -> uint8 (..., 3, H, W), 255 levels like a real frame
        return self.to_frames(latents).round().clamp(0, 255).to(torch.uint8)

    def remember(self, frames, arm) -> Memory:  # start rollouts at frames uint8 (B, 3, H, W); `arm` says how it moves there, see `motion`
        return Memory(self.encode(frames)[:, None], arm["camera"], arm["velocity"], arm["previous"])

    def condition(self, recalled, proprio, actions, path, camera):
        """Memory latents (B, M, C, h, w), proprio (B, 8), actions (B, K, 7), path (B, K, 8) -> what `StackedUNet.forward` takes, and
        how far the gripper moves on the image until each frame (B, F, 2)."""
        cfg, shown = self.cfg, torch.cat([proprio[:, None], path[:, self.frames_at]], 1)
        seen = project(shown, camera)
        maps = rearrange(action_map(seen, shown[..., 6:], 4 * self.size), "b n c (h p) (w q) -> b n (c p q) h w", p=4, q=4)
        maps = F.pad(maps, (0, 0) * 3 + (cfg.memory - 1, 0))  # black on all memory frames but the last
        steps = torch.cat([actions, (path - proprio[:, None]) / self.dynamics.scale], -1)
        if self.training:
            keep = torch.rand(2, len(steps), 1, 1, device=steps.device) >= cfg.condition_dropout
            maps, steps = maps * keep[0][..., None, None], steps * keep[1]
        known = torch.cat([recalled, repeat(recalled[:, -1], "b c h w -> b f c h w", f=cfg.frames_per_chunk)], 1)
        return known, maps, steps, (proprio - self.dynamics.mean) / self.dynamics.std, (seen[:, 1:] - seen[:, :1])[..., 0]

    def denoise(self, noisy, timestep, *conditions):  # -> `prediction` for noisy (B, F, C, h, w) at timestep (B,)
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.cfg.bf16):
            output = self.denoiser(noisy, timestep, *conditions[:-1]).float()
        return self.copy(output, conditions[0][:, :self.cfg.memory], conditions[-1]) if self.cfg.warp else output

    def copy(self, output, recalled, moved):
        """Compose the chunk's frames of the n = M + 1 that are known: the memory (B, M, C, h, w), and its last once more, moved with the
        gripper by (B, F, 2). `output` (B, F, C + 24 n, h, w) holds a change, for each of the n a flow, 2 x 2 per cell, and a mask, 4 x 4
        per cell -> (B, F, C, h, w). What two cores cannot learn to draw stays sharp (as in CDNA, arXiv 1605.07157)."""
        cfg, n, (B, chunk) = self.cfg, self.cfg.memory + 1, output.shape[:2]
        change, flow, mask = output.flatten(0, 1).split((cfg.latent_channels, 8 * n, 16 * n), 1)
        enlarge = lambda x, times: F.interpolate(F.pixel_shuffle(x, times), (cfg.image_size,) * 2, mode="bilinear")
        with torch.no_grad():
            known = self.to_frames(torch.cat([recalled, recalled[:, -1:]], 1)).repeat_interleave(chunk, 0).flatten(0, 1)
        stay = F.affine_grid(torch.eye(2, 3, device=known.device)[None], known[:1].shape, align_corners=False)
        flow = rearrange(0.1 * enlarge(flow, 2), "b (n d) h w -> (b n) h w d", d=2)  # -1 to 1 is the image
        moved = F.pad(moved.flatten(0, 1)[:, None], (0, 0, n - 1, 0)).flatten(0, 1)[:, None, None]
        bent = F.grid_sample(known, stay + flow - moved, padding_mode="border", align_corners=False).unflatten(0, (-1, n))
        mixed = self.to_latents((bent * enlarge(mask, 4).softmax(1)[:, :, None]).sum(1)).unflatten(0, (B, chunk))
        return change.unflatten(0, (B, chunk)) + (mixed - recalled[:, -1:]) / self.change_std

    def sample(self, recalled, conditions, steps, generator=None):  # -> latents (B, F, C, h, w) of the chunk's frames, by DDIM
        changes = torch.randn(len(recalled), self.cfg.frames_per_chunk, *recalled.shape[2:], generator=generator, device=recalled.device)
        self.scheduler.set_timesteps(steps, device=recalled.device)
        for t in self.scheduler.timesteps:
            changes = self.scheduler.step(self.denoise(changes, t.expand(len(changes)), *conditions), t, changes).prev_sample
        return recalled[:, -1:] * self.cfg.residual + changes * self.change_std

    @torch.no_grad()
    def predict(self, memory: Memory, proprio, action_chunk, generator=None):
        """Imagine one chunk: proprio (B, 8), LIBERO actions (B, K, 7) -> frames (B, F, 3, H, W) uint8, proprio (B, 8) at its end.
        `memory` is extended in place. Every rollout draws its own noise. Raises UserError on another action width or chunk size."""
        data.require(action_chunk.shape[1:] == (self.cfg.chunk_size, 7), f"an action chunk has shape {tuple(action_chunk.shape[1:])}, this "
                     f"simulator was trained on {(self.cfg.chunk_size, 7)}; train it again with --chunk-size {action_chunk.shape[1]}")
        path = self.dynamics(proprio, memory.velocity, memory.action, action_chunk)
        recalled = memory.latents[:, sparse_memory(memory.latents.shape[1], self.cfg.memory)]
        conditions = self.condition(recalled, proprio, action_chunk, path, memory.camera)
        latents = self.sample(recalled, conditions, self.cfg.sampling_steps, generator)
        memory.latents = torch.cat([memory.latents, latents], 1)
        memory.velocity, memory.action = path[:, -1] - path[:, -2], action_chunk[:, -1]
        return self.decode(latents), path[:, -1]

    def loss(self, stages):
        """Chunks in a row (`make_batch`); the last is learned, those before are imagined: its memory holds the simulator's own mistakes.
        Of each recalled (B, M, C, h, w); own (B, M), which imagined frame that is, negative for a real one; target (B, F, C, h, w)."""
        imagined = []
        for batch in stages:
            recalled, arm = batch["recalled"], [batch[key] for key in ("proprio", "velocity", "previous", "actions")]
            for number, frame in enumerate(imagined):
                recalled = torch.where((batch["own"] == number)[..., None, None, None], frame[:, None], recalled)
            if batch is stages[-1]:
                level = torch.rand(*recalled.shape[:2], 1, 1, 1, device=recalled.device) * 2 - 1  # half stay clean (EVAC)
                recalled = recalled + level.clamp(min=0) * self.cfg.memory_noise * torch.randn_like(recalled)
            with torch.set_grad_enabled(batch is stages[-1] and torch.is_grad_enabled()):
                conditions = self.condition(recalled, arm[0], arm[3], self.dynamics(*arm).detach(), batch["camera"])
                imagined += self.sample(recalled, conditions, 1).unbind(1) if batch is not stages[-1] else []
        changes = (batch["target"] - recalled[:, -1:] * self.cfg.residual) / self.change_std
        u, epsilon = torch.rand(2, len(changes), device=changes.device), torch.randn_like(changes)
        timestep = torch.where(u[0] < self.cfg.pure_noise, 999, (u[1] * 1000).long())
        output = self.denoise(self.scheduler.add_noise(changes, epsilon, timestep), timestep, *conditions)
        target = changes if self.cfg.prediction == "sample" else self.scheduler.get_velocity(changes, epsilon, timestep)
        loss = ((output - target) ** 2 * self.change_weight).mean()
        return loss, dict(video=loss.detach())

    def dynamics_loss(self, batch):
        """Mean error of proprio after each action, in units of its change over a chunk; squared, few collisions would outweigh the rest."""
        path = self.dynamics(*(batch[key] for key in ("proprio", "velocity", "previous", "actions")))
        loss = ((path - batch["path"]) / self.dynamics.scale).abs().mean()
        return loss, dict(dynamics=loss.detach())


def sparse_memory(n, size):  # indices of `size` frames out of the n so far: 0, n/3, 2n/3, last for 4 (EVAC)
    return [i * n // (size - 1) for i in range(size - 1)] + [n - 1]


def load_world_sim(path, device="cpu") -> WorldSim:
    """A simulator from `world_sim.pt`, in eval mode. Raises UserError."""
    checkpoint = data.load_checkpoint(path, "world_sim", device)
    world_sim = WorldSim(data.from_config(Config, checkpoint["config"])).to(device)
    world_sim.load_state_dict(checkpoint["model"])
    return world_sim.eval()


@torch.no_grad()
def replay(world_sim, episodes, actions=None):
    """Imagine `episodes` from their first frames under their actions, or others (a list of (T, 7)), all at once -> frames
    (B, 1 + F * chunks, 3, H, W) uint8, proprio (B, 1 + chunks, 8). Short ones stand still at their end."""
    K, device = world_sim.cfg.chunk_size, world_sim.latent_mean.device
    actions = [torch.from_numpy(x) for x in actions or [e.actions for e in episodes]]
    steps, hold = -(-max(map(len, actions)) // K) * K, torch.tensor([0, 0, 0, 0, 0, 0, 1.0])
    actions = torch.stack([torch.cat([x, (x[-1:] * hold).repeat(steps - len(x), 1)]) for x in actions]).to(device)
    arm, frames = motion([(e, 0) for e in episodes], 0, device), [torch.from_numpy(np.stack([e.frames[:1] for e in episodes])).to(device)]
    memory, proprio = world_sim.remember(frames[0][:, 0], arm), [arm["proprio"]]
    for chunk in actions.split(K, 1):
        imagined, after = world_sim.predict(memory, proprio[-1], chunk)
        frames.append(imagined)
        proprio.append(after)
    return torch.cat(frames, 1).cpu().numpy(), torch.stack(proprio, 1).cpu().numpy()


def open_loop(world_sim, episode):  # -> frames (1 + F * chunks, 3, H, W) uint8
    return replay(world_sim, [episode])[0][0]


# ---- training data -------------------------------------------------------------------------------------------------------

def training_rows(episodes, cfg):
    """[(episode, step, frames)] of every chunk: numbers of its frames and all before, counted over all episodes; none is missing."""
    rows, offset, gap = [], 0, cfg.chunk_size // cfg.frames_per_chunk
    for episode in episodes:
        index = {int(step): offset + i for i, step in enumerate(episode.frame_steps)}
        offset += len(episode.frame_steps)
        for t in (t for t in index if t + cfg.chunk_size <= len(episode.actions)):
            frames = [index.get(step) for step in range(t % gap, t + cfg.chunk_size + 1, gap)]
            rows += [(episode, t, frames)] if None not in frames else []
    return rows


def arrival(episode, t):  # -> (15,) change of proprio in the control step that led to state t, and the action of that step
    return np.append(episode.proprio[t] - episode.proprio[t - 1], episode.actions[t - 1]) if t else episode.before


def motion(chunks, length, device):
    """What the arm does before and in `length` steps from each of chunks [(episode, step)], for `Dynamics` and the conditions."""
    stack = lambda values: torch.from_numpy(np.stack(values).astype(np.float32)).to(device)
    before = stack([arrival(e, t) for e, t in chunks])
    return dict(proprio=stack([e.proprio[t] for e, t in chunks]), camera=stack([e.camera for e, _ in chunks]),
                velocity=before[:, :8], previous=before[:, 8:],
                actions=stack([e.actions[t:t + length] for e, t in chunks]),
                path=stack([e.proprio[t + 1:t + 1 + length] for e, t in chunks]))


def make_batch(rows, latents, cfg, rng, device, size, before=0):
    """`before` + 1 chunks in a row for `WorldSim.loss`, the last a sample of `rows`; a rollout, and so a history, may begin anywhere."""
    K, chunk, stages = cfg.chunk_size, cfg.frames_per_chunk, []
    before = min(before, (max(len(f) for *_, f in rows) - 1) // chunk - 1)  # as many as the longest episode has
    rows = [row for row in rows if len(row[2]) > (before + 1) * chunk]
    picked = [rows[i] for i in rng.integers(len(rows), size=size)]
    frames = [f[-rng.integers((before + 1) * chunk + 1, len(f) + 1):] for *_, f in picked]
    for stage in range(before + 1):
        seen = [len(f) - (before - stage + 1) * chunk for f in frames]  # frames up to this chunk, the last stage * chunk of them imagined
        at = [sparse_memory(n, cfg.memory) for n in seen]
        stages.append(motion([(e, t - (before - stage) * K) for e, t, _ in picked], K, device))
        stages[-1] |= dict(recalled=latents[torch.tensor([[f[i] for i in pick] for f, pick in zip(frames, at)])],
                           own=torch.tensor([[i - n + stage * chunk for i in pick] for n, pick in zip(seen, at)], device=device),
                           target=latents[torch.tensor([f[n:n + chunk] for f, n in zip(frames, seen)])])
    return stages


@torch.no_grad()
def prepare(world_sim, frames, rows):
    """After the VAE phase: fit a linear one, measure the statistics that standardise latents, changes and proprio."""
    cfg = world_sim.cfg
    world_sim.vae.fit(world_sim.fold(frames[::max(1, len(frames) // 1000)]))
    spread = lambda x: (x.mean((0, 2, 3), keepdim=True)[0], x.std((0, 2, 3), keepdim=True)[0])
    world_sim.latent_mean, world_sim.latent_std = spread(world_sim.encode(frames[::4]))
    if cfg.residual:
        before, after = ([f[at] for *_, f in rows[::max(1, len(rows) // 500)]] for at in (-1 - cfg.frames_per_chunk, -1))
        world_sim.change_std = spread(world_sim.encode(frames[after]) - world_sim.encode(frames[before]))[1]
        world_sim.change_weight = world_sim.change_std * world_sim.latent_std / (world_sim.change_std * world_sim.latent_std).mean()
    proprio = np.stack([e.proprio[t] for e, t, *_ in rows])
    moved = np.stack([e.proprio[t + cfg.chunk_size] for e, t, *_ in rows]) - proprio
    for name, value in dict(mean=proprio.mean(0), std=proprio.std(0) + 1e-3, scale=moved.std(0) + 1e-4).items():
        getattr(world_sim.dynamics, name).copy_(torch.from_numpy(value))


def train(cfg: Config):
    processes, run = data.processes(), data.run_dir(cfg)
    path, phases, device = run / "world_sim.pt", (cfg.vae_steps, cfg.dynamics_steps, cfg.steps), processes.device
    checkpoint, finished = data.resume(path, "world_sim", cfg, device)
    if finished:
        return print(f"{path} is finished ({sum(phases)} steps); delete it to train again")
    torch.manual_seed(cfg.seed)
    episodes, held_out = data.training_episodes(cfg, cfg.image_size, cfg.demos_per_task, cfg.kinds)
    frames, rows = torch.from_numpy(np.concatenate([e.frames for e in episodes])).to(device), training_rows(episodes, cfg)
    moves, gap = [(e, t) for e in episodes for t in range(len(e.actions))], cfg.chunk_size // cfg.frames_per_chunk
    useless = {e.source for e in episodes} - {e.source for e, *_ in rows}
    data.require(not useless, f"no {' and no '.join(sorted(useless))} episode has {cfg.chunk_size} actions and a frame every {gap} of "
                 f"them, as it needs; record longer ones, or evaluate.py --explore --frame-every {gap}")
    world_sim, latents, looks = WorldSim(cfg).to(device), [], (held_out or episodes)[::max(1, len(held_out or episodes) // 3)][:3]
    if cfg.pretrained and not checkpoint:
        data.beside("load_text_to_video")(world_sim)
    optimizer = torch.optim.AdamW([dict(params=list(world_sim.parameters()), peak=cfg.lr)], lr=cfg.lr, weight_decay=0.01, fused=True)
    print(f"world_sim: {sum(p.numel() for p in world_sim.parameters()) / 1e6:.1f} M parameters, {len(episodes)} episodes, {len(frames)} "
          f"frames, {len(rows)} chunks ({len(held_out)} episodes held out), {sum(phases)} steps")

    def loss_of(phase, step):
        world_sim.train()
        torch.manual_seed((cfg.seed * 1_000_003 + step) * 64 + processes.process_index)  # every process its own noise
        rng = np.random.default_rng((cfg.seed, step, processes.process_index))
        if phase == 0:
            return world_sim.vae.loss(world_sim.fold(frames[rng.integers(len(frames), size=cfg.batch_size).tolist()]))
        if step == cfg.vae_steps:
            prepare(world_sim, frames, rows)
        if phase == 1:
            return world_sim.dynamics_loss(motion([moves[i] for i in rng.integers(len(moves), size=512)], 1, device))
        latents[:] = latents or [world_sim.encode(frames)]
        own = rng.integers(1 + np.ceil(cfg.own_chunks * (step - cfg.vae_steps - cfg.dynamics_steps) / cfg.steps))  # more and more
        return world_sim.loss(make_batch(rows, latents[0], cfg, rng, device, -(-cfg.batch_size // processes.num_processes), own))

    @torch.no_grad()
    def look(step):  # at held-out episodes: the loss of their chunks, and pictures
        if step <= cfg.vae_steps + cfg.dynamics_steps:
            return {}
        world_sim.eval()
        for episode, imagined in zip(looks, replay(world_sim, looks)[0][:, ::cfg.frames_per_chunk]):
            data.beside("save_strip")(run / f"world_sim_{episode.task}_{episode.index}.png", episode, imagined, cfg.chunk_size)
        seen = world_sim.encode(torch.from_numpy(np.concatenate([e.frames for e in looks])).to(device))
        torch.manual_seed(0)
        return dict(held_out=world_sim.loss(make_batch(training_rows(looks, cfg), seen, cfg, np.random.default_rng(0), device, 64))[0])

    data.fit(cfg, "world_sim", world_sim, optimizer, checkpoint, phases, loss_of, look)


if __name__ == "__main__":
    data.command_line(train, PRESETS, __doc__)
