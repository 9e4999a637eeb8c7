"""Record LIBERO demonstrations with a scripted expert that plans from each task's own goal predicates.

The expert knows everything the simulator knows, and it may try again: before every decision (which grasp, where to put it down) it keeps
a copy of the simulator, and a choice that does not work is undone as if it had never been made. So the geometry below only has to rank
candidates, and physics decides. What is recorded is one uninterrupted trajectory: the choices that worked.

A goal such as ["on", "akita_black_bowl_1", "plate_1"] becomes a skill (`solve`): open, turn on, put on or in, close, in this order.
Layouts are freshly sampled resets (seeds from 1000), never LIBERO's evaluation initial states.

  python data/record_expert.py --tasks all            # prints success of 10 resets per task
Writes: runs/expert/<suite>_<index>.npz per task (finished tasks are not recorded again), then data/libero_demos.npz.
"""
import copy
import itertools
import sys
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data

OPEN, CLOSE = -1.0, 1.0
UP = np.array([0.0, 0.0, 1.0])
# The open hand in axes of the grip site (finger axis, side, approach), m: two fingers and the palm, each a box (low, high)
HAND = np.array([[[-.065, -.012, -.04], [-.038, .012, .012]], [[.038, -.012, -.04], [.065, .012, .012]],
                 [[-.105, -.035, -.17], [.105, .035, -.036]]])


def lean(yaw, angle, sideways):
    """(approach, finger axis) from above, leaning by `angle` along the fingers or sideways."""
    across = np.array([np.cos(yaw), np.sin(yaw), 0])
    to = np.cross(UP, across) if sideways else across
    return np.cos(angle) * -UP + np.sin(angle) * to, across


FROM_ABOVE = [lean(yaw, angle, sideways) for yaw in np.arange(8) * np.pi / 8
              for angle, sideways in [(0, 0), (0.45, 0), (-0.45, 0), (0.45, 1), (-0.45, 1), (1.0, 1), (-1.0, 1)]]


class Missed(Exception):
    """This choice did not work; whoever made it goes back and takes the next one."""


class Finished(Exception):
    """The task's own success predicate has become true, or the budget of simulated steps is spent."""


