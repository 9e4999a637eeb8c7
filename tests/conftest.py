"""Shared fixtures. `smoke_run` runs the real command line end to end once, `env` is one real LIBERO task; everything else is random and small."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # threads cost more than they give at this size
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import h5py  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import policy  # noqa: E402

INSTRUCTIONS = ["turn on the stove", "put the wine bottle on top of the cabinet", "open the middle drawer of the cabinet"]


def make_episode(T=22, gap=4, size=32, seed=0, index=0, success_from=None, source="expert", instruction=INSTRUCTIONS[0], task="turn_on_the_stove"):
    """T random actions, a plausible gripper path and random frames every `gap` steps; success holds from step `success_from` on."""
    rng = np.random.default_rng(seed)
    steps = np.arange(0, T + 1, gap)
    start = np.array([-0.2, 0, 1.15, 3.1, 0.05, 0.05, 0.04, -0.04])
    proprio = (start + np.cumsum(rng.normal(0, 0.004, (T + 1, 8)), 0)).astype(np.float32)
    actions = np.concatenate([rng.uniform(-1, 1, (T, 6)), rng.choice([-1.0, 1.0], (T, 1))], 1).astype(np.float32)
    success = np.arange(T + 1) >= (T + 1 if success_from is None else success_from)
    return data.Episode(rng.integers(0, 256, (len(steps), 3, size, size), dtype=np.uint8), steps, proprio, actions, success, rng.normal(size=(T + 1, 5)),
                        instruction, task, source, index, data.parse_tasks("goal:7")[0].camera)


def make_obs(B, size=32, seed=0):
    """A batch of observations: random frames, proprio near the table, instructions of different length."""
    generator = torch.Generator().manual_seed(seed)
    proprio = torch.tensor([-0.2, 0, 1.15, 3.1, 0.05, 0.05, 0.04, -0.04]) + 0.02 * torch.randn(B, 8, generator=generator)
    return dict(frames=torch.randint(0, 256, (B, 3, size, size), dtype=torch.uint8, generator=generator), proprio=proprio, instruction=[INSTRUCTIONS[i % 3] for i in range(B)])


def write_foreign(path, ids, T=6, raw=False, size=8, instruction=None, **override):
    """A file as LIBERO's own tools write it. Step t's world is coded into every array: its image has the value 10 t, its eef height is t / 100.

    Raw official: obs[j] shows the world after actions[j]. Regenerated without no-ops: the world before it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        if raw:
            group.attrs.update(env_args="{}", problem_info=json.dumps(dict(language_instruction=instruction)))
        for i in ids:
            demo, shown = group.create_group(f"demo_{i}"), np.arange(T) + raw
            images = np.repeat(10 * shown, size * size * 3).reshape(T, size, size, 3).astype(np.uint8)
            images[:, 0, 0] = 255  # the corner that a half turn brings to the end
            actions = np.zeros((T, 7))
            actions[:, 0] = np.arange(T) / 100
            arrays = dict(actions=actions, states=np.arange(T)[:, None] + np.zeros((T, 4)), dones=np.eye(T)[-1], rewards=np.eye(T)[-1])
            arrays.update({"obs/agentview_rgb": images, "obs/ee_states": np.array([[0, 0, t / 100, 3.1, 0.1, 0] for t in shown]), "obs/gripper_states": np.tile([0.04, -0.04], (T, 1))})
            for key, value in (arrays | override).items():
                demo[key] = value
    return path


@pytest.fixture(scope="session")
def tokenizer():
    return data.beside("load_tokenizer")(data.beside("train_tokenizer")())


@pytest.fixture(scope="session")
def env():
    """LIBERO-Goal task 7, 64 pixels."""
    env = data.LiberoEnv(data.parse_tasks("goal:7")[0], 64)
    yield env
    env.close()


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """The whole method at `smoke` on two tasks of real LIBERO, by the command a user would type -> its directory, run directory and output."""
    cwd = tmp_path_factory.mktemp("smoke")
    (cwd / "data").mkdir()
    shutil.copy(ROOT / "data" / "libero_demos.npz", cwd / "data")
    done = subprocess.run([sys.executable, ROOT / "ppo_loop.py", "--tasks", "goal:1,7", "--preset", "smoke"], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return SimpleNamespace(cwd=cwd, run=cwd / "runs" / "goal-1-7-smoke", out=done.stdout)
