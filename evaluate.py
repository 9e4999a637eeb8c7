"""Real LIBERO: success rates, exploration episodes, and the reality gap of simulator and reflector.

  python evaluate.py --tasks goal --policy runs/goal-tiny/policy_rl.pt     # success on LIBERO's official initial states
  python evaluate.py --tasks goal --explore     # noisy SFT policy -> runs/goal-tiny/explore/*.hdf5, successes and failures
  python evaluate.py --tasks goal --imagine     # short parts of them, as the simulator imagines them -> runs/goal-tiny/imagined/
  python evaluate.py --tasks goal --report      # simulator and reflector against held-out exploration episodes
  python evaluate.py --tasks libero_goal_swap --policy runs/goal-tiny/policy_rl.pt   # LIBERO-90 and LIBERO-PRO: any suite by name

Stop rules (--stop): `oracle` ends an episode at the simulator's first success, the usual LIBERO protocol; `horizon` runs to the
last step and judges the last state; `reflector` ends it when the reflector is sure and judges that state.
Every finished episode is a line of runs/<run>/episodes.jsonl: a killed evaluation goes on where it was.
Only policy queries are rendered, every chunk_size steps: a render costs as much as six control steps.
Reads: policy_*.pt, world_sim.pt, reflector.pt.  Writes: runs/<run>/results.json, explore/*.hdf5, report.json.
"""
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import time
from concurrent.futures import BrokenExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm, trange

import data
from policy import load_policy
from reflector import load_reflector, stops
from world_sim import load_world_sim, replay


@dataclass
class Config:
    tasks: str = "goal"  # suite or choice of tasks: goal, object, spatial, long, all, goal:0,3,7, goal:1+object:2, libero_90
    policy: str = ""  # checkpoint to run; empty: policy_sft.pt of the run
    run: str = ""  # name below runs/; empty: tasks and preset, goal-tiny
    preset: str = "tiny"  # smoke, tiny, base or paper; every other flag overrides it
    seed: int = 0  # of sampled actions
    episodes: int = 10  # per task: so many official initial states
    first_state: int = 0  # the first of them
    stop: str = "oracle"  # oracle, horizon or reflector
    max_steps: int = 0  # control steps per episode; 0: OpenVLA-OFT's limit for the suite
    sample: bool = False  # sample actions instead of executing the mean
    workers: int = 2  # simulator processes
    explore: bool = False  # record exploration episodes instead of measuring success
    explore_episodes: int = 30  # per task
    noise_scale: tuple[float, ...] = (1.0, 2.0, 3.0)  # exploration: the Laplace scale times one of these, in turn
    explore_horizon: float = 0.8  # exploration: fraction of the suite's step limit, as LOOP's rollouts
    frame_every: int = 8  # exploration: control steps between stored frames, as the simulator's
    past_success: int = 32  # exploration: steps recorded past the first success
    imagine: bool = False  # replay exploration episodes in world_sim.pt and store what it imagines, for the reflector to learn from
    part: int = 90  # control steps of what is replayed: parts of episodes, as short as LOOP's rollouts; 0: whole episodes
    report: bool = False  # measure the reality gap of world_sim.pt and reflector.pt instead


PRESETS = {"tiny": Config(), "base": Config(preset="base", frame_every=4), "paper": Config(preset="paper", frame_every=1),
           "smoke": Config(preset="smoke", episodes=1, max_steps=16, explore_episodes=5, explore_horizon=0.08, frame_every=4, part=0)}
EXPLORE_SEED, STRIDE = 5000, 100_000  # first reset seed of exploration (demonstrations: 1000); from an episode's number to its branches'


# ---- statistics ----------------------------------------------------------------------------------------------------------

def wilson_interval(successes, trials):
    """95 % score interval of a success rate (Wilson 1927) -> (low, high)."""
    if trials == 0:
        return 0.0, 1.0
    z, p = 1.959964, successes / trials
    centre, half = p + z * z / (2 * trials), z * np.sqrt(p * (1 - p) / trials + z * z / (4 * trials ** 2))
    return max(0.0, (centre - half) / (1 + z * z / trials)), min(1.0, (centre + half) / (1 + z * z / trials))


