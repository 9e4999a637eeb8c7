"""Demonstrations on disk, the LIBERO simulator, and everything that crosses a file boundary:
  frames    uint8 (F, 3, H, W), rotated by 180 degrees from the raw buffer (`orient`), as for OpenVLA-OFT's published checkpoints
  proprio   8 floats: eef position (m), eef axis-angle (rad), gripper joint positions (m)
  actions   7 floats in [-1, 1], LIBERO's OSC_POSE convention: +-1 is 5 cm / 0.5 rad; gripper -1 open, +1 close
Dims: T control steps (20 Hz), action t leads from state t to t+1; F frames that were rendered (at `frame_steps`), H W pixels.

  python data.py --check data/     # what demonstrations a directory holds, and what is wrong with them
"""
import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import runpy
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import h5py
import imageio
import numpy as np
import torch.distributed.nn  # here, before there is a process group: its default arguments would keep one from ending
from tqdm import trange

SUITES = {"goal": "libero_goal", "object": "libero_object", "spatial": "libero_spatial", "long": "libero_10"}
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}  # OpenVLA-OFT
SETTLE_STEPS = 10  # initial states have objects 5 cm above the table
FORMAT = "world-env-1"
MISSING = {"explore": "run: python evaluate.py --explore (or use --kinds expert)",
           "imagined": "run: python evaluate.py --imagine (or use --kinds expert explore)"}
# agentview in libero/envs/problems/*.py: x and height (m) over the middle line, degrees between its view and straight down
CAMERAS = {"tabletop": (0.6586, 1.6104, 51.0777), "floor": (0.8966, 0.65, 58.0776), "study_tabletop": (0.4586, 1.6104, 51.0777),
           "living_room_tabletop": (0.6066, 0.96, 58.0776)}


class UserError(Exception):  # a mistake in the user's flags or files: one clear line, exit code 2, no traceback
    pass


def require(condition, message):
    if not condition:
        raise UserError(message)


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
        """(3, 4) matrix: homogeneous world point (m) -> (u, v, 1) * depth, u right and v down in [0, 1] of an oriented frame."""
        scene = Path(self.bddl_path).read_text("utf-8").split("(problem ")[1].split(")")[0].lower()
        scene = scene.removeprefix("libero_").removeprefix("kitchen_").removesuffix("_manipulation")
        require(scene in CAMERAS, f"{self.name}: scene {scene!r} has no known agentview, expected one of {sorted(CAMERAS)}")
        x, height, tilt = CAMERAS[scene]
        sin, cos, focal = np.sin(np.radians(tilt)), np.cos(np.radians(tilt)), 0.5 / np.tan(np.radians(45 / 2))  # in image heights
        right, up, forward = np.array([[0, 1, 0], [-cos, 0, sin], [-sin, 0, -cos]])  # it looks back at the robot
        rows = np.stack([forward / 2 - focal * right, forward / 2 - focal * up, forward])  # orient() mirrors columns: minus right
        return np.concatenate([rows, -rows @ [[x], [0], [height]]], 1)


def beside(name):  # the function `name` of data/<name>.py: details nobody has to read
    return runpy.run_path(str(Path(__file__).parent / "data" / f"{name}.py"))[name]


@functools.lru_cache
def libero_suite(name):  # -> LIBERO's benchmark object
    os.environ.setdefault("MUJOCO_GL", "egl")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
            mock.patch("builtins.input", lambda *_: "n"):  # other distributions than the pinned one ask where to store data sets
        from libero.libero import benchmark
        suites = benchmark.get_benchmark_dict()
        require(name in suites, f"unknown suite {name!r}; expected {', '.join(SUITES)}, all or LIBERO's own such as libero_90")
        return suites[name]()


