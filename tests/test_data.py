"""Tasks, orientation, cameras, the three kinds of demonstration files, checkpoints, and the simulator."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import data
from conftest import ROOT, make_episode, write_foreign

CLOSE, OPEN = np.array([[0, 0, 0, 0, 0, 0, 1]] * 8, np.float32), np.array([[0, 0, 0, 0, 0, 0, -1]] * 8, np.float32)


# ---- tasks ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec, expected", [
    ("goal", [("libero_goal", i) for i in range(10)]),
    ("goal:0,3,7", [("libero_goal", i) for i in (0, 3, 7)]),
    ("goal:1+object:2", [("libero_goal", 1), ("libero_object", 2)]),
    ("goal:1+goal:1,2", [("libero_goal", 1), ("libero_goal", 2)]),
    ("libero_spatial:9", [("libero_spatial", 9)]),
    ("libero_90", [("libero_90", i) for i in range(90)]),
    ("all", [(suite, i) for suite in ("libero_goal", "libero_object", "libero_spatial", "libero_10") for i in range(10)]),
])
def test_parse_tasks(spec, expected):
    tasks = data.parse_tasks(spec)
    assert [(task.suite, task.index) for task in tasks] == expected
    assert all(Path(task.bddl_path).exists() and task.instruction and task.max_steps >= 220 for task in tasks)


@pytest.mark.parametrize("spec, says", [("nonsense", "unknown suite 'nonsense'"), ("goal:10", "has no task 10"), ("goal:-1", "has no task -1"), ("goal:one", "not numbers"), ("", "unknown suite"),
                                        ("all:0", "'all'")])
def test_wrong_tasks_are_the_users_error(spec, says):
    with pytest.raises(data.UserError, match=says):
        data.parse_tasks(spec)


# ---- orientation and cameras ---------------------------------------------------------------------------------------------

def test_orient_turns_by_half_a_circle():
    raw = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    oriented = data.orient(raw)
    assert oriented.shape == (2, 3, 5, 7) and (oriented[:, :, 0, 0] == raw[:, -1, -1]).all() and (oriented[:, :, 1, 2] == raw[:, -2, -3]).all()
    assert np.array_equal(np.moveaxis(data.orient(np.moveaxis(oriented, 1, -1)), 1, -1), raw)


def where(env, prefix):
    """(n, 2) row and column in [0, 1] of the oriented pixels that show bodies whose name starts with `prefix`."""
    env.render()  # makes this environment's OpenGL context the current one
    model, size = env.sim.model, 128
    geoms = [i for i in range(model.ngeom) if (model.body_id2name(model.geom_bodyid[i]) or "").startswith(prefix)]
    shown = data.orient(env.sim.render(camera_name="agentview", width=size, height=size, segmentation=True))[1]
    return (np.argwhere(np.isin(shown, geoms)) + 0.5) / size


def check_camera(env):
    """Task.camera agrees with robosuite's own matrix up to orient()'s mirrored columns, and the grip site lands on the gripper in the picture."""
    from robosuite.utils.camera_utils import get_camera_transform_matrix
    points = np.random.default_rng(0).uniform([-0.3, -0.3, 0.1], [0.3, 0.3, 1.2], (50, 3))
    points = np.concatenate([points, np.ones((50, 1))], 1).T
    u, v, depth = env.task.camera @ points
    x, y, z = (get_camera_transform_matrix(env.sim, "agentview", 1, 1) @ points)[:3]
    np.testing.assert_allclose([u / depth, v / depth, depth], [1 - x / z, y / z, z], atol=1e-3)
    u, v, depth = env.task.camera @ np.append(env.proprio()[:3], 1)
    fingers = np.concatenate([where(env, "gripper0_leftfinger"), where(env, "gripper0_rightfinger")])
    assert len(fingers) > 10 and (fingers.min(0) - 0.01 < [v / depth, u / depth]).all() and ([v / depth, u / depth] < fingers.max(0) + 0.01).all()
    robot = where(env, "robot0_link0")
    assert not len(robot) or robot[:, 0].mean() < 0.35  # the base is at the top, as in the published data


def test_camera_on_the_tabletop(env):
    env.reset(0)
    check_camera(env)
    assert len(where(env, "robot0_link0"))
    env.step_chunk(np.array([[0.3, 0.8, -0.4, 0, 0, 0, -1]] * 8, np.float32), render=False)
    check_camera(env)


@pytest.mark.parametrize("scene", ["floor", "kitchen", "living_room", "study"])
def test_camera_in_the_other_scenes_and_no_environment_disturbs_the_other(env, scene):
    task = data.parse_tasks("object:0")[0] if scene == "floor" else next(t for t in data.parse_tasks("long") if scene in t.name.lower())
    env.reset(0)
    before = env.render()
    other = data.LiberoEnv(task, 64)
    other.reset(0)
    check_camera(other)
    shown = other.render()
    assert np.array_equal(env.render(), before) and np.array_equal(other.render(), shown)
    other.close()
    assert np.array_equal(env.render(), before)


def test_pixels_change_where_the_gripper_is_projected(env):
    env.reset(0)
    before = env.render().astype(int)
    env.step_chunk(CLOSE, render=False)
    changed = np.argwhere(np.abs(env.render() - before).max(0) > 25)
    u, v, depth = env.task.camera @ np.append(env.proprio()[:3], 1)
    assert len(changed) and np.linalg.norm(np.median(changed, 0) / 64 - [v / depth, u / depth]) < 0.12


def test_every_task_of_the_four_suites_has_a_camera():
    assert {task.camera.shape for task in data.parse_tasks("all+libero_90")} == {(3, 4)}


# ---- proprio -------------------------------------------------------------------------------------------------------------

def test_axis_angle_is_continuous_where_the_gripper_points_down():
    """Through half a turn about x, each rotation in a random one of the two forms that a simulator may return."""
    rotations = Rotation.from_rotvec([0, 0, 0.2]) * Rotation.from_rotvec(np.deg2rad(np.linspace(165, 195, 61))[:, None] * [1, 0, 0])
    short = rotations.as_rotvec()
    other = short * (1 - 2 * np.pi / np.linalg.norm(short, axis=1, keepdims=True))
    proprio = data.make_proprio(np.zeros((61, 3)), np.where(np.random.default_rng(0).random((61, 1)) < 0.5, short, other), np.ones((61, 2)))
    assert proprio.shape == (61, 8) and proprio.dtype == np.float32
    assert np.abs(np.diff(proprio[:, 3:6], axis=0)).max() < 0.02
    assert (Rotation.from_rotvec(proprio[:, 3:6]) * rotations.inv()).magnitude().max() < 1e-4


def test_proprio_is_the_pose_of_the_gripper(env):
    """Against robosuite's own observations: position of the grip site, orientation of the hand, finger joints."""
    env.reset(0)
    env.step_chunk(np.array([[0.3, -0.5, 0.2, 0.3, 0.2, -0.5, 1]] * 8, np.float32), render=False)
    sim, proprio = env.sim, env.proprio()
    np.testing.assert_allclose(proprio[:3], sim.data.get_site_xpos("gripper0_grip_site"), atol=1e-6)
    hand = Rotation.from_matrix(sim.data.get_body_xmat("robot0_right_hand"))
    assert (Rotation.from_rotvec(proprio[3:6]) * hand.inv()).magnitude() < 1e-4 and proprio[3] >= 0
    np.testing.assert_allclose(proprio[6:], [sim.data.get_joint_qpos(f"gripper0_finger_joint{i}") for i in (1, 2)], atol=1e-6)