def paired_difference(before, after):
    """Mean of after - before (success of the same episodes) and its 95 % interval -> (mean, low, high). Half a pair is added to
    each of the four outcomes (Agresti and Min 2005): few episodes or equal outcomes must not give an interval of no width."""
    difference = np.asarray(after, float) - np.asarray(before, float)
    n, centre = len(difference) + 2, difference.sum() / (len(difference) + 2)
    half = 1.959964 * np.sqrt(((difference ** 2).sum() + 1) / n - centre ** 2) / np.sqrt(n)
    return float(difference.mean()), float(centre - half), float(centre + half)


def roc_auc(score, label):
    """Probability that a random positive scores above a random negative, ties counting half; nan without both."""
    score, label = np.asarray(score, float), np.asarray(label, bool)
    positive, negative = score[label], np.sort(score[~label])
    if not len(positive) or not len(negative):
        return float("nan")
    below, not_above = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return float((below + not_above).mean() / 2 / len(negative))


def psnr(a, b):
    """uint8 frames (..., 3, H, W) x 2 -> (...) peak signal-to-noise ratio in dB."""
    error = ((a.astype(np.float32) - b.astype(np.float32)) ** 2).mean((-3, -2, -1))
    return 10 * np.log10(255 ** 2 / np.maximum(error, 1e-2))


# ---- one episode in the real simulator -------------------------------------------------------------------------------------

@torch.no_grad()
def run_episode(env, policy, cfg: Config, init_index=None, seed=None, judge=None, explore_scale=None, start=None):
    """Roll `policy` in `env` -> record and, exploring, the Episode, else its frames.
    `judge(frames (T, 3, H, W) so far, step) -> p_success, stop` ends it with `--stop reflector`; `start(env)` is in place of the reset."""
    torch.manual_seed(cfg.seed * 1_000_003 + (init_index if seed is None else seed))
    exploring, policy.noise_scale = explore_scale is not None, explore_scale or 1.0
    max_steps = int(env.task.max_steps * cfg.explore_horizon) if exploring else cfg.max_steps or env.task.max_steps
    obs = start(env) if start else env.reset(init_index, seed)
    frames, frame_steps, proprio, actions, states, sampled = [obs["frames"]], [0], [env.proprio()], [], [env.state()], []
    success, stopped, p_success = [bool(env.env.check_success())], False, 0.0
    while len(actions) < max_steps and not stopped:
        batch = {key: [value] if isinstance(value, str) else torch.from_numpy(value)[None] for key, value in obs.items()}
        sampled.append(policy.act(batch, deterministic=not (exploring or cfg.sample)))
        chunk = policy.to_env(sampled[-1][0])[0].numpy()[:max_steps - len(actions)]
        for piece in (np.split(chunk, range(cfg.frame_every, len(chunk), cfg.frame_every)) if exploring else [chunk]):
            for action in piece:
                _, ok = env.step_chunk(action[None], render=False)
                actions.append(action)
                success.append(bool(ok[0]))
                proprio.append(env.proprio())
                if exploring:
                    states.append(env.state())
                if cfg.stop == "oracle" and success[-1] and not (exploring and cfg.past_success):
                    stopped = True
                    break
            frame_steps.append(len(actions))
            obs = env.observe()
            frames.append(obs["frames"])  # the last frame of a stopped episode ends its video
            if stopped:
                break
        if exploring and any(success):
            stopped = len(actions) >= np.argmax(success) + cfg.past_success
        if judge and cfg.stop == "reflector" and not exploring:
            p_success, stopped = judge(np.stack(frames), len(actions))
    record = dict(task=f"{env.task.suite}:{env.task.index}", init_index=init_index, seed=seed, stop=cfg.stop, steps=len(actions),
                  success=bool(success[-1]), ever_success=any(success), p_success=round(float(p_success), 4),
                  noise_scale=explore_scale or 0)
    if not exploring:
        return record, np.stack(frames)
    record |= {key: np.concatenate(values) for key, values in zip(("action_chunk", "log_prob"), zip(*sampled))}  # (C, K, 7), (C, K)
    return record, data.Episode(np.stack(frames), np.array(frame_steps), np.stack(proprio), np.array(actions, np.float32),
                                np.array(success), np.stack(states), env.task.instruction, env.task.name, "explore",
                                seed - EXPLORE_SEED)


