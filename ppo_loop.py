"""LOOP: leave-one-out PPO on rollouts imagined by the world simulator, judged by the reflector (World-Env, arXiv 2509.24948).

For each of G start states, N rollouts:  a_t ~ policy;  o_{t+1} ~ world_sim(o_t, a_t);  p_t = reflector(o_1..o_t)
  a rollout ends where the reflector is sure (p_t > threshold, twice in a row), or at the horizon; its one reward is R_n = p there
  A_n = R_n - 1/(N-1) * sum_{m != n} R_m                           leave-one-out (RLOO), no division by the standard deviation
  r_t = p_new(a_t | o_t) / p_old(a_t | o_t)                        one ratio per control step, 7 Laplace dimensions multiplied
  L = - ppo_weight * mean_n mean_{t <= t_end,n} min(r_t A_n, clip(r_t, 1 - eps, 1 + eps) A_n)    eps = 0.1, one epoch
      + sft_weight * mean |a_demo - loc|        samples of SFT beside the rollouts, as in PPO-ptx (arXiv 2203.02155)
Only the policy learns; no physics, no simulator, no value function, no KL term. N = 8 and eps = 0.1 are the paper's.
Dims: G start states, N rollouts each, R = G * N, C chunks, K chunk_size, T = C * K control steps, H W pixels.

`python ppo_loop.py --tasks goal` runs the whole method: every stage without a checkpoint is trained first, in order, then LOOP, then
SFT and RL policy are compared in real LIBERO on the same official initial states.

Differs from the paper: `tiny` trains language model and heads in full at one learning rate (no LoRA), the vision tower stays frozen;
rollouts are short and start on the way to a success, because what is imagined drifts off (as in MBPO, arXiv 1906.08253), only in tasks
that exploration has solved; the learning rate rises and falls; the demonstrations stay in the loss, without which a policy this small
learns what pleases simulator and reflector, and forgets the rest (README).

`accelerate launch ppo_loop.py` splits the starts of LOOP over processes; the stages before it have scripts of their own.
Reads: everything the other scripts write.
Writes: runs/<run>/policy_rl.pt, ppo_loop.jsonl, real_success.jsonl, results.json, report.json, videos/.

  python ppo_loop.py --tasks goal
"""
import json
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils import gather_object, reduce
from einops import rearrange, repeat
from tqdm import trange

import data
import evaluate
import policy as policy_script
import reflector as reflector_script
import world_sim as world_sim_script


@dataclass
class Config:
    tasks: str = "goal"  # suite or choice of tasks: goal, object, spatial, long, all, goal:0,3,7, goal:1+object:2
    demos: str = "data"  # directory with LIBERO HDF5 files, searched recursively
    run: str = ""  # name below runs/; empty: tasks and preset, goal-tiny
    preset: str = "tiny"  # smoke, tiny or base, for every stage; other flags override it
    seed: int = 0  # of every stage
    env: str = "world_sim"  # where rollouts happen: world_sim, or libero with its own success as reward, as in RIPT-VLA
    explore: bool = True  # exploration episodes for simulator, reflector and starts; --no-explore: the paper's ablation
    judge: str = "reward_head"  # or binary, the paper's ablation, see reflector.py
    iterations: int = 60  # collect rollouts, update, repeat
    starts: int = 24  # G, start states per iteration; the paper's batch of 4
    rollouts: int = 8  # N, rollouts per start state
    micro_starts: int = 6  # imagined at once; 48 rollouts stay in a CPU's caches, a GPU wants more
    keyframe_starts: int = 90  # control steps: rollouts start at most so long before a success, and last as long
    horizon: float = 0.8  # with `--keyframe-starts 0` they start from first frames and last up to this fraction of an episode
    noise_scale: float = 3.0  # the Laplace scale times this, in sampling and in density; RIPT-VLA: 5, the paper: none
    min_log_scale: float = -3.0  # floor of the log-scale, before that, whatever SFT's was; RIPT-VLA: -2
    clip_eps: float = 0.1  # of the PPO ratio
    minibatch: int = 64  # rollouts per optimizer step
    micro_batch: int = 8  # rollouts per backward pass, gradients accumulated
    lr: float = 2e-4  # peak, language model and projectors; 0: only the heads learn; the paper: 1e-4 on LoRA
    lr_heads: float = 2e-4  # peak, action and scale head; the paper: 1e-5
    warmup: int = 10  # iterations in which the learning rate rises, because Adam's first steps are full ones; it ends at 0
    train_scale: bool = True  # the scale head too; RIPT-VLA freezes it
    grad_clip: float = 1.0  # norm
    ppo_weight: float = 1.0  # of the PPO loss; 0: the demonstrations alone teach, the control that tells what imagination adds
    sft_weight: float = 1.0  # of the L1 on demonstrations beside the PPO loss: holds the policy where it is not rewarded; the paper: 0
    no_spread_limit: int = 4  # stop after this many iterations in which no group has a spread of rewards
    eval_every: int = 0  # iterations between looks at real LIBERO: the best policy is kept, and a fall ends training; 0: never
    eval_episodes: int = 10  # official initial states per task in the final comparison