def parse_tasks(spec: str) -> list[Task]:
    """`goal`, `all`, `goal:0,3,7`, `goal:1+object:2` or LIBERO's own suite names -> tasks. Raises UserError."""
    tasks = []
    for part in "+".join("+".join(SUITES) if part.strip() == "all" else part for part in spec.split("+")).split("+"):
        short, _, indices = part.strip().partition(":")
        suite = libero_suite(name := SUITES.get(short, short))
        require(suite.n_tasks, f"{name} has no tasks in the installed libero")
        for i in indices.split(",") if indices else map(str, range(suite.n_tasks)):
            require(i.strip().lstrip("-").isdigit(), f"task index {i!r} is not a number; write for example --tasks goal:0,3,7")
            require(0 <= (i := int(i)) < suite.n_tasks, f"{name} has no task {i}; expected 0 to {suite.n_tasks - 1}")
            task, bddl_path, instruction = suite.get_task(i), suite.get_task_bddl_file_path(i), suite.get_task(i).language
            if name.endswith(("_lan", "_task")):  # LIBERO-PRO keeps the file name, which `language` is made of
                instruction = Path(bddl_path).read_text("utf-8").split("(:language")[1].split(")")[0].strip()
            steps = next((MAX_STEPS[base] for base in MAX_STEPS if name.startswith(base)), 300)  # LIBERO-PRO: as its base
            tasks.append(Task(name, i, task.name, instruction, bddl_path, steps))
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
    source: str              # "expert", "explore", or "imagined" (frames of the simulator, outcome of the real episode)
    index: int = 0           # demo id, or number of the exploration episode
    camera: np.ndarray = None        # (3, 4) `Task.camera`, filled in by `load_episodes`
    wrist_frames: np.ndarray = None  # (F, 3, H, W) uint8 of the camera in the hand, where asked for
    before: np.ndarray = (0.0,) * 14 + (-1.0,)  # (15,) change of proprio in the step before the first, its action: at rest, hand open

    @property
    def held_out(self):  # every fifth exploration episode, to validate simulator and reflector on
        return self.source != "expert" and self.index % 5 == 4


def orient(image: np.ndarray) -> np.ndarray:
    """Raw OpenGL buffer (..., H, W, 3) of either camera -> (..., 3, H, W), rotated by 180 degrees, as OpenVLA-OFT does."""
    return np.ascontiguousarray(np.moveaxis(image[..., ::-1, ::-1, :], -1, -3))


def make_proprio(position, axis_angle, gripper) -> np.ndarray:
    """(..., 3), (..., 3), (..., 2) -> (..., 8). The gripper points down, a turn of about pi about x, where axis-angle flips its
    sign between frames; of its two equivalent forms the one with x >= 0 is continuous."""
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
    """One episode in LIBERO's layout (images as the raw OpenGL buffer), plus what makes it exact: `frame_steps`, `success`."""
    with atomic(path) as part, h5py.File(part, "w") as file:
        data = file.create_group("data")
        data.attrs.update(format=FORMAT, macros_image_convention="opengl", num_demos=1, total=len(episode.actions), suite=suite,
                          task=episode.task, source=episode.source, versions=json.dumps(versions()),
                          problem_info=json.dumps({"language_instruction": episode.instruction}))
        (demo := data.create_group(f"demo_{episode.index}")).attrs["num_samples"] = len(episode.actions)
        views = dict(agentview_rgb=episode.frames, eye_in_hand_rgb=episode.wrist_frames)
        for key, frames in ((key, frames) for key, frames in views.items() if frames is not None):
            raw = np.moveaxis(frames, 1, -1)[:, ::-1, ::-1]
            demo.create_dataset(f"obs/{key}", data=raw, compression="lzf", chunks=(1, *raw.shape[1:]))
        demo["obs/ee_states"], demo["obs/gripper_states"] = episode.proprio[:, :6], episode.proprio[:, 6:]
        for key in ("actions", "states", "success", "frame_steps", "before"):
            demo[key] = getattr(episode, key)