_cached_policy, _cached_reflector = functools.lru_cache(2)(load_policy), functools.lru_cache(1)(load_reflector)
_pool = functools.lru_cache(1)(lambda workers: data.process_pool(workers))  # that of rollouts, from one iteration to the next
_cached_env = {}  # the environments a worker keeps open; the first takes nearly two gigabytes, every other one 0.7


def _open_env(*key, kept=1):  # task, image_size, wrist
    if key not in _cached_env:
        while len(_cached_env) >= kept:
            _cached_env.pop(next(iter(_cached_env))).close()
        try:
            _cached_env[key] = data.LiberoEnv(*key)
        except FileNotFoundError as error:  # LIBERO-PRO registers suites whose models were never published
            raise data.UserError(f"{key[0].suite}:{key[0].index} cannot be run: the installed libero lacks "
                                 f"{Path(error.filename).name}; `libero-pro list` shows the complete suites") from None
    return _cached_env[key]


def _episode_job(cfg, policy_path, task, index, out):
    """Runs in a worker: one exploration episode to an HDF5 file, or one evaluation episode with its frames kept for a video."""
    policy = _cached_policy(policy_path)
    env = _open_env(task, policy.cfg.image_size, policy.cfg.cameras == 2)
    if cfg.explore:
        scale = cfg.noise_scale[index % len(cfg.noise_scale)]
        record, episode = run_episode(env, policy, cfg, seed=EXPLORE_SEED + index, explore_scale=scale)
        data.write_libero_hdf5(Path(out) / f"{task.name}_{index}.hdf5", episode, task.suite)
        return record
    judge = _cached_reflector(str(Path(out) / "reflector.pt")).judge(task.instruction) if cfg.stop == "reflector" else None
    record, frames = run_episode(env, policy, cfg, init_index=index, judge=judge)
    data.save_video(Path(out) / "videos" / f"real_{Path(policy_path).stem}_{task.suite}_{task.index}_{index}.mp4", frames)
    return record


def run_jobs(cfg: Config, jobs, work=None, pool=None):
    """`work` or `_episode_job` (cfg, *job) in processes, `pool`'s or new ones -> (job, record) as they end; an error drops the queued."""
    success, futures, pool = [], {}, contextlib.nullcontext(pool) if pool else data.process_pool(min(cfg.workers, len(jobs)))
    with pool as pool, tqdm(total=len(jobs), unit="episode", mininterval=2) as bar:
        try:
            futures.update((pool.submit(work or _episode_job, cfg, *job), job) for job in jobs)
            for future in as_completed(futures):
                success.append(future.result()["success"])
                yield futures[future], future.result()
                bar.update()
                bar.set_postfix(success=f"{np.mean(success):.2f}")
        except BrokenExecutor:
            raise data.UserError("a simulator process was killed, perhaps for want of memory: each takes over a gigabyte; "
                                 "run the same command again with --workers 1, finished episodes are kept") from None
        finally:
            for future in futures:
                future.cancel()


