"""Tasks, orientation, cameras, the three kinds of demonstration files, `--check`, checkpoints, rendering, and the simulator."""
import dataclasses
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import data
import world_sim
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


@pytest.mark.parametrize("spec, says", [
    ("nonsense", "unknown suite 'nonsense'"), ("goal:10", "has no task 10"), ("goal:-1", "has no task -1"),
    ("goal:one", "not a number"), ("goal:1,", "not a number"), ("", "unknown suite"), ("all:0", "'all'")])
def test_wrong_tasks_are_the_users_error(spec, says):
    with pytest.raises(data.UserError, match=says):
        data.parse_tasks(spec)


def test_a_libero_that_asks_on_stdin_is_answered(tmp_path, monkeypatch):
    """The official distribution asks for a folder when it is first imported."""
    package = tmp_path / "libero" / "libero"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("answer = input('custom path for the dataset folder? (Y/N): ')")
    (package / "benchmark.py").write_text("from libero.libero import answer\n"
                                          "get_benchmark_dict = lambda: {'suite': lambda: answer}")
    for name in [name for name in sys.modules if name.split(".")[0] == "libero"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert data.libero_suite.__wrapped__("suite") == "n"
    for name in [name for name in sys.modules if name.split(".")[0] == "libero"]:
        del sys.modules[name]  # monkeypatch puts the real ones back


# ---- orientation and cameras ---------------------------------------------------------------------------------------------

def test_orient_turns_by_half_a_circle():
    raw = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    oriented = data.orient(raw)
    assert oriented.shape == (2, 3, 5, 7) and (oriented[:, :, 0, 0] == raw[:, -1, -1]).all()
    assert (oriented[:, :, 1, 2] == raw[:, -2, -3]).all()
    assert np.array_equal(np.moveaxis(data.orient(np.moveaxis(oriented, 1, -1)), 1, -1), raw)


def where(env, prefix):
    """(n, 2) row and column in [0, 1] of the oriented pixels that show bodies whose name starts with `prefix`."""
    env.render()  # makes this environment's OpenGL context the current one
    model, size = env.sim.model, 128
    geoms = [i for i in range(model.ngeom) if (model.body_id2name(model.geom_bodyid[i]) or "").startswith(prefix)]
    shown = data.orient(env.sim.render(camera_name="agentview", width=size, height=size, segmentation=True))[1]
    return (np.argwhere(np.isin(shown, geoms)) + 0.5) / size


def check_camera(env):
    """Task.camera agrees with robosuite's own matrix up to orient()'s mirrored columns, and the grip site, projected and drawn by
    `world_sim.action_map`, lands on the gripper in the picture."""
    from robosuite.utils.camera_utils import get_camera_transform_matrix
    points = np.random.default_rng(0).uniform([-0.3, -0.3, 0.1], [0.3, 0.3, 1.2], (50, 3))
    points = np.concatenate([points, np.ones((50, 1))], 1).T
    u, v, depth = env.task.camera @ points
    x, y, z = (get_camera_transform_matrix(env.sim, "agentview", 1, 1) @ points)[:3]
    np.testing.assert_allclose([u / depth, v / depth, depth], [1 - x / z, y / z, z], atol=1e-3)
    u, v, depth = env.task.camera @ np.append(env.proprio()[:3], 1)
    fingers = np.concatenate([where(env, "gripper0_leftfinger"), where(env, "gripper0_rightfinger")])
    assert len(fingers) > 10
    assert (fingers.min(0) - 0.01 < [v / depth, u / depth]).all() and ([v / depth, u / depth] < fingers.max(0) + 0.01).all()
    proprio, camera = torch.tensor(env.proprio())[None, None], torch.tensor(env.task.camera, dtype=torch.float32)[None]
    drawn = world_sim.action_map(world_sim.project(proprio, camera), proprio[..., 6:], 24)[0, 0, 0]
    row, column = (np.array(divmod(int(drawn.argmax()), 24)) + 0.5) / 24
    assert drawn.max() > 0.4  # the brightest of 24 x 24 cells is between the fingers, half a cell of rounding apart
    assert (fingers.min(0) - 0.5 / 24 < [row, column]).all() and ([row, column] < fingers.max(0) + 0.5 / 24).all()
    robot = where(env, "robot0_link0")
    assert not len(robot) or robot[:, 0].mean() < 0.35  # the base is at the top, as in the published data


def test_camera_on_the_tabletop(env):
    env.reset(0)
    check_camera(env)
    assert len(where(env, "robot0_link0"))
    env.step_chunk(np.array([[0.3, 0.8, -0.4, 0, 0, 0, -1]] * 8, np.float32), render=False)
    check_camera(env)


@pytest.mark.parametrize("scene", ["spatial:0", "object:0", "kitchen", "living_room", "study"])
def test_camera_in_the_other_scenes_and_no_environment_disturbs_the_other(env, scene):
    task = next(task for task in data.parse_tasks(scene if ":" in scene else "long") if ":" in scene or scene in task.name.lower())
    env.reset(0)
    before = env.render()
    other = data.LiberoEnv(task, 64)
    other.reset(0)
    check_camera(other)
    shown = other.render()
    assert np.array_equal(other.render(), shown) and np.array_equal(env.render(), before)
    other.close()  # while the first one's GL context is current
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
    turns = np.deg2rad(np.linspace(165, 195, 61))[:, None] * [1, 0, 0]
    rotations = Rotation.from_rotvec([0, 0, 0.2]) * Rotation.from_rotvec(turns)
    short = rotations.as_rotvec()
    other = short * (1 - 2 * np.pi / np.linalg.norm(short, axis=1, keepdims=True))
    either = np.where(np.random.default_rng(0).random((61, 1)) < 0.5, short, other)
    proprio = data.make_proprio(np.zeros((61, 3)), either, np.ones((61, 2)))
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
    episode = dataclasses.replace(make_episode(T=21, index=7, success_from=15, source="explore"), before=np.arange(15.0))
    data.write_libero_hdf5(tmp_path / "x.hdf5", episode, "libero_goal")
    again, = data.read_libero_hdf5(tmp_path / "x.hdf5")
    for field in ("frames", "frame_steps", "actions", "success", "states", "before"):
        assert np.array_equal(getattr(again, field), getattr(episode, field)), field
    np.testing.assert_allclose(again.proprio, episode.proprio, atol=1e-5)
    assert (again.task, again.instruction, again.source, again.index) == (episode.task, episode.instruction, "explore", 7)
    assert data.read_libero_hdf5(tmp_path / "x.hdf5", [6]) == []


@pytest.mark.parametrize("raw", [True, False])
def test_foreign_files_are_read_aligned_and_oriented(tmp_path, raw):
    path = tmp_path / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5"
    write_foreign(path, [0, 2, 10], raw=raw, instruction="Turn on that stove")
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


def test_an_even_choice_of_demonstrations_is_loaded(tmp_path, capsys):
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
    assert capsys.readouterr().out == "demonstrations: libero_goal:1 0,3,6; libero_goal:7 0,3,6\n" * 2
    assert len(data.load_episodes(tmp_path, tasks, kinds=("explore",))) == 1 and not capsys.readouterr().out


def test_every_fifth_exploration_episode_is_held_out():
    for source in ("explore", "imagined"):
        assert [make_episode(index=i, source=source).held_out for i in range(10)] == ([False] * 4 + [True]) * 2
    assert not make_episode(index=4).held_out


def test_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with data.atomic(path) as part:
        part.write_text("old")
    with pytest.raises(KeyboardInterrupt), data.atomic(path) as part:
        part.write_text("half of the ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


# ---- files as LIBERO's and OpenVLA-OFT's scripts record them ----------------------------------------------------------------

BOWL_ON_PLATE = "goal:8"


@pytest.fixture(scope="module")
def plate():
    """LIBERO-Goal task 8 with both cameras, 64 pixels."""
    env = data.LiberoEnv(data.parse_tasks(BOWL_ON_PLATE)[0], 64, wrist=True)
    yield env
    env.close()


@pytest.fixture(scope="module")
def recorded(plate, tmp_path_factory):
    """24 actions of a shipped demonstration, in which the hand closes on the bowl, with robosuite's own observations of them, in
    the layouts of LIBERO's scripts/create_dataset.py and of OpenVLA-OFT's regenerate_libero_dataset.py."""
    from robosuite.utils.transform_utils import quat2axisangle
    arrays, key, folder = np.load(ROOT / "data" / "libero_demos.npz"), "libero_goal_8", tmp_path_factory.mktemp("recorded")
    env, first = plate.env.env, 24
    env.use_camera_obs, env.camera_heights, env.camera_widths = True, [64, 64], [64, 64]
    env._observables = env._setup_observables()  # LiberoEnv switches them off
    plate.env.reset()
    plate.sim.model.body_pos[:], plate.sim.model.body_quat[:] = arrays[f"{key}/body_pos_0"], arrays[f"{key}/body_quat_0"]
    plate.set_state(arrays[f"{key}/states_0"][first])
    actions, states, after = arrays[f"{key}/actions_0"][first:first + 24], [], []
    actions[:, 0] += 0.01  # the expert waits for its fingers; the regeneration would drop actions that do nothing
    for action in actions:
        states.append(plate.state())
        after.append(env.step(action)[0])
    states.append(plate.state())
    env._observables = {}
    assert np.linalg.norm(actions[:, :6], axis=1).min() > 1e-4  # nothing that the regeneration would drop

    def write(path, steps, observations, attributes):
        """`observations[k]` belongs to `actions[steps[k]]`; the names and shapes are the same in both scripts."""
        with h5py.File(folder / path, "w") as file:
            group = file.create_group("data")
            group.attrs.update(attributes)
            demo, last = group.create_group("demo_0"), np.eye(len(steps), dtype=np.uint8)[-1]
            column = lambda name: np.stack([o[f"robot0_{name}"] for o in observations])
            ee = np.hstack([column("eef_pos"), [quat2axisangle(o["robot0_eef_quat"]) for o in observations]])
            arrays = dict(gripper_states=column("gripper_qpos"), joint_states=column("joint_pos"), ee_states=ee, ee_pos=ee[:, :3],
                          ee_ori=ee[:, 3:], eye_in_hand_rgb=column("eye_in_hand_image"),
                          agentview_rgb=np.stack([o["agentview_image"] for o in observations]))
            for key, value in arrays.items():
                demo[f"obs/{key}"] = value
            demo["robot_states"] = np.hstack([column("gripper_qpos"), column("eef_pos"), column("eef_quat")])
            demo["actions"], demo["states"], demo["rewards"], demo["dones"] = actions[steps], np.array(states)[steps], last, last
        return folder / path

    name, steps = "put_the_bowl_on_the_plate_demo.hdf5", np.arange(5, 24)  # create_dataset.py drops the first five steps
    (folder / "raw").mkdir()
    (folder / "regenerated").mkdir()
    problem = dict(problem_name="libero_tabletop_manipulation", domain_name="robosuite",
                   language_instruction="Put the bowl on the plate")
    raw = write(f"raw/{name}", steps, [after[j] for j in steps], dict(
        env_name="Libero_Tabletop_Manipulation", problem_info=json.dumps(problem), macros_image_convention="opengl",
        env_args=json.dumps(dict(type=1, env_name="Libero_Tabletop_Manipulation")), num_demos=1, total=len(steps)))
    regenerated = write(f"regenerated/{name}", steps, [after[j - 1] for j in steps], {})
    return SimpleNamespace(raw=raw, regenerated=regenerated, actions=actions[5:], states=np.array(states)[5:])


def test_raw_official_and_regenerated_files_hold_the_same_episode(recorded):
    (raw,), (regenerated,) = (data.read_libero_hdf5(path, wrist=True) for path in (recorded.raw, recorded.regenerated))
    assert (len(raw.actions), len(regenerated.actions)) == (18, 19)
    assert raw.frame_steps.tolist() == regenerated.frame_steps.tolist() == list(range(19))
    for episode, start in ((raw, 1), (regenerated, 0)):  # the first world that each of them shows
        assert np.array_equal(episode.actions, recorded.actions[start:])
        assert np.array_equal(episode.states, recorded.states[start:-1])
        task, = data.parse_tasks(BOWL_ON_PLATE)
        assert (episode.task, episode.instruction) == (task.name, task.instruction)
        assert episode.success.tolist() == [False] * len(episode.actions) + [True]
    for name in ("frames", "wrist_frames"):
        assert np.array_equal(getattr(raw, name)[:-1], getattr(regenerated, name)[1:]), name
    np.testing.assert_array_equal(raw.proprio[:-1], regenerated.proprio[1:-1])


def test_official_frames_and_proprio_are_of_the_states_they_claim(recorded, plate):
    """Proprio is what `LiberoEnv.proprio` says of the state, the picture is the one rendered of it and not of its neighbours, and
    the projected gripper lies on the fingers that the simulator draws."""
    episode, = data.read_libero_hdf5(recorded.raw)
    states, renders = recorded.states[1:], {}
    for t in range(len(episode.proprio)):
        plate.set_state(states[t])
        np.testing.assert_allclose(episode.proprio[t], plate.proprio(), atol=2e-3)  # robosuite looks 2 ms before a step ends
        if t in (0, 1, 2, 10):
            renders[t] = plate.render().astype(int)
            u, v, depth = plate.task.camera @ np.append(episode.proprio[t, :3], 1)
            fingers = np.concatenate([where(plate, "gripper0_leftfinger"), where(plate, "gripper0_rightfinger")])
            assert (fingers.min(0) - 0.02 < [v / depth, u / depth]).all()
            assert ([v / depth, u / depth] < fingers.max(0) + 0.02).all()
    error = lambda t, frame: np.abs(renders[t] - frame).mean()
    assert error(1, episode.frames[1]) < min(error(0, episode.frames[1]), error(2, episode.frames[1])) / 3
    for turned in (episode.frames[1][:, ::-1], episode.frames[1][:, :, ::-1], episode.frames[1][:, ::-1, ::-1]):
        assert error(1, turned) > 10 * error(1, episode.frames[1])


@pytest.mark.parametrize("kind", ["raw", "regenerated"])
def test_the_gripper_closes_when_the_action_says_so(recorded, kind):
    episode, = data.read_libero_hdf5(getattr(recorded, kind))
    close, opening = int(np.argmax(episode.actions[:, 6] > 0)), episode.proprio[:, 6] - episode.proprio[:, 7]
    assert 2 <= close <= 6 and (episode.actions[close:, 6] > 0).all() and (episode.actions[:close, 6] < 0).all()
    assert (np.diff(opening[:close + 1]) > -1e-4).all() and opening[close] > 0.07
    assert opening[close + 1] < opening[close] - 1e-4 and (np.diff(opening[close:close + 6]) < -1e-4).all(), np.diff(opening)


def test_the_wrist_view_is_the_camera_in_the_hand(recorded, plate, tmp_path):
    """It differs from agentview, shows the fingers at the same place wherever the hand is, and survives a file of ours."""
    episode, = data.read_libero_hdf5(recorded.raw, wrist=True)
    assert episode.wrist_frames.shape == episode.frames.shape and data.read_libero_hdf5(recorded.raw)[0].wrist_frames is None
    model, places = plate.sim.model, []
    for t in (0, 2):
        plate.set_state(recorded.states[1:][t])
        seen = plate.observe()
        difference = lambda frame: np.abs(seen["wrist_frames"].astype(int) - frame).mean()
        assert difference(episode.wrist_frames[t]) < 3 and difference(seen["frames"]) > 20
        assert difference(episode.wrist_frames[t][:, ::-1, ::-1]) > 20  # turned as agentview is
        geoms = [i for i in range(model.ngeom) if "finger" in (model.body_id2name(model.geom_bodyid[i]) or "")]
        shown = plate.sim.render(camera_name="robot0_eye_in_hand", width=64, height=64, segmentation=True)
        places.append(np.isin(data.orient(shown)[1], geoms))
    assert places[0].sum() > 50 and (places[0] & places[1]).sum() > 0.9 * (places[0] | places[1]).sum()
    data.write_libero_hdf5(tmp_path / "x.hdf5", episode, "libero_goal")
    again, = data.read_libero_hdf5(tmp_path / "x.hdf5", wrist=True)
    assert np.array_equal(again.wrist_frames, episode.wrist_frames) and np.array_equal(again.frames, episode.frames)


# ---- demonstrations that cannot be used, and the choice of those that can --------------------------------------------------

def test_demonstrations_of_another_robot_are_refused(tmp_path):
    for number, (override, says) in enumerate([
            ({"actions": np.zeros((6, 8))}, r"actions have shape \(6, 8\), expected \(T, 7\); only the OSC_POSE controller"),
            ({"actions": np.zeros((0, 7))}, r"actions have shape \(0, 7\)"),
            ({"obs/ee_states": np.zeros((6, 7))}, r"ee_states \(6, 7\) and gripper_states \(6, 2\), expected \(T, 6\) and"),
            ({"obs/gripper_states": np.zeros((6, 1))}, "no other robot is supported"),
            ({"obs/ee_states": np.full((6, 6), np.nan)}, "not finite")]):
        path = write_foreign(tmp_path / f"{number}_demo.hdf5", [0], **override)
        with pytest.raises(data.UserError, match=f"{path}:demo_0: .*{says}"):
            data.read_libero_hdf5(path)
    with h5py.File(path := write_foreign(tmp_path / "joints_demo.hdf5", [0]), "a") as file:
        file.move("data/demo_0/obs/ee_states", "data/demo_0/obs/joint_states")
    with pytest.raises(data.UserError, match="joints_demo.*'ee_states' doesn't exist"):
        data.read_libero_hdf5(path)
    with pytest.raises(data.UserError, match="'eye_in_hand_rgb' doesn't exist"):
        data.read_libero_hdf5(write_foreign(tmp_path / "x_demo.hdf5", [0]), wrist=True)


@pytest.fixture
def busy(tmp_path):
    """A demonstration file that another process has open for writing."""
    path = write_foreign(tmp_path / "busy" / "turn_on_the_stove_demo.hdf5", [0])
    code = f"import h5py, sys; file = h5py.File({str(path)!r}, 'a'); print('open', flush=True); sys.stdin.read()"
    writer = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "open\n"
    yield path
    writer.communicate("")


def test_a_file_that_is_being_written_is_not_read(busy):
    with pytest.raises(data.UserError, match="busy.*is being written by another process; wait until it is done, or close it"):
        data.load_episodes(busy.parent, data.parse_tasks("goal:7"))


def test_the_same_demonstration_in_two_files_is_an_error_that_names_both(tmp_path):
    stove, = data.parse_tasks("goal:7")
    mine = write_foreign(tmp_path / "mine" / f"{stove.name}_demo.hdf5", [0, 1], raw=True, instruction="Turn on the stove")
    write_foreign(tmp_path / "more" / f"{stove.name}_demo.hdf5", [2, 3])
    assert [e.index for e in data.load_episodes([tmp_path, tmp_path / "mine"], [stove])] == [0, 1, 2, 3]
    shutil.copytree(mine.parent, tmp_path / "copy")
    with pytest.raises(data.UserError, match=f"{mine} and .*copy/{mine.name} both hold demo_0 of turn_on_the_stove"):
        data.load_episodes(tmp_path, [stove])


def test_the_users_demonstrations_take_the_place_of_the_shipped_ones(tmp_path, monkeypatch, capsys):
    stove, bowl = data.parse_tasks("goal:7,8")
    write_foreign(tmp_path / f"{stove.name}_demo.hdf5", [0, 1], size=32)
    shutil.copy(ROOT / "data" / "libero_demos.npz", tmp_path)

    def render(root, task, missing, image_size, wrist):
        assert (task, image_size, wrist) == (bowl, 32, False)
        for i, path in missing:
            data.write_libero_hdf5(path, make_episode(index=i, size=32, task=task.name), task.suite)
    monkeypatch.setattr(data, "_render_task", render)
    monkeypatch.setattr(data, "process_pool", lambda workers: ThreadPoolExecutor(1))
    episodes = data.load_episodes(tmp_path, [stove, bowl], 3, image_size=32)
    assert [(e.task, e.index) for e in episodes] == [(stove.name, i) for i in (0, 1)] + [(bowl.name, i) for i in (0, 2, 4)]
    out = capsys.readouterr().out
    assert f"demonstrations below {tmp_path} take the place of the shipped ones of turn_on_the_stove\n" in out
    shipped = np.load(ROOT / "data" / "libero_demos.npz")
    frames = sum(len(shipped[f"{bowl.suite}_{bowl.index}/states_{i}"]) for i in (0, 2, 4))
    assert f"rendering 3 shipped demonstrations at 32x32: {frames} frames" in out
    assert out.endswith("demonstrations: libero_goal:7 0,1; libero_goal:8 0,2,4\n")
    # what was rendered for other choices before does not change the choice
    assert [e.index for e in data.load_episodes(tmp_path, [bowl], 4, image_size=32)] == [0, 1, 2, 4]
    assert [e.index for e in data.load_episodes(tmp_path, [bowl], 3, image_size=32)] == [0, 2, 4]


@pytest.mark.parametrize("number", [0, -1])
def test_no_demonstrations_per_task_are_refused(tmp_path, number):
    with pytest.raises(data.UserError, match=f"got --demos-per-task {number}, expected at least 1"):
        data.load_episodes(tmp_path, data.parse_tasks("goal:7"), number)


def test_of_a_suite_of_official_size_only_what_is_needed_is_read(tmp_path):
    """500 demonstrations with both cameras, 7.4 GB if they were read: 50 of them in under 1 GB and 10 s; `--check` in 0.2 GB."""
    frame = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    images = np.broadcast_to(frame, (150, 128, 128, 3)) + np.arange(150, dtype=np.uint8)[:, None, None, None]
    pose = np.tile([-0.2, 0, 1.1, 3.1, 0, 0], (150, 1))
    for task in data.parse_tasks("goal"):
        with h5py.File(tmp_path / f"{task.name}_demo.hdf5", "w") as file:
            file.create_group("data").attrs["env_args"] = "{}"
            for i in range(50):
                demo = file["data"].create_group(f"demo_{i}")
                demo["actions"], demo["states"], demo["dones"] = np.full((150, 7), i / 100), np.zeros((150, 79)), np.eye(150)[-1]
                demo["obs/ee_states"], demo["obs/gripper_states"] = pose, np.zeros((150, 2))
                for name in ("agentview_rgb", "eye_in_hand_rgb"):
                    demo.create_dataset(f"obs/{name}", (150, 128, 128, 3), np.uint8, chunks=(1, 128, 128, 3))
                if i in (0, 12, 24, 36, 49):
                    demo["obs/agentview_rgb"][:] = images
    code = f"""
import runpy, time
import data
tasks = data.parse_tasks("goal")
# in GB; getrusage's ru_maxrss starts at the peak of the process that started this one
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e6
check = runpy.run_path({str(ROOT / "data" / "check_demos.py")!r})
before, began = peak(), time.time()
try:
    check["check"](check["Config"]({str(tmp_path)!r}))
except data.UserError:
    pass
middle, looked = peak(), time.time()
episodes = data.load_episodes({str(tmp_path)!r}, tasks, 5)
assert [e.index for e in episodes] == 10 * [0, 12, 24, 36, 49] and all(e.frames[7].std() > 60 for e in episodes)
print(middle - before, peak() - before, looked - began, time.time() - looked)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *_, ids, figures = done.stdout.strip().splitlines()
    assert ids == "demonstrations: " + "; ".join(f"libero_goal:{i} 0,12,24,36,49" for i in range(10))
    check_gb, load_gb, check_s, load_s = map(float, figures.split())
    assert check_gb < 0.2 and 0.3 < load_gb < 1 and load_s < 10, figures


# ---- rendering -----------------------------------------------------------------------------------------------------------

def test_a_rendering_that_is_killed_keeps_what_was_done_and_leaves_no_process(tmp_path, monkeypatch):
    """kill -9 in the middle of six demonstrations of 8 states, two processes: each loses at most the one it was at."""
    shipped, key, stove = np.load(ROOT / "data" / "libero_demos.npz"), "libero_goal_7", data.parse_tasks("goal:7")
    short = {f"{key}/{name}_{i}": shipped[f"{key}/{name}_0"][:end] for i in range(6) for name, end in
             dict(states=8, actions=7, success=8, body_pos=None, body_quat=None).items()}
    np.savez(tmp_path / "libero_demos.npz", **short, **{f"{key}/num_demos": 6})
    (tmp_path / "render.py").write_text(f"""
import data
if __name__ == "__main__":
    data.load_episodes({str(tmp_path)!r}, data.parse_tasks("goal:7"), 6, image_size=32, wrist=True)""")
    files = lambda: sorted((tmp_path / "rendered" / "32-wrist" / "libero_goal" / "turn_on_the_stove").glob("demo_*.hdf5"))
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:  # a worker that lives on would keep a pipe open
        environment = os.environ | dict(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
        parent = subprocess.Popen([sys.executable, tmp_path / "render.py"], env=environment, stdout=out, stderr=err)
    while len(files()) < 2 and parent.poll() is None:
        time.sleep(0.05)
    workers = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert parent.returncode == -signal.SIGKILL, err[-2000:]
    assert out.startswith("rendering 6 shipped demonstrations at 32x32: 48 frames, about 0 min") and "demo" in err
    lives = lambda stat: stat.exists() and stat.read_text().split()[2] != "Z"
    running = lambda: [pid for pid in workers if lives(Path(f"/proc/{pid}/stat"))]
    for _ in range(200):
        if not running():
            break
        time.sleep(0.05)
    left = running()
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert len(workers) >= 2 and not left
    kept = {int(path.stem[5:]): path.stat().st_mtime_ns for path in files()}
    assert 2 <= len(kept) < 6
    for i in kept:
        episode, = data.read_libero_hdf5(files()[0].with_name(f"demo_{i}.hdf5"), wrist=True)
        assert episode.index == i and len(episode.frames) == len(episode.wrist_frames) == 8 and episode.frames.std() > 20
    asked = []

    def render(root, task, missing, image_size, wrist):
        for i, path in missing:
            asked.append(i)
            data.write_libero_hdf5(path, make_episode(index=i, size=32), task.suite)
    monkeypatch.setattr(data, "_render_task", render)
    monkeypatch.setattr(data, "process_pool", lambda workers: ThreadPoolExecutor(1))
    found = data.beside("render_demos")(tmp_path, stove, 32, 6, wrist=True)
    assert sorted(asked) == sorted(set(range(6)) - set(kept)) and list(found["turn_on_the_stove", "expert"].values()) == files()
    assert all(path.stat().st_mtime_ns == kept.get(int(path.stem[5:]), path.stat().st_mtime_ns) for path in files())
    data.beside("render_demos")(tmp_path, stove, 32, 6, wrist=True)
    assert len(asked) == 6 - len(kept)  # nothing is left to render


# ---- python data.py --check ----------------------------------------------------------------------------------------------

CHECK = runpy.run_path(str(ROOT / "data" / "check_demos.py"))


def check(capsys, path):
    """-> rows of the table, lines of defects; a UserError, which is exit code 2, if and only if there are any."""
    code = 0
    capsys.readouterr()
    try:
        CHECK["check"](CHECK["Config"](str(path)))
    except data.UserError:
        code = 2
    lines = capsys.readouterr().out.strip().splitlines()
    end = next(n for n, line in enumerate(lines) if "demonstrations (steps" in line)
    assert code == (2 if lines[end + 1:] else 0)
    return lines[1:end], lines[end + 1:]


@pytest.fixture(scope="module")
def moving(env):
    """The arm on its way to the stove: a shipped demonstration seen at 12 of its states."""
    shipped, model = np.load(ROOT / "data" / "libero_demos.npz"), env.sim.model
    model.body_pos[:], model.body_quat[:] = shipped["libero_goal_7/body_pos_0"], shipped["libero_goal_7/body_quat_0"]
    states, seen = shipped["libero_goal_7/states_0"][::7][:12], []
    for state in states:
        env.set_state(state)
        seen.append(env.observe())
    frames, proprio = (np.stack([obs[name] for obs in seen]) for name in ("frames", "proprio"))
    return data.Episode(frames, np.arange(12), proprio, np.zeros((11, 7), np.float32), np.arange(12) == 11, states,
                        "turn on the stove", "turn_on_the_stove", "expert", 3)


@pytest.mark.parametrize("says, turn", {
    "as expected": lambda frames: frames, "upside down": lambda frames: frames[:, :, ::-1],
    "mirrored": lambda frames: frames[..., ::-1], "upside down and mirrored": lambda frames: frames[:, :, ::-1, ::-1],
    "cannot be told": lambda frames: frames[[0] * 12]}.items(), ids=lambda x: x if isinstance(x, str) else "")
def test_orientation_is_seen_in_the_pixels(moving, tmp_path, capsys, says, turn):
    data.write_libero_hdf5(tmp_path / "x.hdf5", dataclasses.replace(moving, frames=turn(moving.frames)), "libero_goal")
    (row,), defects = check(capsys, tmp_path)
    assert row.startswith("libero_goal:7 turn_on_the_stove ") and f"  {says}  " in row
    assert len(defects) == ("down" in says or "mirrored" in says)
    assert all(line.startswith(f"{tmp_path}/x.hdf5: frames are {says}; ") for line in defects)


def test_orientation_of_official_files(recorded, tmp_path, capsys):
    """As they are, and with the images turned to stand upright as many conversions leave them."""
    for path in (recorded.raw, recorded.regenerated):
        assert check(capsys, path)[1] == []
        shutil.copy(path, tmp_path / path.name)
        with h5py.File(tmp_path / path.name, "a") as file:
            images = file["data/demo_0/obs/agentview_rgb"]
            images[:] = images[:][:, ::-1]
        assert "upside down" in check(capsys, tmp_path / path.name)[1][0]


def test_the_table(tmp_path, capsys):
    write_foreign(tmp_path / "a" / "turn_on_the_stove_demo.hdf5", [0], raw=True, instruction="x")
    write_foreign(tmp_path / "b" / "my_own_task_demo.hdf5", [0], T=5)
    with h5py.File(tmp_path / "b" / "my_own_task_demo.hdf5", "a") as file:
        file.copy("data/demo_0", "data/demo_1")
        file["data/demo_1/actions"][:] = 0.5
    for index, success_from in ((1, None), (2, 9)):
        episode = make_episode(source="explore", index=index, seed=index, success_from=success_from)
        data.write_libero_hdf5(tmp_path / f"explore_{index}.hdf5", episode, "libero_goal")
    rows, defects = check(capsys, tmp_path)
    assert [" ".join(row.split()) for row in rows] == [
        "libero_goal:7 turn_on_the_stove official raw expert 8 1 1 5-5-5 100 % cannot be told 0",
        "libero_goal:7 turn_on_the_stove ours explore 32 2 2 22-22-22 50 % cannot be told 0",
        "my_own_task (unknown task) regenerated expert 8 1 2 5-5-5 100 % unknown task 0"]
    assert defects == []


def test_every_defect_is_a_line_of_its_own(tmp_path, capsys, busy):
    path = lambda name: tmp_path / name / "turn_on_the_stove_demo.hdf5"
    expected = [(busy, "is being written by another process")]
    for number, (name, override, says) in enumerate([
            ("wide", dict(actions=np.full((6, 7), 1.2)), "actions are 1.2"),
            ("nan", dict(actions=np.full((6, 7), np.nan)), "actions are nan"),
            ("joints", dict(actions=np.zeros((6, 8))), "actions have shape (6, 8)"),
            ("lengths", dict(actions=np.zeros((4, 7))), "do not fit together"),
            ("failed", dict(dones=np.zeros(6)), "does not end in success")]):
        ids = [10 * number + 1, 10 * number + 2]
        write_foreign(path(name), ids, **(dict(actions=np.full((6, 7), 0.1)) | override))
        expected += [(f"{path(name)}:demo_{i}", says) for i in ids]
    failed = f"{path('failed')}:demo_41"
    expected += [(f"{path('failed')}:demo_42", f"has the same actions as {failed}")]
    for name, content in dict(empty=b"", text=b"hello", cut=path("wide").read_bytes()[:2000]).items():
        path(name).parent.mkdir()
        path(name).write_bytes(content)
        expected += [(path(name), "not a readable LIBERO HDF5 file")]
    h5py.File(tmp_path / "other.hdf5", "w").create_group("data")
    h5py.File(tmp_path / "array.hdf5", "w")["data"] = np.zeros(3)
    expected += [(tmp_path / "other.hdf5", "no demonstrations inside"), (tmp_path / "array.hdf5", "not a readable")]
    write_foreign(path("small"), [90], size=16, actions=np.full((6, 7), 0.9))
    shutil.copytree(path("small").parent, tmp_path / "z_copy")
    expected += [(f"{path(name)}:demo_90", f"has frames of 16 pixels, {failed} has 8") for name in ("small", "z_copy")]
    original, copy = (f"{path(name)}:demo_90" for name in ("small", "z_copy"))
    expected += [(copy, f"has the number of {original}"), (copy, f"has the same actions as {original}")]
    rows, defects = check(capsys, tmp_path)
    for start, says in expected:
        assert sum(line.startswith(f"{start}: ") and says in line for line in defects) == 1, (start, says)
    assert len(defects) == len(expected) == sum(int(row.split()[-1]) for row in rows)


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_check_of_nothing_is_the_users_error(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.UserError, match="nowhere not found" if path == "nowhere" else "no demonstrations below"):
        CHECK["check"](CHECK["Config"](path))


def test_check_is_a_command(tmp_path):
    """The table and exit code 0 of the repository's own demonstrations; the defects after the table and exit code 2."""
    run = lambda path: subprocess.run([sys.executable, ROOT / "data.py", "--check", path], capture_output=True, text=True)
    shutil.copy(ROOT / "data" / "libero_demos.npz", tmp_path)
    done = run(tmp_path)
    assert done.returncode == 0 and done.stdout.count("shipped states expert") == 40, done.stderr
    shipped = np.load(tmp_path / "libero_demos.npz")
    steps = [len(shipped[f"libero_goal_7/actions_{i}"]) for i in range(5)]
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("libero_goal:7 turn_on_the_stove ")]
    assert f" {min(steps)}-{np.mean(steps):.0f}-{max(steps)} " in row
    (tmp_path / "x.hdf5").touch()
    done = run(tmp_path / "x.hdf5")
    assert done.returncode == 2 and done.stderr == f"error: 1 defects below {tmp_path}/x.hdf5\n"
    assert "the file is empty" in done.stdout


# ---- checkpoints ---------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    run: str = ""
    demos: str = "data"
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
    assert loaded["step"] == 4 and data.from_config(Config, loaded["config"]) == Config()
    assert loaded["versions"]["torch"] == torch.__version__
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
    for kind, name, command in [("policy", "policy_sft", "policy.py"), ("policy", "policy_rl", "ppo_loop.py"),
                                ("world_sim", "world_sim", "world_sim.py"), ("reflector", "reflector", "reflector.py")]:
        with pytest.raises(data.UserError, match=f"not found; run: python {command}"):
            data.load_checkpoint(checkpoint.with_name("other") / f"{name}.pt", kind)


def test_a_checkpoint_made_with_other_flags_is_not_resumed(checkpoint):
    found, finished = data.resume(checkpoint, "policy_sft", Config(run="another name", demos="data/"))  # the same directory
    assert found["step"] == 3 and not finished
    with pytest.raises(data.UserError, match=r"sizes=\[1, 2\].*\[1, 3\].*delete it, or pass --run"):
        data.resume(checkpoint, "policy_sft", Config(sizes=(1, 3)))
    with pytest.raises(data.UserError, match="demos='data', asked for 'other'"):
        data.resume(checkpoint, "policy_sft", Config(demos="other"))
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


def test_a_control_step_is_robosuites_to_rounding(env):
    """Kinematics once per substep instead of three times; a mistake in torques, fingers or their order shows in the first step."""
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 7))

    def play(step):
        start = env.reset(0) and env.state()
        return start, [(step(a), env.state(), env.sim.data.ctrl.copy(), env.proprio()) for a in actions]

    (start, stock), (again, ours) = play(lambda a: env.env.step(a)[2]), play(lambda a: env.step_chunk(a[None], render=False)[1][0])
    np.testing.assert_array_equal(again, start)
    for expected, got in zip(stock, ours):
        for a, b in zip(expected, got):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-6)
    assert np.abs(ours[0][1] - stock[0][1]).max() < 1e-12 < 1e-2 < np.abs(stock[-1][1] - start).max()
    assert env.env.robots[0].controller.sim is env.sim  # else the next reset would read stale kinematics


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


def test_a_scene_drawn_faster_looks_alike_and_moves_alike(env):
    """Coarser meshes, and a white plate on the mirror of the stove: a third of the time. But not for published checkpoints."""
    stock, fast = data.LiberoEnv(env.task, 224), data.LiberoEnv(env.task, 64)  # both fresh: what ran before shows in the ninth digit
    stock.image_size = 64
    (expected, before), (got, after) = ((e.reset(0)["frames"].astype(float), e.state()) for e in (stock, fast))
    reflecting = stock.sim.model._model.mat_reflectance[stock.sim.model._model.geom("flat_stove_1_base_vis").matid]
    stock.close(), fast.close()
    white = (expected.min(0) > 190) & (np.abs(expected - expected.mean((1, 2), keepdims=True)).sum(0) > 0)
    assert reflecting > 0 == env.sim.model._model.mat_reflectance[env.sim.model._model.geom("flat_stove_1_base_vis").matid]
    assert white.sum() > 20 and np.abs(got - expected)[:, white].mean() < 15  # without the plate its top is 130 darker
    assert 0 < np.abs(got - expected).mean() < 1.5
    np.testing.assert_array_equal(after, before)


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