# ---- files ---------------------------------------------------------------------------------------------------------------

def test_hdf5_round_trip(tmp_path):
    episode = make_episode(T=21, index=7, success_from=15, source="explore")
    data.write_libero_hdf5(tmp_path / "x.hdf5", episode, "libero_goal")
    again, = data.read_libero_hdf5(tmp_path / "x.hdf5")
    for field in ("frames", "frame_steps", "actions", "success", "states"):
        assert np.array_equal(getattr(again, field), getattr(episode, field)), field
    np.testing.assert_allclose(again.proprio, episode.proprio, atol=1e-5)
    assert (again.task, again.instruction, again.source, again.index) == (episode.task, episode.instruction, "explore", 7)
    assert data.read_libero_hdf5(tmp_path / "x.hdf5", [6]) == []


@pytest.mark.parametrize("raw", [True, False])
def test_foreign_files_are_read_aligned_and_oriented(tmp_path, raw):
    path = write_foreign(tmp_path / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", [0, 2, 10], raw=raw, instruction="turn on the stove")
    episodes = data.read_libero_hdf5(path)
    assert [e.index for e in episodes] == [0, 2, 10] and {e.source for e in episodes} == {"expert"}
    for e in episodes:
        assert (e.task, e.instruction) == ("KITCHEN_SCENE3_turn_on_the_stove", "turn on the stove")
        assert (e.frames[:, :, -1, -1] == 255).all() and e.frames.dtype == np.uint8
        assert len(e.proprio) == len(e.actions) + 1 == len(e.success) and e.success[-1] and not e.success[:-1].any()
        for frame, step in zip(e.frames, e.frame_steps):
            world = frame[0, 0, 0] // 10  # the step of the recording that the frame shows
            assert e.proprio[step, 2] == pytest.approx(world / 100)
            if step < len(e.actions):  # the action taken in that world
                assert e.actions[step, 0] == pytest.approx(world / 100) and e.states[step, 0] == world
        assert len(e.frames) == 6 and len(e.actions) == (5 if raw else 6)


def test_the_instruction_in_a_file_name_is_the_tasks(tmp_path):
    for task in data.parse_tasks("goal:0+object:0+spatial:0+long:0,4,9"):
        episode, = data.read_libero_hdf5(write_foreign(tmp_path / f"{task.name}_demo.hdf5", [0]))
        assert (episode.task, episode.instruction) == (task.name, task.instruction)


def test_an_even_choice_of_demonstrations_is_loaded(tmp_path):
    assert data.spread(50, 5) == [0, 12, 24, 36, 49] and data.spread(3, 5) == [0, 1, 2] and data.spread(5, 1) == [0]
    tasks = data.parse_tasks("goal:1,7")
    for task in tasks:
        write_foreign(tmp_path / "deep" / f"{task.name}_demo.hdf5", range(7), raw=True, instruction=task.instruction)
    data.write_libero_hdf5(tmp_path / "explore.hdf5", make_episode(source="explore", index=4, size=8), "libero_goal")
    episodes = data.load_episodes(tmp_path, tasks, 3)
    assert [(e.task, e.index) for e in episodes] == [(task.name, i) for task in tasks for i in (0, 3, 6)]
    assert all(np.array_equal(e.camera, tasks[0].camera) for e in episodes)
    both = data.load_episodes(tmp_path, tasks, 3, ("expert", "explore"))
    assert sorted(e.source for e in both) == ["expert"] * 6 + ["explore"]


def test_every_fifth_exploration_episode_is_held_out():
    assert [make_episode(index=i, source="explore").held_out for i in range(10)] == ([False] * 4 + [True]) * 2
    assert not make_episode(index=4).held_out


def test_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with data.atomic(path) as part:
        part.write_text("old")
    with pytest.raises(KeyboardInterrupt), data.atomic(path) as part:
        part.write_text("half of the ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


# ---- checkpoints ---------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    run: str = ""
    width: int = 3
    sizes: tuple[int, ...] = (1, 2)


@pytest.fixture
def checkpoint(tmp_path):
    data.save_checkpoint(tmp_path / "policy_sft.pt", "policy_sft", Config(), torch.nn.Linear(2, 2), step=3, finished=False)
    return tmp_path / "policy_sft.pt"


def test_checkpoint_round_trip(checkpoint):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    data.save_checkpoint(checkpoint, "policy_sft", Config(), model, step=4, finished=True)
    loaded = data.load_checkpoint(checkpoint, "policy")
    assert loaded["step"] == 4 and data.from_config(Config, loaded["config"]) == Config() and loaded["versions"]["torch"] == torch.__version__
    assert torch.equal(loaded["model"]["weight"], model.weight)


def test_wrong_kind_damaged_foreign_and_missing_checkpoints_are_the_users_error(checkpoint):
    with pytest.raises(data.UserError, match="this is a policy_sft checkpoint, expected world_sim"):
        data.load_checkpoint(checkpoint, "world_sim")
    whole = checkpoint.read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", b"hello"):
        checkpoint.write_bytes(damaged)
        with pytest.raises(data.UserError, match="not a checkpoint"):
            data.load_checkpoint(checkpoint, "policy")
    torch.save(Config(), checkpoint)  # a pickle is not executed
    with pytest.raises(data.UserError, match="not a checkpoint"):
        data.load_checkpoint(checkpoint, "policy")
    for kind, name, command in [("policy", "policy_sft", "policy.py"), ("policy", "policy_rl", "ppo_loop.py"), ("world_sim", "world_sim", "world_sim.py"), ("reflector", "reflector", "reflector.py")]:
        with pytest.raises(data.UserError, match=f"not found; run: python {command}"):
            data.load_checkpoint(checkpoint.with_name("other") / f"{name}.pt", kind)


def test_a_checkpoint_made_with_other_flags_is_not_resumed(checkpoint):
    found, finished = data.resume(checkpoint, "policy_sft", Config(run="another name"))
    assert found["step"] == 3 and not finished
    with pytest.raises(data.UserError, match=r"sizes=\[1, 2\].*\[1, 3\].*delete it, or pass --run"):
        data.resume(checkpoint, "policy_sft", Config(sizes=(1, 3)))
    assert data.resume(checkpoint.with_name("none.pt"), "policy_sft", Config()) == (None, False)


# ---- the simulator -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("start", [dict(init_index=3), dict(seed=1003)])
def test_an_episode_depends_on_nothing_but_its_index(env, start):
    def episode():
        first = env.reset(**start)
        poses, state = [env.sim.model.body_pos.copy(), env.sim.model.body_quat.copy()], env.state()
        last, _ = env.step_chunk(np.array([[0.5, 0, -0.5, 0, 0, 0.2, 1]] * 8, np.float32))
        return first["frames"], *poses, state, env.state(), last["frames"]
    before = episode()
    env.reset(0)
    env.step_chunk(CLOSE, render=False)  # an earlier episode that ended with the hand closed
    for a, b in zip(before, episode()):
        assert np.array_equal(a, b)
    env.reset(seed=5)
    env.step_chunk(OPEN, render=False)
    assert all(np.array_equal(a, b) for a, b in zip(before, episode()))


@pytest.fixture(scope="module")
def shipped():
    return lambda name, demo, arrays=np.load(ROOT / "data" / "libero_demos.npz"): arrays[f"libero_goal_7/{name}_{demo}"]


@pytest.mark.parametrize("demo", [0, 4])
def test_shipped_actions_replayed_from_the_seed_reach_the_shipped_states(env, shipped, demo):
    env.reset(seed=int(shipped("seed", demo)))
    np.testing.assert_allclose(env.state(), shipped("states", demo)[0], atol=1e-4)
    env.step_chunk(shipped("actions", demo)[:50], render=False)
    np.testing.assert_allclose(env.state(), shipped("states", demo)[50], atol=1e-4)


def test_shipped_states_have_the_shipped_success(env, shipped):
    states, success = shipped("states", 0), shipped("success", 0)
    env.reset(seed=int(shipped("seed", 0)))
    assert success[-1] and not success[0]
    for t in (0, len(states) // 3, -1, 0):
        env.set_state(states[t])
        assert env.env.check_success() == success[t]


def test_gripper_sign_minus_opens_plus_closes(env):
    env.reset(0)
    width = lambda: float(env.proprio()[6] - env.proprio()[7])
    env.step_chunk(CLOSE, render=False)
    env.step_chunk(CLOSE, render=False)
    closed = width()
    env.step_chunk(OPEN, render=False)
    env.step_chunk(OPEN, render=False)
    assert closed < 0.02 and width() > 0.07


def test_reset_waits_until_the_objects_have_settled(env):
    moved = lambda: np.abs(env.state()[1:1 + env.sim.model.nq] - before[1:1 + env.sim.model.nq])[9:].max()
    env.reset(0)
    before = env.state()
    env.env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    settled = moved()
    env.set_state(env.init_states[0])
    before = env.state()
    env.env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    assert settled < 1e-4 < 1e-3 < moved()


def test_only_asked_frames_are_rendered(env, monkeypatch):
    renders, render = [], env.sim.render
    monkeypatch.setattr(env.sim, "render", lambda *args, **kwargs: renders.append(1) or render(*args, **kwargs))
    env.reset(0)
    assert len(renders) == 1
    observation, success = env.step_chunk(OPEN, render=False)
    assert len(renders) == 1 and "frames" not in observation and success.tolist() == [False] * 8
    observation, _ = env.step_chunk(OPEN)
    assert len(renders) == 2 and observation["frames"].shape == (3, 64, 64) and observation["proprio"].shape == (8,)
    env.state(), env.proprio()
    assert len(renders) == 2


def test_the_environment_refuses_what_it_cannot_do(env):
    for actions in (np.full((1, 7), 1.5), np.zeros((1, 8)), np.full((1, 7), np.nan)):
        with pytest.raises(data.UserError, match="actions"):
            env.step_chunk(actions)
    with pytest.raises(data.UserError, match="expected 0 to 49"):
        env.reset(50)