@contextlib.contextmanager
def open_hdf5(path):
    """A demonstration file -> group `data`, demo ids, task name, source, format; whatever is wrong with it is one UserError."""
    try:
        with h5py.File(path, "r") as file:
            data = file["data"]
            ids = sorted(int(key[5:]) for key in data if key.startswith("demo_"))
            require(ids, f"{path}: no demonstrations inside, expected groups data/demo_0, data/demo_1, ... as LIBERO writes")
            get = data.attrs.get
            kind = "ours" if get("format") == FORMAT else "official raw" if "env_args" in data.attrs else "regenerated"
            yield data, ids, get("task", Path(path).stem.removesuffix("_demo")), get("source", "expert"), kind
    except (OSError, LookupError, ValueError, RuntimeError, AttributeError) as error:  # h5py raises all of these
        busy, empty = isinstance(error, BlockingIOError), os.path.isfile(path) and not os.path.getsize(path)
        require(not busy, f"{path}: is being written by another process; wait until it is done, or close it")
        why = "the file is empty" if empty else str(error).splitlines()[0][:160]
        raise UserError(f"{path}: not a readable LIBERO HDF5 file ({why}); delete it, or copy or record it again") from None


def read_libero_hdf5(path, demo_ids=None, wrist=False, max_frames=None) -> list[Episode]:
    """Episodes of one file: raw official (has `env_args`, observations one step late), regenerated no-noop (aligned), or ours.
    `wrist` reads the camera in the hand too; `max_frames` bounds the frames of an episode, evenly spread. Raises UserError."""
    episodes = []
    with open_hdf5(path) as (data, ids, task, source, kind):
        # by LIBERO's own rule: official files hold another text ("Pick the akita black bowl ..."), which no evaluation uses
        instruction = task.split("SCENE")[-1].lstrip("0123456789").replace("_", " ").strip()
        if kind == "ours":
            instruction = json.loads(data.attrs["problem_info"])["language_instruction"]
        for i in (i for i in ids if demo_ids is None or i in demo_ids):
            demo, where = data[f"demo_{i}"], f"{path}:demo_{i}"
            actions, images = demo["actions"][:].astype(np.float32), demo["obs/agentview_rgb"]
            pose, gripper = demo["obs/ee_states"][:], demo["obs/gripper_states"][:]
            states, before = np.array(demo.get("states", np.zeros((0, 0)))), np.array(demo.get("before", Episode.before))
            check_actions(actions, where)
            require(pose.shape[1:] == (6,) and gripper.shape[1:] == (2,), f"{where}: ee_states {pose.shape} and gripper_states "
                    f"{gripper.shape}, expected (T, 6) and (T, 2) as of LIBERO's Panda; no other robot is supported")
            proprio = make_proprio(*np.split(pose, 2, axis=1), gripper)
            require(np.isfinite(proprio).all(), f"{where}: ee_states or gripper_states are not finite; record it again")
            if kind == "official raw":  # obs[j] shows the world after actions[j]: nothing shows state 0, so the first action goes
                actions, states = actions[1:], states[1:]
            elif kind == "regenerated":  # the state after the last action was not recorded: proprio repeats, no frame shows it
                proprio = np.concatenate([proprio, proprio[-1:]])
            done = bool(demo["dones"][-1]) if "dones" in demo else True
            success = demo["success"][:] if kind == "ours" else (np.arange(len(proprio)) == len(actions)) & done
            frame_steps = demo["frame_steps"][:] if kind == "ours" else np.arange(len(images))
            require(len(proprio) == len(actions) + 1 and images.ndim == 4 and len(images) == len(frame_steps),
                    f"{where}: {len(actions)} actions, {len(proprio)} states and {len(images)} frames do not fit together; "
                    "record it again")
            keep = slice(None) if max_frames is None else spread(len(images), max_frames)
            episodes.append(Episode(orient(images[keep]), frame_steps[keep], proprio, actions, success, states, instruction, task,
                                    source, i, None, orient(demo["obs/eye_in_hand_rgb"][keep]) if wrist else None, before))
    return episodes


def check_actions(actions, where):
    require(actions.ndim == 2 and actions.shape[1] == 7 and len(actions),
            f"{where}: actions have shape {actions.shape}, expected (T, 7); only the OSC_POSE controller is supported")
    require(np.abs(actions).max() <= 1 + 1e-4,  # not so where one is nan
            f"{where}: actions are {actions.min()} to {actions.max()}, expected finite and in [-1, 1]; scale as LIBERO does")