def checked_tasks(cfg: Config) -> list[data.Task]:
    """The tasks of `cfg`. Raises UserError on values that no episode can run with, and on tasks of which the installed libero
    has only the name: more than half of the suites that LIBERO-PRO registers were never published."""
    for name, least in dict(episodes=1, workers=1, explore_episodes=1, frame_every=1, first_state=0, max_steps=0, past_success=0).items():
        data.require(getattr(cfg, name) >= least, f"got --{name.replace('_', '-')} {getattr(cfg, name)}, expected at least {least}")
    data.require(cfg.noise_scale and all(0 < scale < np.inf for scale in cfg.noise_scale), "got --noise-scale "
                 f"{' '.join(map(str, cfg.noise_scale)) or 'without a number'}, expected positive numbers such as 1 2 4")
    tasks = data.parse_tasks(cfg.tasks)
    data.require(not cfg.explore or len({task.name for task in tasks}) == len(tasks),
                 f"--tasks {cfg.tasks}: two of these tasks have the same name; explore one suite at a time")
    for task in tasks:
        label, init_states = f"{task.suite}:{task.index}", []
        with contextlib.suppress(FileNotFoundError):
            init_states = data.libero_suite(task.suite).get_task_init_states(task.index)
        data.require(len(init_states) and Path(task.bddl_path).exists(), f"{label} cannot be run: the installed libero lacks its "
                     "description or its initial states; `libero-pro list` shows the complete suites")
        data.require(cfg.explore or cfg.first_state + cfg.episodes <= len(init_states),
                     f"{label} has {len(init_states)} official initial states, got --episodes {cfg.episodes} from {cfg.first_state} on")
        data.require(not cfg.explore or int(task.max_steps * cfg.explore_horizon) >= 1,
                     f"got --explore-horizon {cfg.explore_horizon}: not one of {label}'s {task.max_steps} steps")
    return tasks


def read_records(path):
    """The records of a jsonl file; a line that a kill cut short is not one."""
    records = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def append_record(path, record):
    """One more line of a jsonl file, which starts a new line where a kill cut the last one short."""
    cut = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a") as file:
        file.write("\n" * cut + json.dumps(record) + "\n")


# ---- success rates ---------------------------------------------------------------------------------------------------------

def evaluate_policy(policies, cfg: Config) -> dict:
    """Success of checkpoint files on the same official initial states -> {path: {task: {successes, trials, interval, ...}}}."""
    tasks, run = checked_tasks(cfg), data.run_dir(cfg)
    data.require(cfg.stop in ("oracle", "horizon", "reflector"), f"unknown stop rule {cfg.stop!r}, expected oracle, horizon or reflector")
    for path in policies:
        data.load_checkpoint(path, "policy")
    # a finished episode counts only for the very same weights and settings
    digest = lambda path: hashlib.sha1(Path(path).read_bytes()).hexdigest()[:12]
    settings = f"{cfg.stop}-{cfg.max_steps}-{cfg.sample}-{cfg.seed}"
    if cfg.stop == "reflector":
        data.load_checkpoint(run / "reflector.pt", "reflector")
        settings += "-" + digest(run / "reflector.pt")
    stamp, log = {p: f"{digest(p)}-{settings}" for p in policies}, run / "episodes.jsonl"
    finished = {(r["stamp"], r["task"], r["init_index"]): r for r in read_records(log)}
    states = range(cfg.first_state, cfg.first_state + cfg.episodes)
    jobs = [(p, task, i) for task in tasks for i in states for p in policies]
    key = lambda p, task, i: (stamp[p], f"{task.suite}:{task.index}", i)
    todo = [job for job in jobs if key(*job) not in finished]
    if todo:
        print(f"evaluating {len(todo)} episodes in LIBERO ({len(jobs) - len(todo)} already done), "
              f"about {len(todo) * 5 / cfg.workers / 60:.0f} min")
        for (p, task, i, _), record in run_jobs(cfg, [(*job, str(run)) for job in todo]):
            finished[key(p, task, i)] = record | dict(stamp=stamp[p])
            append_record(log, finished[key(p, task, i)])
    table = {p: {} for p in policies}
    for p in policies:
        for task in tasks:
            records = [finished[key(p, task, i)] for i in states]
            successes = sum(r["success"] for r in records)
            table[p][f"{task.suite}:{task.index}"] = dict(
                instruction=task.instruction, successes=successes, trials=len(records), success=[r["success"] for r in records],
                ever_successes=sum(r["ever_success"] for r in records), interval=wilson_interval(successes, len(records)),
                mean_steps=float(np.mean([r["steps"] for r in records])))
    return table