PRESETS = {
    "tiny": Config(),
    "smoke": Config(preset="smoke", iterations=2, starts=2, rollouts=4, keyframe_starts=18, horizon=0.06, minibatch=4, micro_batch=2,
                    warmup=1, eval_episodes=1, no_spread_limit=100),
    "base": Config(preset="base", micro_starts=24, eval_episodes=40),
}


# ---- equations -----------------------------------------------------------------------------------------------------------

def leave_one_out_advantage(reward):
    """reward (G, N) -> advantage (G, N): each reward minus the mean of the other N - 1 (RLOO, arXiv 2402.14740)."""
    N = reward.shape[1]
    reward = reward - reward[:, :1]  # equal rewards give exactly zero, which Adam would blow up otherwise
    return reward - (reward.sum(1, keepdim=True) - reward) / (N - 1)


def step_mask(finish_step, horizon):
    """finish_step (R,) -> (R, horizon): 1 up to and including the step that finished the rollout."""
    return (torch.arange(horizon, device=finish_step.device) <= finish_step[:, None]).float()


def ppo_loss(log_prob, old_log_prob, advantage, mask, clip_eps):
    """log_prob, old_log_prob, mask (R, T), advantage (R,) -> loss, metrics: means over executed steps, then over rollouts."""
    log_ratio = log_prob - old_log_prob
    ratio, A = log_ratio.exp(), advantage[:, None]
    objective = torch.minimum(ratio * A, ratio.clamp(1 - clip_eps, 1 + clip_eps) * A)
    per_rollout = lambda x: ((x * mask).sum(1) / mask.sum(1)).mean()
    with torch.no_grad():
        metrics = dict(ratio=per_rollout(ratio), approx_kl=per_rollout(ratio - 1 - log_ratio),
                       clip_frac=per_rollout(((ratio - 1).abs() > clip_eps).float()), largest_log_ratio=(log_ratio * mask).abs().max())
    return -per_rollout(objective), metrics


# ---- rollouts in imagination -----------------------------------------------------------------------------------------------

@dataclass
class Rollouts:
    """R = G * N rollouts of at most C chunks, those of one start state next to each other."""
    frames: torch.Tensor        # (R, C, 3, H, W) uint8, what the policy saw
    proprio: torch.Tensor       # (R, C, 8)
    instruction: list           # R str
    action_chunk: torch.Tensor  # (R, C, K, 7) normalised
    old_log_prob: torch.Tensor  # (R, C, K)
    mask: torch.Tensor          # (R, C, K) 1 for executed steps
    reward: torch.Tensor        # (R,) p_success where the rollout ended
    finish_step: torch.Tensor   # (R,) last executed control step
    stopped: torch.Tensor       # (R,) bool, by the reflector, not by the horizon


