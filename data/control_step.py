"""A control step of LIBERO in half the time that robosuite's `step` takes."""
from types import SimpleNamespace

import mujoco
import numpy as np


def control_step(env, action):
    """Move the arm of robosuite's `env` as `env.step(action)` does -> LIBERO's success predicate.

    Its controller is robosuite's own. But robosuite computes every substep's kinematics three times: before the controller, in it, and in
    `mj_step`. Here the controller runs between `mj_step1` and `mj_step2`, the halves of `mj_step`. The contact solver then starts from
    another guess, so that states differ by rounding (1e-15 after a step); observables and the robot's own records are left out.
    """
    robot, model, state = env.robots[0], env.sim.model._model, env.sim.data._data
    controller, limits = robot.controller, model.actuator_ctrlrange
    arm, fingers = robot._ref_joint_actuator_indexes, robot._ref_joint_gripper_actuator_indexes
    middle, reach = limits[fingers].mean(1), np.diff(limits[fingers])[:, 0] / 2
    controller.sim = SimpleNamespace(model=env.sim.model, data=env.sim.data, forward=lambda: None)  # `mj_step1` has done that
    for substep in range(round(env.control_timestep / env.model_timestep)):
        mujoco.mj_step1(model, state)
        if substep == 0:
            controller.set_goal(action[:6])
        state.ctrl[arm] = np.clip(controller.run_controller(), *limits[arm].T)
        state.ctrl[fingers] = middle + reach * robot.gripper.format_action(action[6:])
        mujoco.mj_step2(model, state)
    controller.sim = env.sim
    env._post_process()
    return env._check_success()