def check_frames(frames, image_size, who):  # frames (..., 3, H, W)
    require(frames.shape[-3:] == (3, image_size, image_size),
            f"frames are {frames.shape[-1]} pixels wide, this {who} expects {image_size}; pass --image-size {image_size}")
    return frames


def load_episodes(demos, tasks, demos_per_task=5, kinds=("expert",), image_size=None, wrist=False) -> list[Episode]:
    """Episodes of `tasks` below directories (or files) `demos`, else the shipped demonstrations, rendered: of each task's expert
    ones `np.linspace(0, n-1, demos_per_task)`, of others all. `image_size` None takes files as they are. Raises UserError."""
    require(demos_per_task >= 1, f"got --demos-per-task {demos_per_task}, expected at least 1")
    roots = [Path(d) for d in ([demos] if isinstance(demos, (str, Path)) else demos)]
    by_task, below = {task.name: task for task in tasks}, f"below {', '.join(map(str, roots))}"
    found = {(name, kind): {} for name in by_task for kind in kinds}  # -> {demo id: path}
    for root in roots:
        require(root.exists(), f"{root} not found; {MISSING.get(root.name, 'data/ has demonstrations')}")
        files = sorted(root.rglob("[!.]*.hdf5"))  # not those that another process is writing; those below rendered/ come later
        for path in [root] if root.is_file() else (file for file in files if root / "rendered" not in file.parents):
            with open_hdf5(path) as (data, ids, name, source, _):
                size = data[f"demo_{ids[0]}/obs/agentview_rgb"].shape[1]
            for i in ids if (name, source) in found else ():
                require(image_size in (None, size),
                        f"{path}: frames are {size}x{size}, expected {image_size}x{image_size}; pass --image-size {size}")
                other = found[name, source].setdefault(i, path)
                require(other == path, f"{path} and {other} both hold demo_{i} of {name}; remove one of them")
    for root in (root for root in roots if "expert" in kinds and (root / "libero_demos.npz").exists()):
        if own := [name for name in by_task if found[name, "expert"]]:
            print(f"demonstrations {below} take the place of the shipped ones of {', '.join(own)}")
        with processes().main_process_first():  # the others find what it rendered
            found |= beside("render_demos")(root, [t for t in tasks if t.name not in own], image_size or 128, demos_per_task, wrist)
    episodes, chosen = [], []
    for (name, kind), paths in found.items():
        task, ids = by_task[name], sorted(paths)
        if kind == "expert":
            require(ids, f"no demonstrations of {task.suite}:{task.index} {below}; expected a file {name}_demo.hdf5")
            ids = [ids[k] for k in spread(len(ids), demos_per_task)]
            chosen.append(f"{task.suite}:{task.index} {','.join(map(str, ids))}")
        episodes += [dataclasses.replace(e, camera=task.camera) for i in ids for e in read_libero_hdf5(paths[i], [i], wrist)]
    chosen and print("demonstrations:", "; ".join(chosen))
    for kind in set(kinds) & set(MISSING):
        require(kind in {e.source for e in episodes}, f"no {kind} episodes {below}; {MISSING[kind]}")
    return episodes


def training_episodes(cfg, image_size, demos_per_task, kinds):  # -> (training, held-out) episodes of a run
    roots = [cfg.demos] + [run_dir(cfg) / kind for kind in MISSING if kind in kinds]
    episodes = load_episodes(roots, parse_tasks(cfg.tasks), demos_per_task, kinds, image_size)
    return [e for e in episodes if not e.held_out], [e for e in episodes if e.held_out]


def spread(n, size):  # `size` of n demonstrations or frames, evenly, as RIPT-VLA picks them
    return sorted(set(np.linspace(0, n - 1, min(size, n), dtype=int).tolist()))