@torch.no_grad()
def imagine(policy, world_sim, reflector, start_obs, cfg: Config) -> Rollouts:
    """N rollouts from each of G starts. start_obs: frames (G, 3, H, W) uint8, instruction, horizon, and of `world_sim.motion` proprio
    (G, 8), camera (G, 3, 4), velocity (G, 8), previous (G, 7).

    Finished rollouts leave the batch: they cost nothing more and never change.
    """
    K, N, device = policy.cfg.chunk_size, cfg.rollouts, start_obs["proprio"].device
    arm = {key: repeat(x, "g ... -> (g n) ...", n=N) for key, x in start_obs.items() if torch.is_tensor(x)}
    frames, proprio = arm["frames"], arm["proprio"]
    instruction = [text for text in start_obs["instruction"] for _ in range(N)]
    R, C, empty = len(proprio), -(-start_obs["horizon"] // K), proprio.new_zeros
    out = Rollouts(frames=frames.new_zeros(R, C, *frames.shape[1:]), proprio=empty(R, C, 8), instruction=instruction,
                   action_chunk=empty(R, C, K, 7), old_log_prob=empty(R, C, K), mask=empty(R, C, K), reward=empty(R),
                   finish_step=torch.full((R,), C * K - 1, device=device), stopped=torch.zeros(R, dtype=torch.bool, device=device))
    active, memory = torch.arange(R, device=device), world_sim.remember(frames, arm)
    seen, p_success = reflector.see(frames[:, None]), empty(R, 0)
    for chunk in range(C):
        texts = [instruction[i] for i in active]
        out.frames[active, chunk], out.proprio[active, chunk] = frames, proprio
        action_chunk, log_prob = policy.act(dict(frames=frames, proprio=proprio, instruction=texts))
        out.action_chunk[active, chunk], out.old_log_prob[active, chunk] = action_chunk, log_prob
        imagined, proprio = world_sim.predict(memory, proprio, policy.to_env(action_chunk))
        frames = imagined[:, -1]
        seen = torch.cat([seen, reflector.see(frames[:, None])], 1)
        p_success = torch.cat([p_success, reflector.read(seen, texts).sigmoid()[:, None]], 1)
        out.reward[active] = p_success[:, -1]
        stop = reflector_script.stops(p_success, reflector.threshold, reflector.cfg.min_steps, reflector.cfg.patience)[:, -1]
        out.finish_step[active[stop]], out.stopped[active[stop]] = (chunk + 1) * K - 1, True
        active, frames, proprio, seen, p_success = (x[~stop] for x in (active, frames, proprio, seen, p_success))
        memory = memory.select(~stop)
        if not len(active):
            break
    out.mask = rearrange(step_mask(out.finish_step, C * K), "r (c k) -> r c k", k=K)
    return out


def start_frame(e, cfg: Config, rng):
    """Number of the frame of episode `e` where rollouts start: at most `keyframe_starts` before its first success, or the first one."""
    return cfg.keyframe_starts and max(0, e.frame_steps.searchsorted(e.success.argmax() - rng.integers(cfg.keyframe_starts)) - 1)


def start_observation(starts, horizon, device):
    """What `imagine` starts from. starts: G of (episode, number of a frame); horizon: control steps of a rollout."""
    arm = world_sim_script.motion([(e, e.frame_steps[f]) for e, f in starts], 0, device)  # on the way it is moving
    frames = torch.from_numpy(np.stack([e.frames[f] for e, f in starts])).to(device)
    return arm | dict(frames=frames, instruction=[e.instruction for e, _ in starts], horizon=horizon)


def rollouts_in_libero(policy, starts, horizon, first, cfg: Config) -> Rollouts:
    """What `imagine` gives, from the real simulator with its success as reward. starts: G of (exploration episode, number of a frame)."""
    records, device = gather_object(evaluate.rollouts(policy, starts, horizon, first, cfg)), policy.action_bounds.device
    pad = lambda key: torch.nn.utils.rnn.pad_sequence([torch.from_numpy(r[key]) for r in records], batch_first=True).to(device)
    of_each = lambda key: torch.tensor([r[key] for r in records], device=device)
    action_chunk, finish_step = pad("action_chunk"), of_each("steps") - 1
    mask = rearrange(step_mask(finish_step, action_chunk[0, ..., 0].numel()), "r (c k) -> r c k", k=policy.cfg.chunk_size)
    return Rollouts(pad("frames"), pad("proprio"), [r["instruction"] for r in records], action_chunk, pad("log_prob"), mask,
                    of_each("ever_success").float(), finish_step, of_each("ever_success"))


# ---- update --------------------------------------------------------------------------------------------------------------

def log_prob_of(policy, rollouts, rows):
    """Log-probability of the executed chunks of rollouts `rows` -> (len(rows), C * K), 0 where nothing was executed."""
    executed = rollouts.mask[rows].any(-1)                                                                  # (r, C)
    obs = dict(frames=rollouts.frames[rows][executed], proprio=rollouts.proprio[rows][executed],
               instruction=[rollouts.instruction[rows[i]] for i in executed.nonzero()[:, 0]])
    log_prob = rollouts.old_log_prob.new_zeros(len(rows), *rollouts.mask.shape[1:])
    log_prob[executed] = policy.log_prob(obs, rollouts.action_chunk[rows][executed])
    return log_prob.flatten(1)


def update(policy, optimizer, rollouts, cfg: Config, samples=None):
    """One PPO epoch over the rollouts, each process its share of every minibatch, and over `samples` of SFT beside them -> metrics.
    Raises RuntimeError if the first ratio is not 1 or the loss is not finite."""
    processes = data.processes()
    group = rearrange(rollouts.reward, "(g n) -> g n", n=cfg.rollouts)
    advantage, mask, history = leave_one_out_advantage(group).flatten(), rollouts.mask.flatten(1), []
    old_log_prob = rollouts.old_log_prob.flatten(1) * mask
    for step, minibatch in enumerate(torch.randperm(len(advantage)).split(cfg.minibatch)):
        optimizer.zero_grad(set_to_none=True)
        for rows in minibatch[processes.process_index::processes.num_processes].split(cfg.micro_batch):
            rows = rows.to(advantage.device)
            log_prob = log_prob_of(policy, rollouts, rows) * mask[rows]
            loss, metrics = ppo_loss(log_prob, old_log_prob[rows], advantage[rows], mask[rows], cfg.clip_eps)
            if not torch.isfinite(loss):
                raise RuntimeError(f"loss is {float(loss)}; lower --lr or look at the rollouts")
            if step == 0 and metrics["largest_log_ratio"] > 1e-2:  # the update must see the density that sampled, to float32 rounding
                raise RuntimeError(f"the first ratio must be 1, not exp({float(metrics['largest_log_ratio']):.4f}): the density differs")
            (cfg.ppo_weight * loss * len(rows) * processes.num_processes / len(minibatch)).backward()
            history.append(metrics)
        if samples:
            rows = torch.randint(len(samples["mask"]), (2 * cfg.minibatch,))
            (cfg.sft_weight * policy_script.share_of_loss(policy, policy.loss, samples, rows)[0]).backward()
        for p in policy.parameters():
            p.grad = p.grad if p.grad is None else reduce(p.grad, "mean")
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        optimizer.step()
    return dict(reward=group.mean(), stop_rate=rollouts.stopped.float().mean(), group_spread=group.std(1).mean(),
                useful_groups=(group.std(1) > 1e-3).float().mean(), length=mask.sum(1).mean(), grad_norm=grad_norm,
                **{k: reduce(torch.stack([m[k] for m in history]).mean(), "mean") for k in history[0]})


def train(cfg: Config):
    """LOOP from policy_sft.pt to policy_rl.pt."""
    processes, run = data.processes(), data.run_dir(cfg)
    rank, ranks, device, path = processes.process_index, processes.num_processes, processes.device, run / "policy_rl.pt"
    data.require(cfg.starts % ranks == 0 == cfg.minibatch % ranks and (ranks == 1 or not cfg.eval_every), f"got --starts {cfg.starts} "
                 f"--minibatch {cfg.minibatch} --eval-every {cfg.eval_every} on {ranks} processes, expected multiples of {ranks}, and no "
                 "--eval-every, which is for one")
    checkpoint, finished = data.resume(path, "policy_rl", cfg, device, key="ppo_config", ignore=("run", "eval_episodes"))
    if finished:
        return print(f"{path} is finished ({cfg.iterations} iterations); delete it to train again")
    demos, policy = data.load_checkpoint(run / "policy_sft.pt", "policy")["demos"], policy_script.load_policy(run / "policy_sft.pt", device)
    policy.cfg, policy.noise_scale = replace(policy.cfg, min_log_scale=cfg.min_log_scale), cfg.noise_scale
    imagined = cfg.env == "world_sim" and (world_sim_script.load_world_sim(run / "world_sim.pt", device),
                                           reflector_script.load_reflector(run / "reflector.pt", device))
    kinds = ("expert", "explore")[:1 + cfg.explore] if imagined else ("explore",)  # no state tells where a demonstration's fixtures were
    starts, _ = data.training_episodes(cfg, policy.cfg.image_size, policy.cfg.demos_per_task, kinds)
    solved = {e.task for e in starts if e.source == "explore" and e.success.any()}  # elsewhere an imagined reward would be an error
    starts = [e for e in starts if e.task in solved and (e.success.any() or not cfg.keyframe_starts)] or starts
    horizon = cfg.keyframe_starts or int(cfg.horizon * max(task.max_steps for task in data.parse_tasks(cfg.tasks)))
    tasks = [e.task for e in starts]
    weight = np.array([1 / tasks.count(task) for task in tasks]) / len(set(tasks))  # each task is as likely
    data.require(policy.cfg.cameras == 1, "this policy looks through two cameras, the simulator imagines one; train it with --cameras 1")
    samples = cfg.sft_weight and policy_script.dataset(data.load_episodes(
        cfg.demos, data.parse_tasks(cfg.tasks), policy.cfg.demos_per_task, image_size=policy.cfg.image_size), policy.cfg.chunk_size)
    for name in "tower", *("scale_trunk", "scale_out") * (not cfg.train_scale), *("projector", "proprio_projector", "llama") * (not cfg.lr):
        getattr(policy, name).requires_grad_(False)
    policy.prompt_gradient, torch.backends.cudnn.allow_tf32 = policy.cfg.attention == "full", False  # its rounding depends on the batch
    optimizer = torch.optim.AdamW(policy.parameter_groups(cfg.lr, cfg.lr_heads), weight_decay=0.0)
    first, no_spread, fallen = data.restore(checkpoint, policy, optimizer), checkpoint["no_spread"] if checkpoint else 0, False
    best = checkpoint["best"] if checkpoint else evaluate.keep_best(None, policy, 0, cfg)[0] if cfg.eval_every else None
    print(f"ppo_loop: {cfg.starts} x {cfg.rollouts} rollouts in {cfg.env}, {len(starts)} starts, iterations {first} to {cfg.iterations}")
    for iteration in (bar := trange(first, cfg.iterations, initial=first, total=cfg.iterations, desc="ppo_loop", mininterval=2,
                                   disable=rank > 0)):
        torch.manual_seed((cfg.seed * 1_000_003 + iteration) * 64 + rank)  # randomness depends on these alone: resuming is exact
        rng, share, began = np.random.default_rng((cfg.seed, iteration)), cfg.starts // ranks, time.time()
        picked = [starts[i] for i in rng.choice(len(starts), cfg.starts, cfg.starts > len(starts), weight)]
        picked = [(e, start_frame(e, cfg, rng)) for e in picked][rank * share:][:share]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1, (iteration + 1) / cfg.warmup) * (1 - iteration / cfg.iterations)
        if imagined:
            parts = [start_observation(picked[i:i + cfg.micro_starts], horizon, device) for i in range(0, share, cfg.micro_starts)]
            rollouts = data.beside("gather")([imagine(policy, *imagined, part, cfg) for part in parts])
        else:
            rollouts = rollouts_in_libero(policy, picked, horizon, iteration * cfg.starts + rank * share, cfg)
        torch.manual_seed(cfg.seed * 1_000_003 + iteration)  # the same minibatches in every process
        collected = time.time()
        metrics = update(policy, optimizer, rollouts, cfg, samples) | dict(collect_s=collected - began, update_s=time.time() - collected)
        metrics |= dict(real_steps=rollouts.mask.sum() * (cfg.env == "libero"))
        no_spread = no_spread + 1 if metrics["useful_groups"] == 0 else 0
        bar.set_postfix({k: f"{float(metrics[k]):.3f}" for k in "reward stop_rate group_spread useful_groups approx_kl clip_frac".split()})
        if cfg.eval_every and (iteration + 1) % cfg.eval_every == 0:
            best, fallen = evaluate.keep_best(best, policy, iteration + 1, cfg)
        finished = fallen or iteration + 1 == cfg.iterations
        if finished and best:
            policy.load_state_dict(best["model"])
        if rank == 0:
            data.log(run, "ppo_loop", iteration + 1, metrics)
            data.save_checkpoint(path, "policy_rl", policy.cfg, policy, ppo_config=data.plain(cfg), optimizer=optimizer.state_dict(),
                                 step=iteration + 1, finished=finished, no_spread=no_spread, best=None if finished else best,
                                 metrics={k: float(v) for k, v in metrics.items()}, demos=demos,
                                 tokenizer=policy.tokenizer.backend_tokenizer.to_str())
        data.require(no_spread < cfg.no_spread_limit, f"all rewards within every group were equal for {no_spread} iterations: nothing to "
                     f"learn from; delete {path} and raise --noise-scale or --starts")
        if fallen:
            break
    print(f"wrote {path}" + (f", the policy after iteration {best['iteration']}" if best else ""))