def summary(table, cfg: Config) -> dict:
    """What a result must carry: counts, intervals, the protocol, versions, hardware."""
    out = dict(protocol=dict(stop=cfg.stop, max_steps=[cfg.max_steps or t.max_steps for t in data.parse_tasks(cfg.tasks)], seed=cfg.seed,
                             settle_steps=data.SETTLE_STEPS, init_states=list(range(cfg.first_state, cfg.first_state + cfg.episodes)),
                             actions="sampled" if cfg.sample else "deterministic"),
               versions=data.versions(), git_commit=data.beside("git_commit")(), hardware=f"{os.cpu_count()} CPU cores, "
               f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}", policies={})
    for path, rows in table.items():
        total = {key: sum(r[key] for r in rows.values()) for key in ("successes", "ever_successes", "trials")}
        out["policies"][Path(path).stem] = dict(file=str(path), **total, interval=wilson_interval(total["successes"], total["trials"]),
                                                demos=data.load_checkpoint(path, "policy")["demos"], tasks=rows)
    return out


def compare(before, after, cfg: Config) -> dict:
    """Two policies on the same official initial states -> `summary`, the paired difference, and what real data training used."""
    _pool.cache_clear()  # LOOP's simulators have done their work
    table, run = evaluate_policy([str(before), str(after)], cfg), data.run_dir(cfg)
    outcomes = [[s for row in rows.values() for s in row["success"]] for rows in table.values()]
    explored = data.load_episodes(run / "explore", data.parse_tasks(cfg.tasks), kinds=("explore",)) if (run / "explore").exists() else []
    iterations = {r["step"]: r.get("real_steps", 0) for r in read_records(run / "ppo_loop.jsonl")}  # a killed one is there twice
    return summary(table, cfg) | dict(difference=paired_difference(*outcomes), exploration_episodes=len(explored),
                                      real_interactions=int(sum(len(e.actions) for e in explored) + sum(iterations.values())))