# ---- the simulator, and the shipped demonstrations that it renders ---------------------------------------------------------
def _render_task(root, task, missing, image_size, wrist):  # in a worker: demonstrations [(id, path)] of one task
    shipped, env = np.load(root / "libero_demos.npz"), LiberoEnv(task, image_size, wrist)
    for i, path in missing:
        states, actions, success, *poses = (shipped[f"{task.suite}_{task.index}/{name}_{i}"] for name in
                                            ("states", "actions", "success", "body_pos", "body_quat"))
        env.sim.model.body_pos[:], env.sim.model.body_quat[:] = poses  # fixtures are placed at reset, in the model
        seen = [env.set_state(state) or env.observe() for state in states]
        stack = lambda name: np.stack([obs[name] for obs in seen])
        episode = Episode(stack("frames"), np.arange(len(states)), stack("proprio"), actions, success, states, task.instruction,
                          task.name, "expert", i, wrist_frames=stack("wrist_frames") if wrist else None)
        write_libero_hdf5(path, episode, task.suite)
    env.close()


def process_pool(workers):  # spawned: forking after torch or OpenGL started is unsafe
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)


def _start_worker():  # ends with its parent: idle workers outlive one that is killed
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


class LiberoEnv:
    """One LIBERO task. An episode depends on nothing but its index: every reset is seeded with it (fixtures are placed then)."""

    def __init__(self, task: Task, image_size: int = 128, wrist: bool = False, mesh_grid: float = 0.004):
        suite = libero_suite(task.suite)
        # robosuite's render contexts raise when they are collected half-built or at exit
        sys.unraisablehook = lambda e: e.exc_type.__name__ in ("EGLError", "AttributeError") or sys.__unraisablehook__(e)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                from libero.libero.envs.env_wrapper import ControlEnv
                self.env = ControlEnv(task.bddl_path, use_camera_obs=False, hard_reset=False, ignore_done=True)
        except (ImportError, AttributeError, RuntimeError, ValueError) as error:
            require(isinstance(error, ModuleNotFoundError) or "libero" in str(error).lower(), "no off-screen rendering with "
                    f"MUJOCO_GL={os.environ['MUJOCO_GL']} ({str(error)[:60]!r}); run: apt-get install libegl1 libegl-mesa0 libgl1")
            raise
        self.task, self.image_size, self.wrist, self.init_states = task, image_size, wrist, suite.get_task_init_states(task.index)
        self.env.env._observables = {}  # robosuite's observables cost a quarter of a step and nobody here reads them
        self.env.env.visualize(dict.fromkeys(self.env._visualizations, False))  # no green laser out of the gripper
        self.sim, robot = self.env.sim, self.env.robots[0]
        self._site, self._gripper, self.state = robot.eef_site_id, robot._ref_gripper_joint_pos_indexes, self.env.get_sim_state
        self._body = self.sim.model.body_name2id(robot.robot_model.eef_name)
        self._control_step = beside("control_step")  # robosuite's, in half the time
        beside("draw_faster")(self.sim, mesh_grid * (image_size < 224))  # that large, as published checkpoints see it: LIBERO's own

    def reset(self, init_index=None, seed=None) -> dict:
        """Official initial state `init_index`, or a fresh layout drawn from `seed`; then 10 settle steps -> observation."""
        require(init_index is None or 0 <= init_index < len(self.init_states),
                f"{self.task.name} has no initial state {init_index}, expected 0 to {len(self.init_states) - 1}")
        self.env.seed(seed if init_index is None else init_index)
        self.env.robots[0].gripper.current_action[:] = 0  # robosuite ramps the fingers and keeps the ramp over resets
        for fixture in self.env.env.fixtures_dict.values():  # LIBERO places what stands on them as if they were not placed yet
            body = self.sim.model.body_name2id(fixture.root_body)
            self.sim.model.body_pos[body], self.sim.model.body_quat[body] = 0, (1, 0, 0, 0)
        self.env.reset()
        if init_index is not None:
            self.set_state(self.init_states[init_index])
        return self.step_chunk(np.array([[0, 0, 0, 0, 0, 0, -1.0]] * SETTLE_STEPS))[0]

    def step_chunk(self, actions, render=True) -> tuple[dict, np.ndarray]:
        """Execute actions (K, 7) -> (observation after the last, success (K,) after each). One render at most."""
        check_actions(np.asarray(actions), self.task.name)
        success = np.array([self._control_step(self.env.env, action) for action in actions], bool)
        return self.observe(render), success

    def observe(self, render=True) -> dict:  # `proprio`, `instruction`, with `render` also `frames` and, with `wrist`, `wrist_frames`
        views = dict(frames="agentview") | (dict(wrist_frames="robot0_eye_in_hand") if self.wrist else {})
        pictures = {name: self.render(camera) for name, camera in views.items() if render}
        return dict(pictures, proprio=self.proprio(), instruction=self.task.instruction)

    def render(self, camera="agentview") -> np.ndarray:
        self.sim._render_context_offscreen.gl_ctx.make_current()  # another environment of this process may have been
        return orient(self.sim.render(camera_name=camera, width=self.image_size, height=self.image_size))

    def close(self):
        self.sim._render_context_offscreen.gl_ctx.make_current()  # or the buffers of another environment would be freed
        self.env.close()

    def proprio(self) -> np.ndarray:
        from robosuite.utils.transform_utils import quat2axisangle
        axis_angle = quat2axisangle(np.roll(self.sim.data.body_xquat[self._body], -1))  # MuJoCo's wxyz -> robosuite's xyzw
        return make_proprio(self.sim.data.site_xpos[self._site], axis_angle, self.sim.data.qpos[self._gripper])

    def set_state(self, state):
        self.env.set_state(np.asarray(state, np.float64))
        self.sim.forward()
        self.env._post_process()  # what follows from the state but is not in it: a stove that is on glows


