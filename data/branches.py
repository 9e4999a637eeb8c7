"""Explore once more from the moments that decide, and measure how true LOOP's reward is there.

LOOP compares rollouts of one start with each other. Its reward teaches something if, of two that begin alike, the one that would succeed in
LIBERO gets more of it; that it tells one start from another says little about that. So this plays it out: from states of successful
exploration episodes, before the success, where LOOP's rollouts start too, or (`--failures`) of failed ones, as late as if they had
succeeded when another of their task did, the noisy SFT policy goes on several times in LIBERO. These branches are exploration episodes
like any other: simulator and reflector learn from them if trained afterwards, but not from those of held-out episodes. `--report` gives
the ROC AUC within a start, of these alone and of all: 0.5 where the reward is chance. It does so on imagined frames, LOOP's, and on the
real ones: where only the first is chance the simulator is at fault, not the judge. Noise: LOOP's.

  python data/branches.py --tasks goal            # a few minutes; delete world_sim.pt, imagined/ and reflector.pt to learn from them
  python data/branches.py --tasks goal --report   # replays them in world_sim.pt, judged by reflector.pt
Writes: runs/<run>/explore/<task>_<index + 100000 * number>.hdf5; finished ones are kept.
"""
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate
import ppo_loop
import reflector as reflector_script
from world_sim import arrival, load_world_sim, replay

STRIDE = evaluate.STRIDE  # between the numbers of an episode's branches; a multiple of five keeps the held-out ones held out


@dataclasses.dataclass
class Config:
    tasks: str = "goal"  # suite or choice of tasks, as of evaluate.py
    run: str = ""  # name below runs/; empty: tasks and preset, goal-tiny
    preset: str = "tiny"  # smoke, tiny or base
    seed: int = 0  # of starts and sampled actions
    starts: int = 5  # per task: so many successful exploration episodes
    failures: bool = False  # or failed ones, of tasks in which another one succeeds
    rollouts: int = 8  # branches of each
    length: int = 90  # control steps of a branch, and the most that lie between its start and the episode's success
    workers: int = 2  # simulator processes
    report: bool = False  # measure the truth of the reward instead


PRESETS = {"tiny": Config(), "smoke": Config(preset="smoke", starts=1, rollouts=2, length=18), "base": Config(preset="base")}


def start_frame(episode, success_steps, cfg):
    """The one frame where all branches of `episode` start, picked as LOOP picks it: before its success, or before one of others'."""
    rng = np.random.default_rng((cfg.seed, episode.index))
    step = rng.choice(success_steps) - rng.integers(cfg.length)
    return int(np.clip(episode.frame_steps.searchsorted(step) - 1, 0, len(episode.frames) - 2))


def branch(cfg, policy_path, task, index, number, frame, length, out):
    """Runs in a worker: branch `number` of exploration episode `index` from its frame `frame` to an HDF5 file -> its record."""
    loop, policy = ppo_loop.PRESETS[cfg.preset], evaluate._cached_policy(policy_path)
    policy.cfg = dataclasses.replace(policy.cfg, min_log_scale=loop.min_log_scale)
    env = evaluate._open_env(task, policy.cfg.image_size, policy.cfg.cameras == 2)
    (episode,) = data.read_libero_hdf5(out / f"{task.name}_{index}.hdf5")
    start = lambda env: data.beside("resume_at")(env, episode, episode.frame_steps[frame])
    cfg = dataclasses.replace(cfg, explore_horizon=(length + 0.5) / task.max_steps)
    record, after = evaluate.run_episode(env, policy, cfg, seed=evaluate.EXPLORE_SEED + index + STRIDE * number,
                                         explore_scale=loop.noise_scale, start=start)
    after.before = arrival(episode, episode.frame_steps[frame])  # the arm is moving already
    data.write_libero_hdf5(out / f"{task.name}_{after.index}.hdf5", after, task.suite)
    return record