@contextlib.contextmanager
def candidate(policy):
    """A checkpoint file of `policy` while it learns, for the simulator processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/policy_candidate.pt"
        data.save_checkpoint(path, "policy_rl", policy.cfg, policy, tokenizer=policy.tokenizer.backend_tokenizer.to_str(), demos={})
        yield path


def keep_best(best, policy, iteration, cfg):
    """Measure `policy` in real LIBERO, on states that no comparison uses, with the flags `cfg` of ppo_loop.py -> (it or `best`, whichever
    succeeds more often: {iteration, successes, model}, whether its rate is below the 95 % interval of the best)."""
    look = dataclasses.replace(PRESETS[cfg.preset], tasks=cfg.tasks, run=data.run_dir(cfg).name, seed=cfg.seed, episodes=2, first_state=40)
    with candidate(policy) as path:
        rows = evaluate_policy([path], look)[path].values()
    successes, trials = (sum(row[key] for row in rows) for key in ("successes", "trials"))
    if not best or successes > best["successes"]:
        best = dict(iteration=iteration, successes=successes, model={k: v.clone() for k, v in policy.state_dict().items()})
    data.log(data.run_dir(cfg), "real_success", iteration, dict(successes=successes, trials=trials))
    fallen = bool(successes / trials < wilson_interval(best["successes"], trials)[0])
    print(f"real LIBERO after iteration {iteration}: {successes}/{trials}, best {best['successes']} after iteration {best['iteration']}"
          + "; the policy pleases the simulator, not LIBERO: training ends" * fallen)
    return best, fallen


# ---- rollouts for ppo_loop.py --env libero ---------------------------------------------------------------------------------

def _rollouts_job(cfg, policy_path, task, episode, frame, seed):
    """Runs in a worker: noisy rollouts from a frame of an exploration episode -> their records with what `ppo_loop.Rollouts` holds."""
    policy, start = _cached_policy(policy_path), lambda env: data.beside("resume_at")(env, episode, episode.frame_steps[frame])
    env, records = _open_env(task, policy.cfg.image_size, policy.cfg.cameras == 2, kept=5), []
    cfg = dataclasses.replace(cfg, explore_horizon=(cfg.max_steps + 0.5) / task.max_steps)
    for n in range(cfg.episodes):
        record, after = run_episode(env, policy, dataclasses.replace(cfg, seed=n), seed=seed, explore_scale=cfg.noise_scale[0], start=start)
        C, K = record["log_prob"].shape  # chunks queried
        records.append(record | dict(frames=after.frames[:C], proprio=after.proprio[::K][:C], instruction=task.instruction))
    return dict(success=np.mean([record["ever_success"] for record in records]), records=records)


def rollouts(policy, starts, horizon, first, cfg):
    """With the flags `cfg` of ppo_loop.py, its rollouts from `starts`, with noise of their own, `first` and up -> records, in order."""
    settings = dataclasses.replace(PRESETS[cfg.preset], explore=True, episodes=cfg.rollouts, max_steps=horizon, past_success=0,
                                   noise_scale=(cfg.noise_scale,), frame_every=policy.cfg.chunk_size)
    tasks, first = {task.name: task for task in data.parse_tasks(cfg.tasks)}, first + STRIDE * (1 + cfg.seed)
    with candidate(policy) as path:  # by task, because a simulator takes seconds to build
        jobs = sorted([(path, tasks[e.task], e, frame, seed) for seed, (e, frame) in enumerate(starts, first)], key=lambda job: job[1].name)
        finished = {job[-1]: done["records"] for job, done in run_jobs(settings, jobs, _rollouts_job, _pool(settings.workers))}
    return [record for seed in sorted(finished) for record in finished[seed]]


# ---- exploration data ------------------------------------------------------------------------------------------------------

def explore(cfg: Config):
    """Roll the noisy SFT policy on fresh resets and store every episode, success or failure; finished files are kept."""
    tasks, run = checked_tasks(cfg), data.run_dir(cfg)
    policy, out = cfg.policy or str(run / "policy_sft.pt"), run / "explore"
    data.load_checkpoint(policy, "policy")
    jobs = [(task, i) for task in tasks for i in range(cfg.explore_episodes) if not (out / f"{task.name}_{i}.hdf5").exists()]
    if jobs:
        print(f"exploring: {len(jobs)} episodes with the noisy policy, about {len(jobs) * 7 / cfg.workers / 60:.0f} min")
        for _, record in run_jobs(cfg, [(policy, task, i, str(out)) for task, i in jobs]):
            data.log(run, "explore", record["seed"], {k: record[k] for k in ("steps", "success", "ever_success", "noise_scale")})
    episodes = data.load_episodes(out, tasks, kinds=("explore",))
    print(f"{len(episodes)} exploration episodes in {out}, {sum(bool(e.success.any()) for e in episodes)} with success, "
          f"{sum(len(e.actions) for e in episodes)} real interactions")


# ---- imagined episodes -----------------------------------------------------------------------------------------------------

def imagined_twins(world_sim, episodes):
    """The same episodes with the frames that the simulator imagines at the end of each chunk of their actions, and the real outcome."""
    K, frames = world_sim.cfg.chunk_size, replay(world_sim, episodes)[0][:, ::world_sim.cfg.frames_per_chunk]
    return [dataclasses.replace(e, frames=seen[:len(e.actions) // K + 1], frame_steps=np.arange(0, len(e.actions) + 1, K),
                                source="imagined", wrist_frames=None) for e, seen in zip(episodes, frames)]


def imagine(cfg: Config):
    """Store the imagined twins of parts of every exploration episode, or of it all; those younger than the simulator are kept."""
    tasks, run = data.parse_tasks(cfg.tasks), data.run_dir(cfg)
    world_sim, by_name = load_world_sim(run / "world_sim.pt"), {task.name: task for task in tasks}
    path = lambda e: run / "imagined" / f"{e.task}_{e.index}.hdf5"
    fresh = lambda e: path(e).exists() and path(e).stat().st_mtime > (run / "world_sim.pt").stat().st_mtime
    parts_of = lambda e: data.beside("short_parts")(e, cfg.part) if cfg.part else [e]
    episodes = [part for e in data.load_episodes(run / "explore", tasks, kinds=("explore",)) for part in parts_of(e) if not fresh(part)]
    for start in trange(0, len(episodes), 50, desc="imagine", mininterval=2):
        for twin in imagined_twins(world_sim, episodes[start:start + 50]):
            data.write_libero_hdf5(path(twin), twin, by_name[twin.task].suite)
    print(f"{len(list((run / 'imagined').glob('*.hdf5')))} imagined episodes in {run / 'imagined'}")


# ---- the reality gap -------------------------------------------------------------------------------------------------------

def evaluate_world_sim(world_sim, episodes, horizons=(8, 64, 160)) -> dict:
    """Replay held-out actions in imagination and compare with the real frames at `horizons` (control steps): PSNR (dB) and SSIM,
    beside the first frame kept, the chunks of actions in another order, and standing still; error of proprio (mm, degrees)."""
    rng, K, per_chunk, ssim = np.random.default_rng(0), world_sim.cfg.chunk_size, world_sim.cfg.frames_per_chunk, data.beside("ssim")
    chunks = [np.split(e.actions, range(K, len(e.actions), K)) for e in episodes]
    shuffled = [np.concatenate([parts[i] for i in rng.permutation(len(parts))]) for parts in chunks]
    still = [e.actions * np.array([0, 0, 0, 0, 0, 0, 1], np.float32) for e in episodes]
    (imagined, proprio), (other, _), (stood, _) = (replay(world_sim, episodes, actions) for actions in (None, shuffled, still))
    rows = []
    for b, episode in enumerate(episodes):
        for i, h in ((i, int(h)) for i, h in enumerate(episode.frame_steps) if h in horizons):
            real, at, error = episode.frames[i], h // K * per_chunk, proprio[b, h // K] - episode.proprio[h]
            views = dict(imagined=imagined[b, at], frozen=episode.frames[0], shuffled=other[b, at], still=stood[b, at])
            rows.append({f"{name}_{kind}_{h}": measure(view, real) for name, measure in dict(psnr=psnr, ssim=ssim).items()
                         for kind, view in views.items()})
            rows[-1] |= {f"drift_mm_{h}": 1000 * np.linalg.norm(error[:3]), f"drift_degrees_{h}": np.degrees(np.linalg.norm(error[3:6]))}
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in sorted({key for row in rows for key in row})}


def stability(world_sim, episodes, steps=304) -> dict:
    """Contrast and sharpness of what is imagined after `steps`, each episode's actions over and over, relative to its real frames."""
    last = replay(world_sim, episodes, [np.resize(e.actions, (steps, 7)) for e in episodes])[0][:, -1]
    measures = dict(contrast=lambda x: x.std((-1, -2)).mean(), sharpness=lambda x: abs(np.diff(x.astype(float))).mean())
    return {f"{name}_{steps}": float(np.mean([of(frame) / of(e.frames) for frame, e in zip(last, episodes)]))
            for name, of in measures.items()}