# ---- artifacts: checkpoints, videos, logs, and the command line they share -------------------------------------------------
def versions() -> dict:
    return {name: importlib.metadata.version(name) for name in "torch transformers diffusers mujoco robosuite numpy".split()}


def plain(config) -> dict:  # survives torch's `weights_only`: tuples become lists
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def from_config(cls, saved: dict):  # the inverse of `plain`
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def save_checkpoint(path, kind, config, model, **extra):  # `extra`: tensors and plain values only
    with atomic(path) as part:
        torch.save(dict(kind=kind, config=plain(config), model=model.state_dict(), versions=versions(), **extra), part)


MADE_BY = {"policy_sft": "python policy.py", "policy_rl": "python ppo_loop.py", "world_sim": "python world_sim.py --demos data/",
           "reflector": "python reflector.py --demos data/"}


def load_checkpoint(path, kind, device="cpu") -> dict:
    """What `save_checkpoint` wrote. `kind` is a prefix: 'policy' takes policy_sft and policy_rl. Raises UserError."""
    of_kind = next(MADE_BY[name] for name in MADE_BY if name.startswith(kind))
    command = MADE_BY.get(Path(path).stem, of_kind)
    require(Path(path).exists(), f"{path} not found; run: {command}")
    try:  # of several processes, accelerate calls the CPU cpu:0, a name that torch.load does not know
        got = (checkpoint := torch.load(path, map_location=str(device).replace("cpu:0", "cpu"), weights_only=True))["kind"]
    except Exception as error:  # torch raises a dozen types for a damaged file
        raise UserError(f"{path}: not a checkpoint of ours ({type(error).__name__}); delete it and run: {command}") from None
    require(got.startswith(kind), f"{path}: this is a {got} checkpoint, expected {kind}; pass the file that `{of_kind}` wrote")
    return checkpoint


def resume(path, kind, config, device="cpu", key="config", ignore=("run",)):
    """(checkpoint or None, finished): where training of this stage stands. A file made with other flags is never overwritten."""
    if not Path(path).exists():
        return None, False
    checkpoint, asked, text = load_checkpoint(path, kind, device), plain(config), lambda value: str(value).rstrip("/")  # data/ is data
    differ = [name for name in asked if name not in ignore and text(checkpoint[key].get(name)) != text(asked[name])]
    made = ", ".join(f"{name}={checkpoint[key].get(name)!r}, asked for {asked[name]!r}" for name in differ)
    require(not differ, f"{path} was made with {made}; delete it, or pass --run with a new name")
    return checkpoint, checkpoint["finished"]


