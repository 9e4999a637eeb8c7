"""data/branches.py: exploration that goes on several times from one state, and what it says about LOOP's reward."""
import dataclasses
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT

import data

BRANCHES = runpy.run_path(str(ROOT / "data" / "branches.py"))


def test_a_branch_that_repeats_the_actions_ends_where_the_episode_did(env):
    """Also with fingers half closed, which no state tells."""
    rng, states, proprio = np.random.default_rng(0), [], []
    env.reset(seed=5003)
    actions = np.concatenate([rng.uniform(-0.5, 0.5, (24, 6)), np.ones((24, 1))], 1).astype(np.float32)
    for action in actions:
        states.append(env.state()), proprio.append(env.proprio())
        env.step_chunk(action[None], render=False)
    last = env.proprio()
    episode = data.Episode(None, None, None, actions, None, np.stack(states), "", "", "explore", index=100_003)  # a branch of the third
    env.reset(seed=5004)
    obs = data.beside("resume_at")(env, episode, 12)
    assert np.allclose(obs["proprio"], proprio[12], atol=3e-3) and obs["frames"].shape == (3, 64, 64)
    env.step_chunk(actions[12:], render=False)
    assert np.abs(env.proprio() - last)[:6].max() < 1e-3 and np.abs(env.proprio() - last)[6:].max() < 1e-4
    assert np.abs(last[:3] - proprio[12][:3]).max() > 0.01  # it did move


def test_only_starts_with_both_outcomes_tell_the_truth_of_a_reward():
    start, success = np.repeat([0, 1, 2], 4), np.array([0, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1], bool)
    right, tells_starts_alone = success + 10.0 * start, 10.0 * start
    assert BRANCHES["within_starts"](right, success, start) == [1, 1]
    assert BRANCHES["within_starts"](tells_starts_alone, success, start) == [0.5, 0.5]
    assert BRANCHES["within_starts"](-right, success, start) == [0, 0] and BRANCHES["within_starts"](right[4:8], success[4:8], start[4:8]) == []


def branches(cwd, *flags):
    return subprocess.run([sys.executable, ROOT / "data" / "branches.py", "--tasks", "goal:1,7", "--preset", "smoke", *flags], cwd=cwd,
                          capture_output=True, text=True)


def test_branches_are_exploration_episodes_from_one_state_and_the_report_reads_them(smoke_run, tmp_path):
    run, tasks = tmp_path / "runs" / "goal-1-7-smoke", data.parse_tasks("goal:1,7")
    shutil.copytree(smoke_run.run, run)
    nothing, none_yet = branches(tmp_path), branches(tmp_path, "--report")  # the policy of `smoke` never succeeds
    assert nothing.returncode == none_yet.returncode == 2
    assert "succeeds: there is no way to a success to branch off from" in nothing.stderr and "run: python data/branches.py" in none_yet.stderr
    for path in (run / "explore").glob("*_[14].hdf5"):  # 4 is held out
        with h5py.File(path, "r+") as file:
            (demo,) = file["data"].values()
            demo["success"][-1] = True
    done = branches(tmp_path, "--starts", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 branches" in done.stdout and "8 of them new" in done.stdout
    load = lambda: {(e.task, e.index): e for e in data.load_episodes(run / "explore", tasks, kinds=("explore",))}
    episodes = load()
    assert sum(i > 100_000 for _, i in episodes) == 8 and sum(e.held_out for (_, i), e in episodes.items() if i > 100_000) == 4
    for (task, index), e in episodes.items():
        if index > 100_000:
            origin, other = episodes[task, index % 100_000], episodes[task, index % 100_000 + (300_000 - index // 100_000 * 100_000)]
            at = np.abs(origin.states - e.states[0]).max(1).argmin()
            assert np.allclose(origin.states[at], e.states[0], atol=1e-6) and np.array_equal(other.states[0], e.states[0]) and at % 4 == 0
            assert len(e.actions) == 18 and not np.array_equal(e.actions, other.actions)  # other noise
            moved, rest = [*origin.proprio[at] - origin.proprio[at - 1], *origin.actions[at - 1]], [0] * 14 + [-1]
            assert np.allclose(e.before, moved if at else rest, atol=1e-6)  # the arm is moving already
    again = branches(tmp_path, "--starts", "2")
    assert "0 of them new" in again.stdout and load().keys() == episodes.keys()
    report = branches(tmp_path, "--report")
    assert report.returncode == 0, report.stderr[-2000:]
    for frames in ("imagined", "real"):
        assert f"all, {frames} frames: 8 branches of 4 starts, 0.00 succeed" in report.stdout
        assert f"held out, {frames} frames: 4 branches of 2 starts" in report.stdout
    assert "within the 0 starts with both outcomes unknown" in report.stdout
    gap = subprocess.run([sys.executable, ROOT / "evaluate.py", "--tasks", "goal:1,7", "--preset", "smoke", "--report"], cwd=tmp_path,
                         capture_output=True, text=True)  # of whole episodes, branches or not
    assert gap.returncode == 0, gap.stderr[-2000:]
    held_out = sum(e.held_out and index < 100_000 for (_, index), e in episodes.items())
    assert json.loads((run / "report.json").read_text())["agreement"]["episodes"] == held_out == 2
    failures = branches(tmp_path, "--starts", "1", "--failures")
    assert failures.returncode == 0, failures.stderr[-2000:]
    assert "4 branches" in failures.stdout and "4 of them new" in failures.stdout
    new = load().keys() - episodes.keys()
    assert len(new) == 4 and not any(episodes[task, index % 100_000].success.any() for task, index in new)


@pytest.mark.parametrize("flags", [("--starts", "0"), ("--length", "0")])
def test_values_that_no_branch_can_have_are_one_line(flags, tmp_path):
    done = branches(tmp_path, *flags)
    assert done.returncode == 2 and f"got {flags[0]} 0, expected at least 1" in done.stderr and "Traceback" not in done.stderr