# ---- the whole method ----------------------------------------------------------------------------------------------------

def main(cfg: Config):
    """Train whatever is missing, in order, then compare SFT and RL in real LIBERO."""
    data.require(cfg.eval_every >= 0 and (not cfg.eval_every or cfg.eval_episodes <= 40), f"got --eval-every {cfg.eval_every} "
                 f"--eval-episodes {cfg.eval_episodes}, expected at least 0, and at most 40: states 40 and 41 choose the policy")
    for name, choice in dict(env=("world_sim", "libero"), judge=("reward_head", "binary")).items():
        data.require(getattr(cfg, name) in choice, f"got --{name} {getattr(cfg, name)}, expected {' or '.join(choice)}")
    for name, least in dict(warmup=1, horizon=0.01, keyframe_starts=0, micro_starts=1, noise_scale=0.01, ppo_weight=0, sft_weight=0, lr=0,
                            lr_heads=0).items():
        data.require(getattr(cfg, name) >= least, f"got --{name.replace('_', '-')} {getattr(cfg, name)}, expected at least {least}")
    if data.processes().num_processes > 1:  # `accelerate launch`: LOOP alone, the other stages are scripts of their own
        return train(cfg)
    run, seconds = data.run_dir(cfg), {}
    shared, kinds = dict(tasks=cfg.tasks, run=run.name, seed=cfg.seed), ("expert", "explore", "imagined")[:1 + 2 * cfg.explore]

    def preset(script, kind="", **changes):  # a stage that was run by itself keeps its own flags
        own = (path := run / f"{kind}.pt").exists() and data.load_checkpoint(path, kind)["config"]
        return replace(data.from_config(script.Config, own) if own else script.PRESETS[cfg.preset], preset=cfg.preset, **shared, **changes)

    stages = dict(policy_sft=(policy_script.train, preset(policy_script, "policy_sft", demos=cfg.demos)),
                  explore=(evaluate.explore, preset(evaluate, explore=True)),
                  world_sim=(world_sim_script.train, preset(world_sim_script, "world_sim", demos=cfg.demos, kinds=kinds[:2])),
                  imagine=(evaluate.imagine, preset(evaluate)),
                  reflector=(reflector_script.train, preset(reflector_script, "reflector", demos=cfg.demos, judge=cfg.judge, kinds=kinds)),
                  ppo_loop=(train, cfg))
    needless = ("explore", "imagine") * (not cfg.explore) + ("world_sim", "imagine", "reflector") * (cfg.env == "libero")
    stages = {name: stage for name, stage in stages.items() if name not in needless}
    for number, (name, (stage, config)) in enumerate(stages.items(), 1):
        print(f"\n[{number}/{len(stages) + 1}] {name}")
        since = time.time()
        stage(config)
        seconds[name] = round(time.time() - since)
    print(f"\n[{len(stages) + 1}/{len(stages) + 1}] real LIBERO, SFT against RL on the same initial states")
    since, eval_cfg = time.time(), preset(evaluate, episodes=cfg.eval_episodes)
    result = evaluate.compare(run / "policy_sft.pt", run / "policy_rl.pt", eval_cfg)
    seconds["evaluate"] = round(time.time() - since)
    earlier = json.loads(path.read_text())["seconds"] if (path := run / "results.json").exists() else {}
    seconds = {name: max(spent, earlier.get(name, 0)) for name, spent in seconds.items()}  # what was finished took its time then
    data.beside("save_json")(path, result | dict(seconds=seconds | dict(total=sum(seconds.values()))))
    if "imagine" in stages:
        evaluate.report(eval_cfg)
    data.beside("print_table")(result)
    print(f"{sum(seconds.values()) / 60:.0f} min on {result['hardware']}; details: {path}, videos: {run / 'videos'}")


if __name__ == "__main__":
    data.command_line(main, PRESETS, __doc__)