def restore(checkpoint, model, optimizer) -> int:  # -> the step at which training goes on
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"] if checkpoint else 0


def processes():  # one, unless `accelerate launch` started the script
    from accelerate import PartialState
    return PartialState(cpu=not torch.cuda.is_available())


def fit(cfg, kind, model, optimizer, checkpoint, phases, loss_of, before_saving=lambda step: {}, **extra):
    """Train `model` in `phases` of so many gradient steps, each with warm-up and cosine decay of the groups' `peak`, from `checkpoint`
    on. `loss_of(phase, step)` -> loss, metrics of this process's share of a batch; gradients are averaged over processes."""
    from accelerate.utils import reduce
    run, ends, first = run_dir(cfg), np.cumsum(phases).tolist(), processes().is_main_process
    name, start, total, began = kind.removesuffix("_sft"), restore(checkpoint, model, optimizer), ends[-1], time.time()
    for step in (bar := trange(start, total, initial=start, total=total, desc=name, mininterval=2, disable=not first)):
        torch.manual_seed(cfg.seed * 1_000_003 + step)  # a step's randomness depends on its number alone: resuming is exact
        phase = sum(step >= end for end in ends)
        done = step - ends[phase] + phases[phase]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1, (done + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done / phases[phase]))
        loss, metrics = loss_of(phase, step)
        optimizer.zero_grad(set_to_none=True)  # parameters without gradient are skipped by AdamW: frozen
        loss.backward()
        trained = [p for p in model.parameters() if p.grad is not None]
        for p in trained:
            p.grad = reduce(p.grad, "mean")
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        saving = (step + 1) % cfg.save_every == 0 or step + 1 in ends
        if first and saving:
            metrics |= before_saving(step + 1)
        metrics = {k: float(v) for k, v in metrics.items()} if saving or (step + 1) % 20 == 0 else None
        if first and metrics:
            bar.set_postfix({k: f"{v:.3f}" for k, v in metrics.items() if not k[-1].isdigit()})
            log(run, name, step + 1, metrics)
        if first and saving:
            save_checkpoint(run / f"{kind}.pt", kind, cfg, model, optimizer=optimizer.state_dict(), step=step + 1, metrics=metrics,
                            finished=step + 1 == total, **extra)
    if first:
        print(f"wrote {run / kind}.pt after {(took := time.time() - began):.0f} s, {(total - start) / took:.2f} steps/s")


def run_dir(config) -> Path:  # runs/<name>/; the default name says tasks and preset, `goal-tiny`
    return Path("runs") / (config.run or f"{config.tasks.replace('libero_', '')}-{config.preset}".translate({58: "-", 44: "-"}))


def save_video(path, frames, fps=10):  # frames (T, 3, H, W) uint8
    with atomic(path) as part:
        imageio.mimwrite(part, list(np.moveaxis(np.asarray(frames), 1, -1)), fps=fps, macro_block_size=None)


def log(run_dir, script, step, metrics):  # appends one line to <run_dir>/<script>.jsonl
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(run_dir) / f"{script}.jsonl", "a") as file:
        print(json.dumps({"step": step, "time": round(time.time(), 1)} | {k: round(float(v), 6) for k, v in metrics.items()}), file=file)


def command_line(run, presets, description):
    """`--preset` picks the defaults, every other flag is a field of the Config; a UserError is one line and exit code 2."""
    import tyro
    name = ([*" ".join(sys.argv[1:]).replace("=", " ").partition("--preset ")[2].split(), "tiny"])[0]
    try:
        require(name in presets, f"unknown preset {name!r}, expected one of {', '.join(presets)}")
        run(tyro.cli(type(presets[name]), default=presets[name], description=description))
        torch.distributed.is_initialized() and torch.distributed.destroy_process_group()  # or gloo's threads may abort at exit
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parent / "data" / "check_demos.py"), run_name="__main__")