class Expert:
    def __init__(self, env: data.LiberoEnv, budget=4000):
        self.env, self.libero, self.budget = env, env.env.env, budget
        self.model, self.data = env.sim.model._model, env.sim.data._data
        self.robot = self.libero.robots[0]
        self.states, self.actions, self.success = [env.state()], [], [bool(self.libero._check_success())]
        self.grip, self.held, self.home = OPEN, None, np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, -1]])  # fingers along y, approach down
        self.arm = {b for b in range(self.model.nbody) if self.model.body(b).name.startswith(("robot0", "gripper0", "mount0"))}
        self.geoms = [g for g in range(self.model.ngeom) if (self.model.geom_contype[g] or self.model.geom_conaffinity[g])
                      and self.model.geom_type[g] != mujoco.mjtGeom.mjGEOM_PLANE and self.model.geom_bodyid[g] not in self.arm]

    # ---- what the simulator knows ------------------------------------------------------------------------------------------

    def pose(self, body=None):
        """Position (3,) and axes (3, 3) of a body, or of the grip site: finger axis, side, approach."""
        if body is None:
            return self.data.site_xpos[self.env._site].copy(), self.data.site_xmat[self.env._site].reshape(3, 3).copy()
        return self.data.xpos[body].copy(), self.data.xmat[body].reshape(3, 3).copy()

    def subtree(self, body):
        """`body` and all bodies that hang on it."""
        inside = {body}
        for b in range(body + 1, self.model.nbody):  # parents come first
            inside |= {b} if self.model.body_parentid[b] in inside else set()
        return inside

    def points(self, bodies, pitch=0.008):
        """(n, 3) world points on the bounding boxes of the collision geoms of `bodies`."""
        out = [np.zeros((0, 3))]
        for g in (g for g in self.geoms if self.model.geom_bodyid[g] in bodies):
            centre, half = np.split(self.model.geom_aabb[g], 2)
            lines = [np.linspace(-h, h, min(50, 2 + int(2 * h / pitch))) for h in half]
            grid = np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(-1, 3)
            grid = grid[(np.abs(grid) > half - 1e-6).any(1)] + centre
            out.append(grid @ self.data.geom_xmat[g].reshape(3, 3).T + self.data.geom_xpos[g])
        out = np.concatenate(out)
        return out[np.unique(np.round(out / pitch).astype(int), axis=0, return_index=True)[1]]

    def scenery(self, near, radius=0.35, without=None):
        """(n, 3) points around `near` of everything but the arm and the subtree of body `without`."""
        bodies = set(range(self.model.nbody)) - self.arm - (self.subtree(without) if without else set())
        points = self.points(bodies, 0.012)
        return points[np.abs(points - near).max(1) < radius]

    def holds(self, goal):
        return bool(self.libero._eval_predicate(goal))

    # ---- time: steps that can be taken back --------------------------------------------------------------------------------

    def save(self):
        controller = {k: copy.deepcopy(v) for k, v in self.robot.controller.__dict__.items() if k != "sim"}
        simulator = np.zeros(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(self.model, self.data, simulator, mujoco.mjtState.mjSTATE_INTEGRATION)
        return simulator, controller, self.robot.gripper.current_action.copy(), len(self.actions), self.grip, self.held

    def restore(self, saved):
        simulator, controller, fingers, steps, self.grip, self.held = saved
        mujoco.mj_setState(self.model, self.data, simulator, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(self.model, self.data)  # changes the solver's warm start, which is part of the state
        mujoco.mj_setState(self.model, self.data, simulator, mujoco.mjtState.mjSTATE_INTEGRATION)
        self.robot.controller.__dict__.update(copy.deepcopy(controller))
        self.robot.gripper.current_action[:] = fingers
        del self.states[steps + 1:], self.actions[steps:], self.success[steps + 1:]

    def first(self, attempt, choices):
        """`attempt(*choice)` for each choice in turn, always from the present state, until one does not miss."""
        saved = self.save()
        for choice in choices:
            try:
                return attempt(*choice)
            except Missed:
                self.restore(saved)
        raise Missed

    def step(self, move=np.zeros(3), turn=np.zeros(3), steps=1):
        for _ in range(steps):
            success, self.budget = self.act(move, turn), self.budget - 1
            if self.budget < 0:
                raise Finished
            if success:  # does it last? The reflector wants to see what success looks like
                saved = self.save()
                if all([self.act() for _ in range(10)]):
                    raise Finished
                self.restore(saved)

    def act(self, move=np.zeros(3), turn=np.zeros(3)):
        action = np.concatenate([move, turn, [self.grip]]).astype(np.float32)
        self.success.append(bool(self.libero.step(action)[2]))
        self.actions.append(action)
        self.states.append(self.env.state())
        return self.success[-1]

    # ---- moving the hand ---------------------------------------------------------------------------------------------------

    def servo(self, error, angle, speed, spin=0.6):
        """One proportional step that makes up for `error` (m) and `angle` (rotation vector), no component above `speed` and `spin`."""
        move, turn = 1.6 * error / 0.05, 1.5 * angle / 0.5
        self.step(move * min(1, speed / max(np.abs(move).max(), 1e-9)), turn * min(1, spin / max(np.abs(turn).max(), 1e-9)))

    def reach(self, position, axes, speed=1.0, near=0.008, force=False):
        """Proportional control of the grip site to a pose; `force` accepts that something is in the way."""
        best, since = np.inf, 0
        while since < 8:
            at, now = self.pose()
            error, angle = position - at, Rotation.from_matrix(axes @ now.T).as_rotvec()
            left = np.linalg.norm(error) + 0.05 * np.linalg.norm(angle)
            if np.linalg.norm(error) < near and np.linalg.norm(angle) < 0.12:
                return
            best, since = (left, 0) if left < best - 0.002 else (best, since + 1)
            self.servo(error, angle, speed)
        if not force and (np.linalg.norm(error) > 2 * near or np.linalg.norm(angle) > 0.25):
            raise Missed

    def travel(self, position, axes, speed=1.0):
        """Rise above whatever lies near the straight way, cross, descend."""
        at = self.pose()[0]
        hanging = np.concatenate([self.points(self.subtree(self.held)), at[None]]) if self.held else at[None]
        points = self.scenery((at + position) / 2, 0.6, self.held)
        way = (position - at)[:2]
        along = np.clip((points[:, :2] - at[:2]) @ way / max(way @ way, 1e-9), 0, 1)
        close = points[np.linalg.norm(points[:, :2] - at[:2] - along[:, None] * way, axis=1) < 0.1]
        height = close[:, 2].max(initial=-1) + at[2] - hanging[:, 2].min() + 0.03
        height = min(max(height, at[2], position[2]), max(at[2], position[2], 1.35))
        if np.linalg.norm(way) > 0.03:
            self.reach(np.array([*at[:2], height]), self.pose()[1], speed, 0.03, force=True)
            self.reach(np.array([*position[:2], height]), axes, speed, 0.03, force=True)
        self.reach(position, axes, speed, 0.012)

    def fingers(self, command, steps=9):
        self.grip = command
        self.step(steps=steps)

    # ---- grasping ----------------------------------------------------------------------------------------------------------

    def hand_hits(self, points, positions, axes):
        """Number of points inside the open hand at each of `positions` (k, 3)."""
        local = (points[None] - positions[:, None]) @ axes  # (k, n, 3)
        return sum(((local > low) & (local < high)).all(-1).sum(1) for low, high in HAND)

    def directions(self, approaches):
        """Hand axes to try, of the two wrist solutions the nearer one: fingers across 8 horizontal directions, upright or leaning."""
        out = []
        for approach, across in approaches:
            across = across - (across @ approach) * approach
            across /= np.linalg.norm(across)
            options = [np.stack([s * across, np.cross(approach, s * across), approach], 1) for s in (1, -1)]
            out.append(min(options, key=self.wrist_turn))
        return out

    def wrist_turn(self, axes):
        return Rotation.from_matrix(axes @ self.home.T).magnitude()

    def grasps(self, points, body, goals=(), depth=0.022, most=14, approaches=None):
        """Candidate grasps [(position, axes)] of (n, 3) object points, best first. The hand must also fit at one of `goals`."""
        centre = points.mean(0)
        around = self.scenery(centre, 0.25, body)
        everything = np.concatenate([points, around])
        at, axes_now = self.pose(body)
        found = []
        for axes in self.directions(approaches or FROM_ABOVE):
            local, here = points @ axes, []
            for seed in local[::max(1, len(local) // 60)]:
                column = local[(np.abs(local - seed) < [0.04, 0.01, np.inf]).all(1)]
                deep = column[:, 2].min() + depth
                for _ in range(2):  # centre the fingers on what is between them
                    jaw = column[np.abs(column[:, 2] - deep) < 0.01, 0]
                    if len(jaw) < 3:
                        break
                    seed = np.array([(jaw.min() + jaw.max()) / 2, seed[1], deep])
                    column = local[(np.abs(local - seed) < [0.04, 0.01, np.inf]).all(1)]
                else:
                    if np.ptp(jaw) < 0.072:
                        position = axes @ seed
                        position[2] = max(position[2], points[:, 2].min() + 0.013)  # the fingers reach 12 mm below the site
                        here.append((10 * np.ptp(jaw) + 5 * np.linalg.norm((position - centre)[:2]), position))
            for cost, position in sorted(here, key=lambda scored: scored[0]):
                if all(np.linalg.norm(position - other) > 0.012 for _, other, a in found if a is axes):
                    found.append((cost, position, axes))
                if sum(a is axes for *_, a in found) == 5:
                    break
        costs = []
        for cost, position, axes in found:
            retreat = position - axes[:, 2] * np.array([[0.0], [0.03], [0.07]])
            hits = self.hand_hits(everything, retreat, axes).sum()
            hits += min((self.goal_hits(goal, at, axes_now, position, axes) for goal in goals), default=0)
            reach = np.linalg.norm(position[:2] + [0.6, 0])
            costs.append(cost + 0.1 * hits + 0.7 * self.wrist_turn(axes) + 20 * max(0, reach - 0.64))
        return [found[i][1:] for i in np.argsort(costs)[:most]]

    def goal_hits(self, goal, at, axes, site, hand):
        """Points of the scenery inside the hand, were the object, now at `at` and `axes`, carried to `goal` with the hand on it."""
        moved = goal[1] @ axes.T
        return self.hand_hits(goal[2], (goal[0] + moved @ (site - at) + UP * 0.01)[None], moved @ hand)[0]

    def grasp(self, position, axes, back=None):
        self.travel(position + 0.08 * (-axes[:, 2] if back is None else back), axes)
        self.reach(position, axes, 0.5, 0.006)
        self.fingers(CLOSE)

    def pick(self, body, position, axes):
        """Grasp a free body and lift it; Missed if it does not come along."""
        before = self.pose(body)[0]
        self.grasp(position, axes)
        self.held = body
        offset = self.pose(body)[0] - self.pose()[0]
        self.reach(self.pose()[0] + UP * 0.08, axes, 0.6, 0.02, force=True)
        risen = self.pose(body)[0][2] - before[2]
        if risen < 0.04 or np.linalg.norm(self.pose(body)[0] - self.pose()[0] - offset) > 0.03:
            raise Missed

    # ---- putting down ------------------------------------------------------------------------------------------------------

    def rest_height(self, footprint, scenery):
        """Height of the origin at which an object, points `footprint` relative to its origin at the goal xy, comes to lie on `scenery`."""
        cell = lambda points: list(map(tuple, np.round(points[:, :2] / 0.007).astype(int)))
        ground = {}
        for key, z in zip(cell(scenery), scenery[:, 2]):
            ground[key] = max(ground.get(key, -np.inf), z)
        return max((ground[key] - z for key, z in zip(cell(footprint), footprint[:, 2]) if key in ground), default=-np.inf)

    def goals(self, body, target, predicate):
        """Poses [(position, axes, scenery there)] of body that would make `predicate` true, the middle of the target first."""
        at, axes = self.pose(body)
        shape = self.points(self.subtree(body), 0.007) - at
        if target in self.libero.object_sites_dict:
            site = self.data.site(target)
            middle, half = site.xpos.copy(), np.abs(site.xmat.reshape(3, 3) @ self.model.site(target).size)
            shared = sum(goal[2:] == [target] for goal in self.libero.parsed_problem["goal_state"]) > 1 and predicate == "on"
            grid = (-0.7, 0.7) if shared else (0, -0.4, 0.4, -0.8, 0.8)  # two things on one place: neither takes the middle
            spots = [middle + half * [a, b, 0] for a, b in itertools.product(grid, repeat=2)]
            ceiling = middle[2] + (0 if predicate == "in" else 0.05)
        else:
            middle = self.pose(self.libero.obj_body_id[target])[0]
            spots, ceiling = [middle], middle[2] + 0.06
        scenery = self.scenery(middle, 0.35, body)
        low = self.points(set(range(self.model.nbody)) - self.arm - self.subtree(body), 0.007)
        low = low[(np.abs(low - middle).max(1) < 0.25) & (low[:, 2] < ceiling)]
        centre = (shape.min(0) + shape.max(0)) / 2 * [1, 1, 0] * (predicate == "in")  # predicates test origins, walls the shape
        yaw = lambda angle: Rotation.from_rotvec(UP * angle).as_matrix()
        fit = min(np.arange(-0.8, 0.8, 0.05), key=lambda angle: np.ptp((shape @ yaw(angle).T)[:, :2], axis=0).prod())  # along the axes
        out = []
        for spot, turn in itertools.product(spots, (0, fit, fit + np.pi / 2, fit - np.pi / 2, fit + np.pi)):
            moved = yaw(turn)
            origin = spot - moved @ centre
            height = self.rest_height(shape @ moved.T + [*origin[:2], 0], low)
            if np.isfinite(height):
                goal = np.array([*origin[:2], height]), moved @ axes, scenery
                out.append((height + 0.5 * np.linalg.norm(spot - middle) + 0.01 * abs(turn), goal))
        floor = min((goal[0][2] for _, goal in out), default=0)  # what would lie higher lies on a wall or a roof
        return [goal for _, goal in sorted(out, key=lambda scored: scored[0]) if goal[0][2] < floor + 0.03]

    def place(self, goal, predicate):
        """Bring the held body to a goal pose from the side that is free, let go, back off; Missed if the predicate does not hold then."""
        position, axes, scenery = goal

        def carry():
            """Hand pose that has the held body at the goal, from how it lies in the hand now."""
            (at, now), (site, hand) = self.pose(self.held), self.pose()
            return position + axes @ now.T @ (site - at), axes @ now.T @ hand
        hand_position, hand_axes = carry()
        at, now = self.pose(self.held)
        object_points = (self.points(self.subtree(self.held), 0.012) - at) @ now @ axes.T + position
        occupied = set(map(tuple, np.round(scenery / 0.012).astype(int)))

        def hits(offset):
            inside = sum(tuple(c) in occupied for c in np.round((object_points + offset) / 0.012).astype(int))
            return inside + self.hand_hits(scenery, (hand_position + offset)[None], hand_axes)[0]
        entry = min((UP, *np.eye(3)[:2], *-np.eye(3)[:2]), key=lambda way: sum(hits(UP * 0.012 + way * d) for d in (0.04, 0.08, 0.12, 0.16)))
        lift = next((h for h in np.arange(0.008, 0.14, 0.01) if hits(UP * h) < 6), 0.1) if entry[2] else 0.03
        way = entry * (0.05 if entry[2] else 0.2)
        self.travel(hand_position + UP * lift + way, hand_axes)
        for rest in (1, 0) if entry[2] else np.linspace(1, 0, 6):
            hand_position, hand_axes = carry()  # it may have slipped or turned on the way
            self.reach(hand_position + UP * lift + rest * way, hand_axes, 0.4, 0.008, force=True)
        self.fingers(OPEN, 8)
        self.held = None
        self.reach(self.pose()[0] + 0.08 * (-hand_axes[:, 2] if entry[2] else entry), hand_axes, 0.6, 0.03, force=True)
        self.step(steps=2)
        if not self.holds(predicate):
            raise Missed

    def put(self, predicate):
        kind, name, target = predicate
        body = self.libero.obj_body_id[name]
        site = self.libero.object_sites_dict.get(target)
        if site is not None and site.joints and kind == "in":
            self.first(self.draw, [(target, 0.115), (target, 0.15)])
        points = self.points(self.subtree(body))
        if np.ptp(points[:, :2], axis=0).min() > 0.075 and np.ptp(points[:, 2]) < 0.025:  # a plate: nothing to grasp
            return self.first(self.slide, itertools.product([body], [predicate], (0.0, 0.008), (0.04, 0.03, 0.055)))
        goals = self.goals(body, target, kind)

        def carry(*grasp):
            self.pick(body, *grasp)
            hits = [self.goal_hits(goal, *self.pose(body), *self.pose()) for goal in goals[:40]]
            self.first(self.place, [(goals[i], predicate) for i in np.argsort(np.array(hits) // 10, kind="stable")[:4]])
        self.first(carry, self.grasps(points, body, goals[:40:5]))

    def slide(self, body, predicate, press, inset):
        """Press the closed fingers inside the rim of a flat object, `inset` from its edge, and drag it along."""
        goal = self.data.site(predicate[2]).xpos.copy()
        radius = np.ptp(self.points(self.subtree(body))[:, 0]) / 2 - inset

        def contact(ahead):
            at = self.pose(body)[0]
            way = (goal - at) * [1, 1, 0] / np.linalg.norm((goal - at)[:2])
            return at + way * (radius + ahead) + UP * press
        self.fingers(CLOSE, 4)
        self.travel(contact(-0.01) + UP * 0.06, self.home)
        self.reach(contact(-0.01), self.home, 0.4, 0.01, force=True)
        for _ in range(120):
            self.servo(contact(0.03) - self.pose()[0], np.zeros(3), 0.6)
        raise Missed

    # ---- joints: drawers, doors, knobs -------------------------------------------------------------------------------------

    def articulate(self, joint, until, amount, grasped):
        """Carry the hand along with a joint, a little ahead of it, till `until()`; positive `amount` (rad or m) in the joint's sense."""
        hinge = self.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE
        anchor, axis = self.data.xanchor[joint].copy(), self.data.xaxis[joint].copy()
        (site, hand), start = self.pose(), self.position(joint)
        stuck, best = 0, 0.0
        while not until():
            ahead = self.position(joint) - start + amount
            turn = Rotation.from_rotvec(axis * ahead).as_matrix() if hinge else np.eye(3)
            goal = anchor + turn @ (site - anchor) if hinge else site + axis * ahead
            at, now = self.pose()
            self.servo(goal - at, Rotation.from_matrix((turn @ hand if grasped else hand) @ now.T).as_rotvec(), 0.6, 0.5)
            gone = (self.position(joint) - start) * np.sign(amount)
            best, stuck = (gone, 0) if gone > best + 0.002 else (best, stuck + 1)
            if stuck > 25:
                raise Missed

    def joint(self, name):
        """Id of the joint that moves a region (of a drawer) or an object (stove knob, microwave door)."""
        owner = self.libero.object_sites_dict.get(name) or self.libero.get_object(name)
        return self.model.joint(owner.joints[0]).id

    def position(self, joint):
        return self.data.qpos[self.model.jnt_qposadr[joint]]

    def draw(self, region, far=0.15):
        """Pull the drawer with this region out by its handle, `far` metres."""
        joint = self.joint(region)
        sign = np.sign(self.model.jnt_range[joint].sum())  # opens towards the far end of its range
        outward = sign * self.data.xaxis[joint]
        if sign * self.position(joint) > far - 0.02:
            return
        body = self.model.jnt_bodyid[joint]
        points = self.points({body})
        handle = points[points @ outward > (points @ outward).max() - 0.02]
        approaches = [(np.cos(t) * -outward - np.sin(t) * UP, UP) for t in (0.18, 0.0, 0.4)]
        grasps = self.grasps(handle, body, depth=0.004, approaches=approaches, most=8)

        def pull(position, axes):
            self.grasp(position, axes, outward)
            self.articulate(joint, lambda: sign * self.position(joint) > far, 0.05 * sign, True)
            self.fingers(OPEN, 6)
            self.reach(self.pose()[0] + 0.06 * outward, axes, 0.6, 0.03, force=True)
        self.first(pull, grasps)

    def turn_knob(self, goal):
        """Grasp across the ridge of a knob from above and turn the wrist."""
        joint = self.joint(goal[1])
        body = self.model.jnt_bodyid[joint]
        points = self.points({body}, 0.005)
        grasps = self.grasps(points[points[:, 2] > points[:, 2].max() - 0.025], body, depth=0.015, approaches=FROM_ABOVE[::7], most=8)

        def turn(*grasp):
            self.grasp(*grasp)
            self.articulate(joint, lambda: self.position(joint) > 0.9, 0.3, True)
            self.fingers(OPEN, 6)
            self.reach(self.pose()[0] + UP * 0.08, self.pose()[1], 0.6, 0.03, force=True)
        self.first(turn, grasps + [(position, axes @ np.diag([-1, -1, 1])) for position, axes in grasps])  # the other wrist solution

    def close(self, goal):
        """Push a drawer or a door shut with closed fingers, from its outer side."""
        joint = self.joint(goal[1])
        sign = -np.sign(self.position(joint))
        hinge = self.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE
        points = self.points(self.subtree(self.model.jnt_bodyid[joint]))
        tip, forward = points.mean(0), sign * self.data.xaxis[joint]
        if hinge:
            arm = (points - self.data.xanchor[joint]) * [1, 1, 0]
            outer = np.linalg.norm(arm, axis=1) > 0.85 * np.linalg.norm(arm, axis=1).max()
            tip, forward = points[outer].mean(0), np.cross(forward, arm[outer].mean(0))
            forward /= np.linalg.norm(forward)
        depth = (points - tip) @ forward
        line = np.linalg.norm(points - tip - np.outer(depth, forward), axis=1) < 0.04
        face = tip + forward * depth[line].min()
        across = np.cross(UP, forward)
        options = self.directions([(-UP, forward), (-UP, across), (0.8 * -UP + 0.6 * forward, across)])

        def push(height, axes):
            self.fingers(CLOSE, 4)
            start = face * [1, 1, 0] + UP * height - forward * 0.03
            self.travel(start - forward * 0.05, axes)
            self.reach(start, axes, 0.5, 0.012, force=True)
            self.articulate(joint, lambda: self.holds(goal), 0.4 * sign if hinge else 0.06 * sign, False)
        heights = [points[:, 2].max() - 0.01, face[2], face[2] + 0.03]
        self.first(push, itertools.product(heights, options))

    # ---- goals -------------------------------------------------------------------------------------------------------------

    def solve(self):
        """Make every goal predicate true; what a later skill undid is done again, three passes in all."""
        skills = {"open": lambda goal: self.draw(goal[1]), "turnon": self.turn_knob, "on": self.put, "in": self.put, "close": self.close}
        goals = sorted(self.libero.parsed_problem["goal_state"], key=lambda goal: list(skills).index(goal[0]))
        try:
            for _, goal in itertools.product(range(3), goals):
                if not self.holds(goal):
                    skills[goal[0]](goal)
        except (Missed, Finished):
            pass
        return self.success[-1]


# ---- recording -------------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    tasks: str = "all"  # suite or choice of tasks: goal, object, spatial, long, all, goal:0,3,7
    resets: int = 10  # fresh layouts tried per task
    demos: int = 5  # successes kept per task
    workers: int = 2  # simulator processes
    out: str = "runs/expert"  # one file per task; what is there is not recorded again
    pack: str = ""  # write all files of --out to this one, data/libero_demos.npz


FIRST_SEED = 1000


def record(task, resets, demos, path):
    """Try `resets` fresh layouts -> [(success, steps)]; the first `demos` successes go to `path`."""
    env, out, tried = data.LiberoEnv(task, 64), {}, []
    for seed in range(FIRST_SEED, FIRST_SEED + resets):
        env.reset(seed=seed)
        expert = Expert(env)
        tried.append((expert.solve(), len(expert.actions)))
        i = sum(success for success, _ in tried) - 1
        if tried[-1][0] and i < demos:
            model = env.sim.model
            out |= {f"states_{i}": np.array(expert.states, np.float32), f"actions_{i}": np.array(expert.actions, np.float32),
                    f"success_{i}": np.array(expert.success), f"seed_{i}": seed,
                    f"body_pos_{i}": model.body_pos.astype(np.float32), f"body_quat_{i}": model.body_quat.astype(np.float32)}
    env.close()
    versions = data.versions()
    with data.atomic(path) as part:
        np.savez_compressed(part, **out, num_demos=min(demos, sum(s for s, _ in tried)), language=task.instruction, task_name=task.name,
                            tried=np.array(tried), mujoco=versions["mujoco"], robosuite=versions["robosuite"])
    return task, tried


def main(cfg: Config):
    tasks, out = data.parse_tasks(cfg.tasks), Path(cfg.out)
    path = lambda task: out / f"{task.suite}_{task.index}.npz"
    todo = [task for task in tasks if not path(task).exists()]
    print(f"recording {len(todo)} tasks, {cfg.resets} layouts each: about {len(todo) * cfg.resets * 12 / cfg.workers / 60:.0f} min")
    with data.process_pool(cfg.workers) as pool, tqdm(total=len(todo), unit="task") as bar:
        for done in as_completed(pool.submit(record, task, cfg.resets, cfg.demos, path(task)) for task in todo):
            task, tried = done.result()
            bar.update()
            tqdm.write(f"{task.suite}:{task.index} {sum(s for s, _ in tried)}/{len(tried)}, mean length "
                       f"{np.mean([n for s, n in tried if s] or [0]):.0f}  {task.instruction}")
    if cfg.pack:
        files = {file.stem: np.load(file) for file in sorted(out.glob("*.npz"))}
        with data.atomic(cfg.pack) as part:
            np.savez_compressed(part, **{f"{name}/{key}": value[key] for name, value in files.items() for key in value})


if __name__ == "__main__":
    data.command_line(main, {"tiny": Config()}, __doc__)
