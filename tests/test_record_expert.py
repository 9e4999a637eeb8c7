"""The scripted expert and what it recorded: data/libero_demos.npz."""
import runpy

import numpy as np
import pytest
from conftest import ROOT

import data

EXPERT = runpy.run_path(str(ROOT / "data" / "record_expert.py"))
SHIPPED = np.load(ROOT / "data" / "libero_demos.npz")


@pytest.mark.parametrize("task", data.parse_tasks("all"), ids=lambda task: f"{task.suite}-{task.index}")
def test_every_task_has_five_whole_demonstrations(task):
    key = f"{task.suite}_{task.index}"
    assert SHIPPED[f"{key}/num_demos"] == 5 and str(SHIPPED[f"{key}/task_name"]) == task.name
    assert str(SHIPPED[f"{key}/language"]) == task.instruction and str(SHIPPED[f"{key}/mujoco"]) == "3.3.2"
    for i in range(5):
        states, actions, success = (SHIPPED[f"{key}/{name}_{i}"] for name in ("states", "actions", "success"))
        assert len(states) == len(actions) + 1 == len(success) and SHIPPED[f"{key}/seed_{i}"] >= 1000
        assert success[-11:].all()  # it lasts while the hand holds still
        data.check_actions(actions, key)


def test_the_file_stays_small():
    assert (ROOT / "data" / "libero_demos.npz").stat().st_size < 12e6


@pytest.fixture(scope="module")
def stove():
    env = data.LiberoEnv(data.parse_tasks("goal:7")[0], 32)
    yield env
    env.close()


def test_the_expert_records_what_is_shipped(stove):
    """The same layout, seeded, gives the same demonstration, but for the last bits, in which processors differ."""
    stove.reset(seed=int(SHIPPED["libero_goal_7/seed_0"]))
    expert = EXPERT["Expert"](stove)
    assert expert.solve()
    np.testing.assert_allclose(np.array(expert.actions, np.float32), SHIPPED["libero_goal_7/actions_0"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.array(expert.states, np.float32), SHIPPED["libero_goal_7/states_0"], rtol=0, atol=1e-6)


def test_a_choice_that_misses_is_undone(stove):
    """After a missed attempt the next one finds the very same world, hand and record."""
    stove.reset(seed=1000)
    expert = EXPERT["Expert"](stove)
    expert.step(np.array([0.3, 0, -0.5]), steps=3)
    seen = []

    def attempt(miss):
        seen.append((stove.state(), len(expert.actions), expert.grip, stove.env.robots[0].gripper.current_action.copy()))
        expert.fingers(EXPERT["CLOSE"])
        expert.step(np.array([-0.5, 0.5, 0]), steps=5)
        seen.append((stove.state(), len(expert.actions), expert.grip, stove.env.robots[0].gripper.current_action.copy()))
        if miss:
            raise EXPERT["Missed"]
    expert.first(attempt, [(True,), (False,)])
    for before, again in zip(seen[:2], seen[2:]):
        assert all(np.array_equal(a, b) for a, b in zip(before, again))
    assert len(expert.actions) == len(expert.success) - 1 == len(expert.states) - 1 == 3 + 9 + 5
    with pytest.raises(EXPERT["Missed"]):
        expert.first(attempt, [(True,), (True,)])
    assert len(expert.actions) == 17


def test_fresh_layouts_do_not_depend_on_the_resets_before():
    """LIBERO adds the place of a fixture twice to what stands on it, unless the fixture is put back first: the bowl stays on its stove."""
    env = data.LiberoEnv(data.parse_tasks("spatial:7")[0], 32)
    states = []
    for seed in (1000, 1001, 1000):
        env.reset(seed=seed)
        states.append(env.state())
        bowl = env.sim.data.body_xpos[env.env.env.obj_body_id["akita_black_bowl_1"]]
        burner = env.sim.data.get_site_xpos("flat_stove_1_cook_region")
        assert np.linalg.norm((bowl - burner)[:2]) < 0.08 and bowl[2] > burner[2]
    assert np.array_equal(states[0], states[2]) and not np.array_equal(states[0], states[1])
    env.close()