def explore(cfg: Config, tasks, run):
    policy, out = run / "policy_sft.pt", run / "explore"
    data.load_checkpoint(policy, "policy")
    episodes, rng, jobs = data.load_episodes(out, tasks, kinds=("explore",)), np.random.default_rng(cfg.seed), []
    for task in tasks:
        whole = {e.index: e for e in episodes if e.task == task.name and e.index < STRIDE}
        steps = {index: [e.success.argmax()] for index, e in whole.items() if e.success[1:].any()}
        if cfg.failures:
            steps = {index: sum(steps.values(), []) for index in whole.keys() - steps.keys() if steps}
        for index in rng.permutation(sorted(steps))[:cfg.starts].tolist():
            frame = start_frame(whole[index], steps[index], cfg)
            jobs += [(str(policy), task, index, number, frame, cfg.length, out) for number in range(1, cfg.rollouts + 1)]
    data.require(jobs, f"no exploration episode below {out} {'fails where another of its task ' * cfg.failures}succeeds: there is no way "
                 "to a success to branch off from")
    todo = [job for job in jobs if not (out / f"{job[1].name}_{job[2] + STRIDE * job[3]}.hdf5").exists()]
    settings = dataclasses.replace(evaluate.PRESETS[cfg.preset], explore=True, seed=cfg.seed, workers=cfg.workers)
    records = [record for _, record in evaluate.run_jobs(settings, todo, branch)] if todo else []
    print(f"{len(jobs)} branches in {out}, {len(records)} of them new, {sum(r['ever_success'] for r in records)} of those with success, "
          f"{sum(r['steps'] for r in records)} real interactions")


def within_starts(reward, success, start):
    """reward, success, start (R,) -> ROC AUC of `reward` for `success` in each start where both outcomes occur."""
    groups = [start == g for g in np.unique(start)]
    return [evaluate.roc_auc(reward[g], success[g]) for g in groups if success[g].any() and not success[g].all()]


def loop_reward(reflector, episode):
    """p(done) where the reflector would stop `episode`, or at its end."""
    p = torch.from_numpy(reflector.score(episode))
    return float(p[reflector_script.finish_step(p[None], reflector.threshold, reflector.cfg.min_steps, reflector.cfg.patience)])


@torch.no_grad()
def report(cfg: Config, tasks, run):
    world_sim, reflector = load_world_sim(run / "world_sim.pt"), reflector_script.load_reflector(run / "reflector.pt")
    branches = [e for e in data.load_episodes(run / "explore", tasks, kinds=("explore",)) if e.index >= STRIDE]
    data.require(branches, f"no branches below {run / 'explore'}; run: python data/branches.py --tasks {cfg.tasks}")
    place = lambda e: (e.task, e.index % STRIDE)
    rows = []
    for number, at in enumerate(sorted(set(map(place, branches)))):
        group = [e for e in branches if place(e) == at]  # in `replay` short ones stand still at their end: length does not tell the outcome
        for e, frames in zip(group, replay(world_sim, group)[0][:, ::world_sim.cfg.frames_per_chunk]):
            seen = dataclasses.replace(e, frames=frames), evaluate.at_chunk_ends(e, world_sim.cfg.chunk_size)
            rows.append((number, e.held_out, e.success.any(), *(loop_reward(reflector, twin) for twin in seen)))
    start, held_out, success, imagined, real = map(np.array, zip(*rows))
    for which, of in {"all": held_out | True, "held out": held_out}.items():
        for frames, reward in dict(imagined=imagined, real=real).items() if of.any() else ():
            auc = within_starts(reward[of], success[of], start[of])
            spread = f"{np.mean(auc):.2f} +- {np.std(auc) / len(auc) ** 0.5:.2f}" if auc else "unknown"
            print(f"{which}, {frames} frames: {of.sum()} branches of {len(set(start[of]))} starts, {success[of].mean():.2f} succeed, mean "
                  f"reward {reward[of].mean():.2f}; ROC AUC within the {len(auc)} starts with both outcomes {spread}")


def main(cfg: Config):
    for name in ("starts", "rollouts", "length", "workers"):
        data.require(getattr(cfg, name) >= 1, f"got --{name} {getattr(cfg, name)}, expected at least 1")
    run = data.run_dir(cfg)
    (report if cfg.report else explore)(cfg, data.parse_tasks(cfg.tasks), run)


if __name__ == "__main__":
    data.command_line(main, PRESETS, __doc__)
