"""How fast it runs: `python tests/bench.py`. Prints one table and writes nothing.

control steps   Control steps per wall-clock second of whole LIBERO episodes (reset, policy queries, physics, rendering) as
                evaluate.py runs them, with one render per chunk of actions, against the same episodes with one render per control
                step, as other code bases run them; in one simulator process and in two. Same task, initial states, actions and
                number of steps. Environments are built before the clock starts. The two take turns: a machine that slows down
                slows both.

The policy is `tiny` with random weights: what a query costs does not depend on them.
frames          Rendered frames per second of CPU time and milliseconds of a control step, by LIBERO and robosuite and by data.py.

imagination     Control steps per second that `tiny` imagines with all cores, in batches of 8 and 32 rollouts (16 chunks, decoded), with
                random weights; beside it what LIBERO does on the same cores, one process each, with a render per chunk and with
                one per step, and the ratios.

LOOP            Seconds that one iteration of ppo_loop.py takes with the checkpoints of `--loop-tasks` at `tiny`, all cores: the policy's,
                simulator's and reflector's share of collecting rollouts, and the update; first as the reflector stops them, then with
                one that never does. Skipped where a checkpoint is missing.

To add a section, write a function `cfg -> (header, rows of text)` and name it in SECTIONS.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # one thread per process, as in the workers of evaluate.py

import collections  # noqa: E402
import functools  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import policy as policy_script  # noqa: E402
import ppo_loop  # noqa: E402
import reflector as reflector_script  # noqa: E402
import world_sim as world_sim_script  # noqa: E402


@dataclass
class Config:
    tasks: str = "goal:1"  # one task of LIBERO
    frames_of: str = "goal:0+object:0+spatial:0+long:0"  # tasks whose views are timed
    steps: int = 64  # control steps per episode
    rounds: int = 3  # timed episodes per process and way of rendering
    workers: int = 2  # simulator processes of the second row
    loop_tasks: str = "goal"  # tasks of the run whose checkpoints LOOP is timed with


# ---- control steps per second ----------------------------------------------------------------------------------------------

class BenchEnv(data.LiberoEnv):
    """With `per_step`, a frame (3, H, W) is rendered after every control step; the last of a chunk is what the policy sees."""
    per_step, shown = False, None

    def step_chunk(self, actions, render=True):
        _, success = super().step_chunk(actions, render=False)
        self.shown = super().render() if self.per_step else None
        return self.observe(render), success

    def render(self, camera="agentview"):
        shown, self.shown = self.shown, None
        return super().render(camera) if shown is None else shown


@functools.cache
def simulator(tasks):
    """Runs in a worker, once: (environment, policy, seconds it took to build the environment)."""
    torch.manual_seed(0)
    tokenizer = data.beside("load_tokenizer")(data.beside("train_tokenizer")())
    policy = policy_script.Policy(policy_script.PRESETS["tiny"], tokenizer).eval()
    began = time.perf_counter()
    return BenchEnv(data.parse_tasks(tasks)[0], policy.cfg.image_size), policy, time.perf_counter() - began


def episode(cfg: Config, per_step, init_index, steps):
    """Runs in a worker: one episode of evaluate.py -> (control steps, final frame (3, H, W), seconds that building took)."""
    env, policy, built = simulator(cfg.tasks)
    env.per_step = per_step
    record, frames = evaluate.run_episode(env, policy, evaluate.Config(stop="horizon", max_steps=steps), init_index=init_index)
    return record["steps"], frames[-1], built


def control_steps(cfg: Config):
    """Steps of all processes by the time from the first one's start to the last one's end; median over rounds of their ratio."""
    pools = [data.process_pool(1) for _ in range(cfg.workers)]  # one process each: none takes another's job
    together = lambda pools, *args: [job.result() for job in [pool.submit(episode, cfg, *args) for pool in pools]]
    warm = [together([pool], per_step, 0, 8)[0] for pool in pools for per_step in (False, True)]
    rows = []
    for number in sorted({1, cfg.workers}):
        rates = {False: [], True: []}
        for round_ in range(cfg.rounds):
            frames = {}
            for per_step in (False, True) if round_ % 2 == 0 else (True, False):
                began = time.perf_counter()
                done = together(pools[:number], per_step, round_, cfg.steps)
                rates[per_step].append(sum(steps for steps, _, _ in done) / (time.perf_counter() - began))
                frames[per_step] = done[0][1]
            assert (frames[False] == frames[True]).all(), "the two ways of rendering must give the same episode"
        cells = [f"{statistics.mean(rates[k]):6.1f} [{min(rates[k]):5.1f}, {max(rates[k]):5.1f}]" for k in (False, True)]
        ratio = statistics.median(chunk / step for chunk, step in zip(rates[False], rates[True]))
        rows.append(f"{number:9d} {cells[0]:>24s} {cells[1]:>24s} {ratio:8.2f}x {max(built for _, _, built in warm):16.1f}")
    for pool in pools:
        pool.shutdown()
    return f"{'processes':>9s} {'a render per chunk':>24s} {'a render per step':>24s} {'ratio':>9s} {'build env (s)':>16s}", rows


# ---- imagined control steps per second --------------------------------------------------------------------------------------

@torch.no_grad()
def imagine(world_sim, task, B, chunks=16):
    """Control steps per second of B rollouts under random actions, after a chunk that is not timed."""
    cfg, device = world_sim.cfg, world_sim.latent_mean.device
    frames = torch.randint(0, 256, (B, 3, cfg.image_size, cfg.image_size), dtype=torch.uint8, device=device)
    proprio = torch.tensor([-0.2, 0, 1.1, 3.1, 0, 0, 0.04, -0.04], device=device).repeat(B, 1)
    camera, still = torch.tensor(task.camera, dtype=torch.float32, device=device).expand(B, 3, 4), torch.zeros(B, 15, device=device)
    memory = world_sim.remember(frames, dict(camera=camera, velocity=still[:, :8], previous=still[:, 8:]))
    for chunk in range(chunks + 1):
        began = time.perf_counter() if chunk < 2 else began
        shown, _ = world_sim.predict(memory, proprio, torch.rand(B, cfg.chunk_size, 7, device=device) * 2 - 1)
        shown.cpu()  # wait for the device
    return B * cfg.chunk_size * chunks / (time.perf_counter() - began)


def imagination(cfg: Config):
    pools, rates = [data.process_pool(1) for _ in range(os.cpu_count())], {}
    together = lambda *args: [job.result()[0] for job in [pool.submit(episode, cfg, *args) for pool in pools]]
    for per_step in (False, True):
        together(per_step, 0, 8)
        began = time.perf_counter()
        rates[per_step] = sum(together(per_step, 0, cfg.steps)) / (time.perf_counter() - began)
    for pool in pools:
        pool.shutdown()
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    world_sim, rows = world_sim_script.WorldSim(world_sim_script.PRESETS["tiny"]).eval(), []
    for B in (8, 32):
        speeds = [imagine(world_sim, data.parse_tasks(cfg.tasks)[0], B) for _ in range(cfg.rounds)]
        speed = statistics.median(speeds)
        rows.append(f"{B:9d} {speed:10.1f} [{min(speeds):6.1f}, {max(speeds):6.1f}] {rates[False]:14.1f} {speed / rates[False]:7.1f}x "
                    f"{rates[True]:14.1f} {speed / rates[True]:7.1f}x")
    torch.set_num_threads(1)
    return f"{'batch':>9s} {'imagined':>10s} {'':16s} {'LIBERO, chunk':>14s} {'':8s} {'LIBERO, step':>14s}", rows


# ---- frames per second -----------------------------------------------------------------------------------------------------

def frames(cfg: Config, image_size=128, views=20):
    """One view of one process as LIBERO draws it and as we do, and a control step as robosuite takes it and as we do: CPU time (median),
    and how far the pictures differ."""
    def seconds(do):
        took = []
        for _ in range(views):
            began = time.process_time()
            do()
            took.append(time.process_time() - began)
        return statistics.median(took)

    rows, still = [], np.array([[0, 0, 0, 0, 0, 0, -1.0]])
    for task in data.parse_tasks(cfg.frames_of):
        pictures, rates = [], []
        for grid in (0, 0.004):
            env = data.LiberoEnv(task, image_size, mesh_grid=grid)
            env.reset(0)
            rates.append(1 / seconds(env.render))
            pictures.append(env.render().astype(float))
            steps = [seconds(step) for step in (lambda: env.env.step(still[0]), lambda: env.step_chunk(still, render=False))]
            env.close()
        difference = abs(pictures[0] - pictures[1]).mean()
        rows.append(f"{task.suite + ':' + str(task.index):>16s} {rates[0]:10.1f} {rates[1]:10.1f} {difference:15.2f} "
                    f"{1000 * steps[0]:14.1f} {1000 * steps[1]:10.1f}")
    return f"{'':16s} {'LIBERO':>10s} {'ours':>10s} {'difference/255':>15s} {'robosuite, ms':>14s} {'ours':>10s}", rows


# ---- one iteration of LOOP -------------------------------------------------------------------------------------------------

def timed(module, method, seconds, part):
    """From now on `seconds[part]` grows by what each call of `module.method` takes."""
    call = getattr(module, method)

    def measured(*args, **kwargs):
        began = time.perf_counter()
        result = call(*args, **kwargs)
        seconds[part] += time.perf_counter() - began
        return result
    setattr(module, method, measured)


def loop(cfg: Config, loop_cfg=ppo_loop.PRESETS["tiny"]):
    """Mean over rounds of the same iterations, nothing learned, with dynamic termination and without."""
    loop_cfg = replace(loop_cfg, tasks=cfg.loop_tasks, lr=0.0, lr_heads=0.0)
    run, seconds, rows = data.run_dir(loop_cfg), collections.Counter(), []
    missing = [name for name in ("policy_sft.pt", "world_sim.pt", "reflector.pt") if not (run / name).exists()]
    if missing:
        return f"skipped: {run} lacks {', '.join(missing)}; run: python ppo_loop.py --tasks {cfg.loop_tasks}", rows
    torch.set_num_threads(os.cpu_count())
    policy, policy.noise_scale = policy_script.load_policy(run / "policy_sft.pt"), loop_cfg.noise_scale
    world_sim, reflector = world_sim_script.load_world_sim(run / "world_sim.pt"), reflector_script.load_reflector(run / "reflector.pt")
    episodes, _ = data.training_episodes(loop_cfg, policy.cfg.image_size, policy.cfg.demos_per_task, ("expert", "explore"))
    samples = policy_script.dataset([e for e in episodes if e.source == "expert"], policy.cfg.chunk_size)
    policy.tower.requires_grad_(False)
    policy.prompt_gradient = policy.cfg.attention == "full"
    optimizer = torch.optim.AdamW(policy.parameter_groups(0.0, 0.0))
    for part, calls in dict(policy=[(policy, "act")], simulator=[(world_sim, "predict")],
                            reflector=[(reflector, "see"), (reflector, "read")], update=[(ppo_loop, "update")]).items():
        for call in calls:
            timed(*call, seconds, part)
    for label, threshold in (("as the reflector stops them", reflector.threshold.clone()), ("to the horizon", torch.tensor(2.0))):
        reflector.threshold, executed = threshold, 0
        seconds.clear()
        began = time.perf_counter()
        for number in range(cfg.rounds):
            torch.manual_seed(number)
            rng = np.random.default_rng(number)
            starts = [(episodes[i], ppo_loop.start_frame(episodes[i], loop_cfg, rng)) for i in rng.integers(len(episodes), size=loop_cfg.starts)]
            start = ppo_loop.start_observation(starts, loop_cfg.keyframe_starts, "cpu")
            rollouts = ppo_loop.imagine(policy, world_sim, reflector, start, loop_cfg)
            ppo_loop.update(policy, optimizer, rollouts, loop_cfg, samples)
            executed += int(rollouts.mask.sum())
        whole = (time.perf_counter() - began) / cfg.rounds
        parts = [f"{seconds[part] / cfg.rounds:10.1f}" for part in ("policy", "simulator", "reflector", "update")]
        rows.append(f"{label:28s} {executed / cfg.rounds:14.0f} {' '.join(parts)} {whole:10.1f}")
    torch.set_num_threads(1)
    columns = " ".join(f"{name:>10s}" for name in ("policy", "simulator", "reflector", "update", "whole"))
    return f"{'rollouts':28s} {'control steps':>14s} {columns}", rows


SECTIONS = {"control steps per second, mean [slowest, fastest round]": control_steps,
            "imagined control steps per second, median [slowest, fastest round]": imagination, "frames per second of CPU time": frames,
            "seconds of an iteration of LOOP, mean": loop}


def main(cfg: Config):
    for title, section in SECTIONS.items():
        header, rows = section(cfg)
        print(f"{title}; {cfg.tasks}, {cfg.rounds} x {cfg.steps} steps, {os.cpu_count()} CPU cores", header, *rows, sep="\n")


if __name__ == "__main__":
    data.command_line(main, {"tiny": Config()}, __doc__)