def at_chunk_ends(episode, chunk_size):  # the frames that policy and reflector see in a rollout
    seen = episode.frame_steps % chunk_size == 0
    return dataclasses.replace(episode, frames=episode.frames[seen], frame_steps=episode.frame_steps[seen])


def success_agreement(world_sim, reflector, episodes) -> dict:
    """The same actions in MuJoCo and in the simulator: does the reflector find in the imagined frames the outcome that was real?"""
    K, cfg = world_sim.cfg.chunk_size, reflector.cfg
    outcomes = dict(real=[bool(e.success.any()) for e in episodes], seen_real=[], seen_imagined=[])
    for episode, twin in zip(episodes, imagined_twins(world_sim, episodes)):
        for name, seen in dict(seen_real=at_chunk_ends(episode, K), seen_imagined=twin).items():
            score = torch.from_numpy(reflector.score(seen))[None]
            outcomes[name].append(bool(stops(score, reflector.threshold.cpu(), cfg.min_steps, cfg.patience).any()))
    real, seen_real, seen = (np.array(x) for x in outcomes.values())
    by_chance = real.mean() * seen.mean() + (1 - real.mean()) * (1 - seen.mean())
    agreement = float((real == seen).mean())
    return dict(agreement=agreement, kappa=float((agreement - by_chance) / (1 - by_chance)) if by_chance < 1 else float("nan"),
                episodes=len(real), successes=int(real.sum()), found=int((real & seen).sum()), invented=int((~real & seen).sum()),
                agreement_on_real_frames=float((real == seen_real).mean()))


def evaluate_reflector(reflector, episodes) -> dict:
    """ROC AUC of per-frame success, and of success against the same frames with another task's instruction; expected calibration error
    (10 bins); and what stopping would do: share of failures stopped, of successes stopped while they were one (found, with the delay in
    control steps) or while not (wrong, most often too early), and of all stops that were right."""
    p, label, false_stop, found, wrong, delay, misread = [], [], [], [], [], [], []
    instructions = sorted({e.instruction for e in episodes})
    for episode in episodes:
        score, truth = reflector.score(episode), episode.success[episode.frame_steps]
        p, label = np.concatenate([p, score]), np.concatenate([label, truth])
        stop = stops(torch.from_numpy(score)[None], float(reflector.threshold), reflector.cfg.min_steps, reflector.cfg.patience)
        at = np.flatnonzero(stop[0])[:1]  # the first, if there is one
        if truth.any():
            other = instructions[instructions.index(episode.instruction) - 1]
            misread += reflector.score(dataclasses.replace(episode, instruction=other))[truth].tolist() if len(instructions) > 1 else []
            found.append(truth[at].any())
            wrong.append(not truth[at].all())
            delay += list(episode.frame_steps[at] - np.argmax(episode.success)) if found[-1] else []
        else:
            false_stop.append(len(at))
    mean = lambda x: float(np.mean(x)) if len(x) else float("nan")
    bins, right = np.minimum(p * 10, 9).astype(int), p[label > 0]
    return dict(auc=roc_auc(p, label), wrong_instruction_auc=roc_auc([*right, *misread], [1] * len(right) + [0] * len(misread)),
                ece=float(sum(abs((p - label)[bins == b].sum()) for b in range(10)) / len(p)), frames=len(p),
                positives=int(label.sum()), episodes=len(episodes), failures=len(false_stop), false_stop_rate=mean(false_stop),
                found_rate=mean(found), wrong_stop_rate=mean(wrong), mean_delay_steps=mean(delay),
                stop_precision=mean([True] * sum(found) + [False] * (sum(wrong) + sum(false_stop))))


def report(cfg: Config):
    """The reality gap on held-out exploration episodes, printed and written to report.json."""
    run = data.run_dir(cfg)
    world_sim, reflector = load_world_sim(run / "world_sim.pt"), load_reflector(run / "reflector.pt")
    explored = data.load_episodes(run / "explore", data.parse_tasks(cfg.tasks), kinds=("explore",))
    episodes = [e for e in explored if e.held_out and e.index < 100_000]  # without data/branches.py's: parts, and not of every episode
    real = [at_chunk_ends(e, world_sim.cfg.chunk_size) for e in episodes]
    result = dict(world_sim=evaluate_world_sim(world_sim, episodes) | stability(world_sim, episodes)
                  | {f"{name}_episodes": evaluate_world_sim(world_sim, part) for name, wanted in
                     dict(successful=True, failed=False).items() if (part := [e for e in episodes if e.success.any() == wanted])},
                  agreement=success_agreement(world_sim, reflector, episodes), reflector=evaluate_reflector(reflector, real),
                  reflector_on_imagined=evaluate_reflector(reflector, twins := imagined_twins(world_sim, episodes)))
    for e, twin in zip(real, twins):
        data.save_video(run / "videos" / f"gap_{e.task}_{e.index}.mp4", np.concatenate([e.frames, twin.frames], -1), fps=4)
    print(json.dumps(result, indent=1))
    data.beside("save_json")(run / "report.json", result)


def main(cfg: Config):
    for stage in (explore, imagine, report):
        if getattr(cfg, stage.__name__):
            return stage(cfg)
    began, path = time.time(), cfg.policy or str(data.run_dir(cfg) / "policy_sft.pt")
    result = summary(evaluate_policy([path], cfg), cfg) | dict(seconds=round(time.time() - began))
    data.beside("print_table")(result)
    data.beside("save_json")(data.run_dir(cfg) / f"results_{Path(path).stem}_{cfg.stop}.json", result)


if __name__ == "__main__":
    data.command_line(main, PRESETS, __doc__)
