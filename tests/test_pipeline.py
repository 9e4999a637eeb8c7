"""The real commands end to end on real LIBERO at `smoke`; resuming; and every mistake of a user is one line and exit code 2."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import data
import evaluate
import policy
import ppo_loop
import reflector
import world_sim
from conftest import ROOT, make_episode, write_foreign

TASKS = ["--tasks", "goal:1,7", "--preset", "smoke"]
BOWL = "put_the_bowl_on_the_stove_demo.hdf5"


def run_script(script, *argv):
    """What `python <script>.py <argv>` does, without the nine seconds of importing torch."""
    sys.argv = [f"{script.__name__}.py", *map(str, argv)]
    data.command_line(getattr(script, "main", None) or script.train, script.PRESETS, script.__doc__)


# ---- the whole method ----------------------------------------------------------------------------------------------------

def test_one_command_leaves_every_artifact(smoke_run):
    run = smoke_run.run
    for name in ("policy_sft.pt", "world_sim.pt", "reflector.pt", "policy_rl.pt", "policy.jsonl", "world_sim.jsonl", "reflector.jsonl", "ppo_loop.jsonl", "episodes.jsonl"):
        assert (run / name).stat().st_size > 0, name
    assert len(list((run / "explore").glob("*.hdf5"))) == 10 and len(list(run.glob("world_sim_*.png"))) == 2
    videos = {path.name.rsplit("_", 1)[0] for path in (run / "videos").glob("*.mp4")}
    assert videos == {f"real_policy_{kind}_libero_goal_{i}" for kind in ("sft", "rl") for i in (1, 7)} | {"gap_put_the_bowl_on_the_stove", "gap_turn_on_the_stove"}
    assert len(list((smoke_run.cwd / "data" / "rendered" / "32").rglob("demo_*.hdf5"))) == 4
    assert not list(smoke_run.cwd.rglob("*.part*"))
    before, after = (data.load_checkpoint(run / f"policy_{kind}.pt", "policy")["model"] for kind in ("sft", "rl"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert {"llama", "action_head", "scale_out"} <= changed and "tower" not in changed


def test_the_reflector_starts_from_the_policys_tower(smoke_run):
    """Batch normalisation counts the batches it has seen: the policy's, then the reflector's own. (Equal seeds give both the same random weights.)"""
    theirs, ours = (data.load_checkpoint(smoke_run.run / f"{name}.pt", kind)["model"] for name, kind in (("policy_sft", "policy"), ("reflector", "reflector")))
    names = [name for name in theirs if name.startswith("tower.resnet.") and name.endswith("num_batches_tracked")]
    assert names and {int(theirs[name]) for name in names} == {policy.PRESETS["smoke"].steps}
    assert {int(ours[name.replace("tower.resnet", "llava.vision_tower")]) for name in names} == {policy.PRESETS["smoke"].steps + reflector.PRESETS["smoke"].steps}


def test_results_carry_their_protocol(smoke_run):
    result, gap = (json.loads((smoke_run.run / name).read_text()) for name in ("results.json", "report.json"))
    assert set(result["policies"]) == {"policy_sft", "policy_rl"} and set(gap) == {"world_sim", "reflector", "reflector_on_imagined", "agreement"}
    assert gap["agreement"]["episodes"] == gap["reflector"]["episodes"] == 2 and {"psnr_imagined_8", "psnr_still_8", "ssim_frozen_8", "drift_mm_8", "contrast_304"} <= set(gap["world_sim"])
    for rows in result["policies"].values():
        assert set(rows["tasks"]) == {"libero_goal:1", "libero_goal:7"} and rows["trials"] == 2 == sum(row["trials"] for row in rows["tasks"].values())
        assert rows["interval"] == pytest.approx(evaluate.wilson_interval(rows["successes"], 2)) and len(rows["demos"]) == 4
    assert set(result["protocol"]) == {"stop", "max_steps", "settle_steps", "init_states", "seed", "actions"} and set(result["versions"]) >= {"torch", "mujoco", "robosuite"}
    assert result["git_commit"] and result["hardware"] and len(result["difference"]) == 3 and result["seconds"]["total"] > 0
    episodes = data.load_episodes(smoke_run.run / "explore", data.parse_tasks("goal:1,7"), kinds=("explore",))
    assert result["exploration_episodes"] == len(episodes) == 10 and result["real_interactions"] == sum(len(e.actions) for e in episodes)


@pytest.mark.parametrize("name", ["results.json", "report.json"])
def test_results_are_json_that_any_reader_accepts(smoke_run, name):
    """Python writes NaN and Infinity, which are not JSON, where a number does not exist."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")
    assert json.loads((smoke_run.run / name).read_text(), parse_constant=refuse)


def test_the_table_names_tasks_stop_rule_and_real_interactions(smoke_run):
    out, result = smoke_run.out, json.loads((smoke_run.run / "results.json").read_text())
    for text in ("libero_goal:1 put the bowl on the stove", "libero_goal:7 turn on the stove", "policy_sft", "policy_rl", "stop: oracle", f"{result['real_interactions']} steps"):
        assert text in out, text
    assert [line[:5] for line in out.splitlines() if line[:1] == "["] == [f"[{i}/7]" for i in range(1, 8)]


def test_the_same_command_again_trains_and_simulates_nothing(smoke_run, monkeypatch, capsys):
    stamps = lambda: {path: path.stat().st_mtime_ns for path in smoke_run.cwd.rglob("*") if path.suffix in (".pt", ".hdf5", ".jsonl")}
    before, success = stamps(), json.loads((smoke_run.run / "results.json").read_text())["policies"]
    monkeypatch.chdir(smoke_run.cwd)
    monkeypatch.setattr(sys, "argv", [])
    run_script(ppo_loop, *TASKS)
    out = capsys.readouterr().out
    assert out.count("is finished") == 4 and not any(word in out for word in ("rendering", "exploring:", "evaluating", "wrote"))
    assert stamps() == before and json.loads((smoke_run.run / "results.json").read_text())["policies"] == success


def test_imagined_episodes_have_imagined_frames_and_the_real_outcome(smoke_run):
    tasks, run = data.parse_tasks("goal:1,7"), smoke_run.run
    real, imagined = (data.load_episodes(run / folder, tasks, kinds=(folder,)) for folder in ("explore", "imagined"))
    assert len(real) == len(imagined) == 10 and sum(e.held_out for e in imagined) == 2
    for a, b in zip(real, imagined):
        at = a.frame_steps % 8 == 0
        assert (b.source, b.task, b.index) == ("imagined", a.task, a.index) and np.array_equal(b.frame_steps, a.frame_steps[at])
        assert np.array_equal(b.actions, a.actions) and np.array_equal(b.success, a.success)
        assert np.array_equal(b.frames[0], a.frames[0]) and not any(map(np.array_equal, b.frames[1:], a.frames[at][1:]))


def test_parts_of_episodes_are_imagined_from_frames_on_the_way(smoke_run, tmp_path, monkeypatch):
    """Beside whole episodes, with the same outcome, and every fifth episode's held out; the reflector learns from them."""
    shutil.copytree(smoke_run.run, tmp_path / "runs" / "x", ignore=shutil.ignore_patterns("imagined", "reflector.pt"))
    (tmp_path / "data").symlink_to(smoke_run.cwd / "data")
    monkeypatch.chdir(tmp_path)
    tasks = data.parse_tasks("goal:1,7")
    evaluate.imagine(dataclasses.replace(evaluate.PRESETS["smoke"], tasks="goal:1,7", run="x", part=18))
    real, parts = (data.load_episodes(Path("runs/x", folder), tasks, kinds=(folder,)) for folder in ("explore", "imagined"))
    assert len(parts) == 4 * len(real) and sum(e.held_out for e in parts) == 4 * sum(e.held_out for e in real)
    for e in parts:
        whole = next(r for r in real if (r.task, r.index) == (e.task, e.index % 5000))
        at = next(t for t in whole.frame_steps if np.array_equal(whole.proprio[t], e.proprio[0]))
        assert 16 <= len(e.actions) <= 18 and np.array_equal(e.actions, whole.actions[at:at + len(e.actions)])
        assert np.array_equal(e.frames[0], whole.frames[list(whole.frame_steps).index(at)]) and list(e.frame_steps) == [0, 8, 16]
        assert np.array_equal(e.success, whole.success[at:at + len(e.success)])
    reflector.train(dataclasses.replace(reflector.PRESETS["smoke"], tasks="goal:1,7", run="x"))
    assert data.load_checkpoint("runs/x/reflector.pt", "reflector")["finished"]


def test_half_of_the_parts_of_a_success_begin_within_reach_of_it():
    episode, short_parts = make_episode(T=120, gap=4, success_from=101), data.beside("short_parts")
    starts = [[next(t for t in range(121) if np.array_equal(episode.proprio[t], part.proprio[0])) for part in
               short_parts(dataclasses.replace(episode, index=i), 20)] for i in range(30)]
    assert all(len(four) == 4 and all(81 <= t <= 100 for t in four[:2]) for four in starts)
    for part in short_parts(episode, 20):  # the arm is moving already
        t = next(t for t in range(121) if np.array_equal(episode.proprio[t], part.proprio[0]))
        assert np.array_equal(part.before, [*episode.proprio[t] - episode.proprio[t - 1], *episode.actions[t - 1]])
    assert {t for *_, t in starts} & set(range(0, 21)) and {t for *_, t in starts} & set(range(60, 101))  # the others anywhere before it
    assert not short_parts(make_episode(T=12), 20)  # too short
    with pytest.raises(data.UserError, match="got --part 15, expected at least 16 control steps, or 0"):
        short_parts(episode, 15)


def test_another_simulator_imagines_anew(smoke_run, tmp_path, monkeypatch):
    shutil.copytree(smoke_run.run, tmp_path / "runs" / "x")
    monkeypatch.chdir(tmp_path)
    stamps = lambda: {path: path.stat().st_mtime_ns for path in Path("runs/x/imagined").glob("*.hdf5")}
    before, cfg = stamps(), dataclasses.replace(evaluate.PRESETS["smoke"], tasks="goal:1,7", run="x")
    evaluate.imagine(cfg)
    assert stamps() == before
    Path("runs/x/world_sim.pt").touch()
    evaluate.imagine(cfg)
    assert all(stamps()[path] > before[path] for path in before)


def test_an_exploration_episode_is_the_same_in_whatever_process_and_order(smoke_run, tmp_path):
    """The first episode of this process against the same one recorded by a worker that had run others before."""
    cfg, task = dataclasses.replace(evaluate.PRESETS["smoke"], explore=True), data.parse_tasks("goal:7")[0]
    evaluate._episode_job(cfg, str(smoke_run.run / "policy_sft.pt"), task, 4, str(tmp_path))
    name = "turn_on_the_stove_4.hdf5"
    (again,), (recorded,) = data.read_libero_hdf5(tmp_path / name), data.read_libero_hdf5(smoke_run.run / "explore" / name)
    np.testing.assert_allclose(again.states, recorded.states, atol=1e-6)
    np.testing.assert_allclose(again.actions, recorded.actions, atol=1e-6)
    assert np.array_equal(again.frames, recorded.frames)


# ---- rollouts in the real simulator ----------------------------------------------------------------------------------------

def test_the_loop_in_real_libero_needs_no_simulator_and_no_reflector(smoke_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(smoke_run.cwd / "data")
    (tmp_path / "runs" / "real").mkdir(parents=True)
    by_itself = torch.load(smoke_run.run / "policy_sft.pt", weights_only=True)
    by_itself["config"]["weight_decay"] = 0.5  # as if policy.py had been run with flags of its own
    torch.save(by_itself, "runs/real/policy_sft.pt")
    with pytest.raises(data.UserError, match="made with seed=0, asked for 1"):
        ppo_loop.main(dataclasses.replace(ppo_loop.PRESETS["smoke"], tasks="goal:1,7", run="real", env="libero", seed=1))
    with pytest.raises(data.UserError, match="explore not found; run: python evaluate.py --explore"):  # its rollouts start there
        ppo_loop.train(dataclasses.replace(ppo_loop.PRESETS["smoke"], tasks="goal:1,7", run="real", env="libero", explore=False))
    capsys.readouterr()
    run_script(ppo_loop, *TASKS, "--env", "libero", "--run", "real", "--rollouts", "2")  # the second iteration, in the same simulators, is
    # sampled by the policy after the first: the alarm on the first ratio would tell
    out, result = capsys.readouterr().out, json.loads(Path("runs/real/results.json").read_text())
    assert {path.name for path in Path("runs/real").iterdir()} == {"policy_sft.pt", "policy_rl.pt", "explore", "explore.jsonl", "ppo_loop.jsonl",
                                                                   "episodes.jsonl", "results.json", "videos"}
    assert [line[:5] for line in out.splitlines() if line[:1] == "["] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    explored = sum(record["steps"] for record in evaluate.read_records("runs/real/explore.jsonl"))
    assert result["real_interactions"] == explored + 2 * 2 * 2 * 18 and result["exploration_episodes"] == 10 and "2 x 2 rollouts in libero" in out


def test_real_rollouts_of_one_start_share_it_and_the_update_sees_the_density_that_sampled(smoke_run):
    """Of two tasks, so that simulator processes change between them, on the way and at the beginning; half are said to succeed."""
    model = policy.load_policy(smoke_run.run / "policy_sft.pt")
    model.noise_scale = 3.0
    cfg = dataclasses.replace(ppo_loop.PRESETS["smoke"], tasks="goal:1,7", rollouts=2, env="libero", noise_scale=3.0)
    stove, bowl = (data.read_libero_hdf5(smoke_run.run / "explore" / f"{name}_1.hdf5")[0] for name in ("turn_on_the_stove", "put_the_bowl_on_the_stove"))
    rollouts = ppo_loop.rollouts_in_libero(model, [(stove, 3), (bowl, 0)], 18, 0, cfg)
    assert rollouts.frames.shape == (4, 3, 3, 32, 32) and rollouts.mask.flatten(1).sum(1).tolist() == [18] * 4 and not rollouts.stopped.any()
    assert rollouts.instruction == [episode.instruction for episode in (stove, bowl) for _ in range(2)]
    for first, frame, proprio in ((0, stove.frames[3], stove.proprio[stove.frame_steps[3]]), (2, bowl.frames[0], bowl.proprio[0])):
        assert np.abs(rollouts.frames[first, 0].numpy() - frame.astype(float)).mean() < 1 and torch.equal(rollouts.frames[first, 0], rollouts.frames[first + 1, 0])
        np.testing.assert_allclose(rollouts.proprio[first, 0], proprio, atol=3e-3)  # recorded before MuJoCo's last forward kinematics
    assert len(torch.unique(rollouts.action_chunk[:, 0], dim=0)) == 4 and not torch.equal(rollouts.frames[0, 2], rollouts.frames[1, 2])
    before = [p.clone() for p in model.parameters()]
    metrics = ppo_loop.update(model, torch.optim.SGD(model.parameters(), lr=1e-3), dataclasses.replace(rollouts, reward=torch.tensor([1.0, 0, 0, 1])), cfg)
    assert metrics["useful_groups"] == 1 and any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_the_papers_ablation_needs_no_exploration_and_judges_yes_or_no(smoke_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(smoke_run.cwd / "data")
    (tmp_path / "runs" / "bare").mkdir(parents=True)
    shutil.copy(smoke_run.run / "policy_sft.pt", "runs/bare")
    run_script(ppo_loop, *TASKS, "--no-explore", "--judge", "binary", "--run", "bare", "--iterations", "1")
    assert not {"explore", "imagined", "report.json"} & {path.name for path in Path("runs/bare").iterdir()}
    assert [line[:5] for line in capsys.readouterr().out.splitlines() if line[:1] == "["] == [f"[{i}/5]" for i in range(1, 6)]
    configs = [data.load_checkpoint(f"runs/bare/{kind}.pt", kind)["config"] for kind in ("world_sim", "reflector")]
    assert all(list(config["kinds"]) == ["expert"] for config in configs) and configs[1]["judge"] == "binary"
    (row,) = evaluate.read_records("runs/bare/ppo_loop.jsonl")
    assert (8 * row["reward"]) % 1 == 0 and json.loads(Path("runs/bare/results.json").read_text())["real_interactions"] == 0


def test_the_benchmark_splits_an_iteration_and_skips_what_is_not_there(smoke_run, tmp_path, monkeypatch):
    import bench
    monkeypatch.setattr(ppo_loop, "update", ppo_loop.update)  # the benchmark wraps it
    monkeypatch.chdir(smoke_run.cwd)
    cfg, preset = bench.Config(loop_tasks="goal:1,7", rounds=1), ppo_loop.PRESETS["smoke"]
    _, rows = bench.loop(cfg, preset)
    (stopped, *parts, whole), (to_horizon, *_) = (map(float, row.split()[-6:]) for row in rows)
    assert 0 < stopped <= to_horizon == 2 * 4 * 24 and 0 <= sum(parts) <= whole + 0.2 and whole > 0
    monkeypatch.chdir(tmp_path)
    header, rows = bench.loop(cfg, preset)
    assert not rows and "lacks policy_sft.pt, world_sim.pt, reflector.pt" in header and "ppo_loop.py --tasks goal:1,7" in header


@pytest.fixture
def in_smoke_run(smoke_run, tmp_path, monkeypatch):
    """in_smoke_run(**flags): LOOP once more in a copy of the smoke run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(smoke_run.cwd / "data")
    shutil.copytree(smoke_run.run, tmp_path / "runs" / "again", ignore=shutil.ignore_patterns("policy_rl.pt", "ppo_loop.jsonl", "videos"))
    return lambda **flags: ppo_loop.train(dataclasses.replace(ppo_loop.PRESETS["smoke"], tasks="goal:1,7", run="again", **flags))


def test_the_learning_rate_rises_and_falls(in_smoke_run, monkeypatch):
    update, rates = ppo_loop.update, []
    monkeypatch.setattr(ppo_loop, "update", lambda policy, optimizer, *args: rates.append([g["lr"] for g in optimizer.param_groups]) or update(policy, optimizer, *args))
    in_smoke_run(iterations=4, warmup=2, lr=1e-3, lr_heads=2e-3)
    assert np.array(rates) == pytest.approx(np.outer([0.5, 0.75, 0.5, 0.25], [1e-3, 2e-3]))


@pytest.mark.parametrize("train_scale, lr", [(True, 5e-5), (False, 5e-5), (True, 0.0), (False, 0.0)])
def test_the_scale_head_and_all_but_the_heads_may_stay_as_they_were(in_smoke_run, train_scale, lr):
    in_smoke_run(iterations=1, train_scale=train_scale, lr=lr)
    before, after = (data.load_checkpoint(f"runs/again/policy_{kind}.pt", "policy")["model"] for kind in ("sft", "rl"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    rest = {"projector", "proprio_projector", "llama"} if lr else set()
    assert changed == {"action_head"} | rest | ({"scale_trunk", "scale_out"} if train_scale else set())


@pytest.mark.parametrize("floor", [-3.0, -1.0])
def test_the_scale_has_the_floor_of_the_loop_in_rollouts_and_update(in_smoke_run, monkeypatch, floor):
    update, density = ppo_loop.update, []
    monkeypatch.setattr(ppo_loop, "update", lambda policy, optimizer, rollouts, *args: density.append(rollouts.old_log_prob.max())
                        or update(policy, optimizer, rollouts, *args))  # raises where the first ratio is not 1
    in_smoke_run(iterations=1, min_log_scale=floor, noise_scale=1.0)
    highest = -7 * (floor + np.log(2))  # a Laplace density is 1 / (2 scale) at most, seven are multiplied
    assert highest - 7 < density[0] <= highest


@pytest.mark.parametrize("solved", ["turn_on_the_stove", None])
def test_rollouts_start_in_tasks_that_exploration_solved_where_there_are_any(in_smoke_run, monkeypatch, solved):
    training_episodes, start_frame, started = data.training_episodes, ppo_loop.start_frame, set()

    def with_success(*args):
        episodes, held_out = training_episodes(*args)
        for e in episodes:
            e.success[-1] = e.source == "expert" or e.task == solved
        return episodes, held_out
    monkeypatch.setattr(data, "training_episodes", with_success)
    monkeypatch.setattr(ppo_loop, "start_frame", lambda episode, *args: started.add(episode.task) or start_frame(episode, *args))
    in_smoke_run(iterations=1, starts=8, rollouts=2)
    assert started == ({solved} if solved else {"turn_on_the_stove", "put_the_bowl_on_the_stove"})


def test_rollouts_start_from_first_frames_or_within_reach_of_a_success():
    episodes = [make_episode(T=40, seed=i, index=i, success_from=33) for i in range(4)] + [make_episode(T=40, seed=4, index=4, success_from=3)]
    cfg, rng = ppo_loop.Config(tasks="goal:7", keyframe_starts=0), np.random.default_rng(0)
    observe = lambda cfg: ppo_loop.start_observation([(e, ppo_loop.start_frame(e, cfg, rng)) for e in episodes], 15, "cpu")
    first = observe(cfg)
    assert all(np.array_equal(frame, e.frames[0]) for frame, e in zip(first["frames"], episodes))
    seen, early = set(), set()
    for _ in range(60):
        start = observe(dataclasses.replace(cfg, keyframe_starts=15))
        for frame, proprio, e in zip(start["frames"].numpy(), start["proprio"].numpy(), episodes):
            at = next(i for i in range(len(e.frames)) if np.array_equal(frame, e.frames[i]))
            assert np.array_equal(proprio, e.proprio[e.frame_steps[at]]) and start["horizon"] == 15
            t, moved = e.frame_steps[at], start["velocity"][e.index].numpy()  # on the way the arm is moving, and told to
            assert np.array_equal(moved, e.proprio[t] - e.proprio[t - 1] if t else np.zeros(8, np.float32))
            assert np.array_equal(start["previous"][e.index].numpy(), e.actions[t - 1] if t else [0, 0, 0, 0, 0, 0, -1])
            (early if e.index == 4 else seen).add(int(e.frame_steps[at]))
    assert seen == {16, 20, 24, 28, 32} and early == {0}  # the frame seen 1 to 15 steps before success, or the last one before that


def test_short_rollouts_start_on_the_way_to_a_success_each_task_as_often(in_smoke_run, monkeypatch):
    training_episodes, start_frame, started = data.training_episodes, ppo_loop.start_frame, []

    def with_success(*args):
        episodes, held_out = training_episodes(*args)
        stove, bowl = ([e for e in episodes if e.task == name] for name in ("turn_on_the_stove", "put_the_bowl_on_the_stove"))
        solved = {id(e) for e in stove[-3:] + bowl[-1:]}
        for e in episodes:
            e.success[:-1], e.success[-1] = False, e.source == "expert" or id(e) in solved
        return stove * 4 + bowl, held_out
    monkeypatch.setattr(data, "training_episodes", with_success)
    monkeypatch.setattr(ppo_loop, "start_frame", lambda episode, *args: started.append(episode) or start_frame(episode, *args))
    monkeypatch.setattr(ppo_loop, "imagine", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        in_smoke_run(starts=200, micro_starts=200)
    assert all(e.success.any() for e in started) and {e.source for e in started} == {"expert", "explore"}
    assert 0.35 < np.mean([e.task == "turn_on_the_stove" for e in started]) < 0.65  # 20 of 23 starts are the stove's


# ---- resuming ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, artifact", [(policy, "policy_sft.pt"), (world_sim, "world_sim.pt"), (reflector, "reflector.pt"), (ppo_loop, "policy_rl.pt")], ids=lambda x: str(x)[:-3] if isinstance(x, str) else "")
def test_a_run_killed_after_every_checkpoint_ends_bit_for_bit_the_same(smoke_run, monkeypatch, script, artifact):
    monkeypatch.chdir(smoke_run.cwd)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save, kills = data.save_checkpoint, 0

    def train(name):
        if not Path("runs", name).exists():
            shutil.copytree(smoke_run.run, Path("runs", name), ignore=shutil.ignore_patterns(artifact, "videos"))
        script.train(dataclasses.replace(script.PRESETS["smoke"], tasks="goal:1,7", run=name))

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt

    stem = Path(artifact).stem
    train(f"whole_{stem}")
    monkeypatch.setattr(data, "save_checkpoint", save_and_die)
    while not kills or not resumed["finished"]:
        with pytest.raises(KeyboardInterrupt):
            train(f"killed_{stem}")
        resumed, kills = data.load_checkpoint(Path("runs", f"killed_{stem}", artifact), stem), kills + 1
    whole = data.load_checkpoint(Path("runs", f"whole_{stem}", artifact), stem)
    assert kills >= 2 and resumed["step"] == whole["step"]
    assert all(torch.equal(resumed["model"][key], value) for key, value in whole["model"].items())
    for a, b in zip(*(checkpoint["optimizer"]["state"].values() for checkpoint in (resumed, whole))):
        assert all(torch.equal(a[key], b[key]) for key in a)


# ---- mistakes ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused(script, *flags) -> the one line that tells the user what is wrong; nothing half-written is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])

    def refused(script, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(script, *argv)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        assert not list(tmp_path.rglob("*.part*")) and not list(tmp_path.rglob("policy_*.pt.*"))
        return lines[0]
    return refused


@pytest.mark.parametrize("script", [policy, world_sim, reflector, evaluate, ppo_loop], ids=lambda script: script.__name__)
def test_wrong_flags(refused, script, capsys):
    assert "unknown suite 'nonsense'" in refused(script, "--preset", "smoke", "--tasks", "nonsense")
    assert "unknown preset 'huge'" in refused(script, "--preset", "huge")
    with pytest.raises(SystemExit) as stop:
        run_script(script, "--preset", "smoke", "--no-such-flag", "1")
    assert stop.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(script, "--preset=smoke", "--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all("--" + field.name.replace("_", "-") in shown for field in dataclasses.fields(script.Config))


def test_wrong_task_index_and_demonstrations_that_are_not_there(refused, tmp_path):
    assert "has no task 10; expected 0 to 9" in refused(policy, "--preset", "smoke", "--tasks", "goal:10")
    assert "nowhere not found" in refused(policy, *TASKS, "--demos", "nowhere")
    (tmp_path / "empty").mkdir()
    assert BOWL in refused(policy, *TASKS, "--demos", "empty")


def damage(cut=None, text=None):
    def write(path):
        write_foreign(path, [0], size=32)
        path.write_bytes(text if text is not None else path.read_bytes()[:cut])
    return write


def without(key):
    def write(path):
        write_foreign(path, [0], size=32)
        with h5py.File(path, "a") as file:
            del file[key]
    return write


foreign = lambda **arrays: lambda path: write_foreign(path, [0], **(dict(size=32) | arrays))


@pytest.mark.parametrize("write, says", [
    (damage(text=b""), "the file is empty"), (damage(cut=3000), "not a readable LIBERO HDF5 file"), (damage(text=b"not a demonstration"), "not a readable LIBERO HDF5 file"),
    (without("data/demo_0"), "no demonstrations inside"), (without("data/demo_0/obs/ee_states"), "not a readable LIBERO HDF5 file"),
    (foreign(actions=np.full((6, 7), np.nan)), "finite and in"), (foreign(actions=np.full((6, 7), 1.2)), "finite and in"), (foreign(actions=np.zeros((6, 8))), "actions have shape (6, 8)"),
    (foreign(actions=np.zeros((4, 7))), "do not fit together"), (foreign(size=48), "pass --image-size 48"),
], ids=["empty", "truncated", "text", "no-demos", "no-proprio", "nan", "out-of-range", "width-8", "lengths", "image-size"])
def test_demonstrations_that_cannot_be_used(refused, tmp_path, write, says):
    write(tmp_path / "mine" / BOWL)
    message = refused(policy, "--preset", "smoke", "--tasks", "goal:1", "--demos", "mine")
    assert says in message and BOWL in message and not list(tmp_path.rglob("*.pt"))


def test_missing_checkpoints_name_the_command_that_makes_them(refused, smoke_run, tmp_path):
    run = tmp_path / "runs" / "goal-1-7-smoke"
    assert refused(evaluate, *TASKS, "--explore").endswith("run: python policy.py")
    assert refused(evaluate, *TASKS, "--policy", "runs/goal-1-7-smoke/policy_rl.pt").endswith("run: python ppo_loop.py")
    assert "run: python world_sim.py" in refused(evaluate, *TASKS, "--report")
    run.mkdir(parents=True)
    for name in ("policy_sft.pt", "world_sim.pt"):
        shutil.copy(smoke_run.run / name, run)
    assert "run: python reflector.py" in refused(evaluate, *TASKS, "--report") and "run: python reflector.py" in refused(evaluate, *TASKS, "--stop", "reflector")
    assert "unknown stop rule 'never'" in refused(evaluate, *TASKS, "--stop", "never")


def test_wrong_damaged_and_other_checkpoints_are_refused_and_kept(refused, smoke_run, tmp_path):
    run = tmp_path / "runs" / "goal-1-7-smoke"
    run.mkdir(parents=True)
    shutil.copy(smoke_run.run / "policy_sft.pt", run / "world_sim.pt")
    assert "this is a policy_sft checkpoint, expected world_sim" in refused(world_sim, *TASKS)
    shutil.copy(smoke_run.run / "world_sim.pt", run / "policy_sft.pt")
    assert "this is a world_sim checkpoint, expected policy" in refused(evaluate, *TASKS)
    whole = (smoke_run.run / "reflector.pt").read_bytes()
    (run / "reflector.pt").write_bytes(whole[:len(whole) // 2])
    assert "delete it and run: python reflector.py" in refused(reflector, *TASKS)
    (run / "reflector.pt").write_bytes(whole)
    assert "asked for 0.1; delete it" in refused(reflector, *TASKS, "--lr", "0.1") and (run / "reflector.pt").read_bytes() == whole


def test_frames_of_another_size_than_the_policy_saw(refused, smoke_run, tmp_path):
    """Demonstrations of the shipped kind are rendered per size; the user's own are not resized behind his back."""
    write_foreign(tmp_path / "mine" / BOWL, [0, 1], size=48)
    write_foreign(tmp_path / "mine" / "turn_on_the_stove_demo.hdf5", [0, 1], size=48)
    shutil.copytree(smoke_run.run, tmp_path / "runs" / "goal-1-7-smoke", ignore=shutil.ignore_patterns("policy_rl.pt", "world_sim.pt", "videos"))
    assert "frames are 48x48, expected 32x32" in refused(world_sim, *TASKS, "--demos", "mine")


def test_rewards_without_any_spread_stop_the_loop_with_a_message(smoke_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(smoke_run.run, tmp_path / "runs" / "goal-1-7-smoke", ignore=shutil.ignore_patterns("policy_rl.pt", "videos"))
    (tmp_path / "data").symlink_to(smoke_run.cwd / "data")
    imagine = ppo_loop.imagine
    monkeypatch.setattr(ppo_loop, "imagine", lambda *args: dataclasses.replace(imagine(*args), reward=torch.full((8,), 0.5)))
    with pytest.raises(data.UserError, match="for 2 iterations: nothing to learn from"):
        ppo_loop.train(dataclasses.replace(ppo_loop.PRESETS["smoke"], tasks="goal:1,7", no_spread_limit=2))


# ---- real success on the way -----------------------------------------------------------------------------------------------

@pytest.fixture
def with_real_success(smoke_run, tmp_path, monkeypatch):
    """with_real_success(successes, iterations, ...) -> policy_rl.pt of a loop that finds so many of 20 real episodes successful in turn."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(smoke_run.cwd / "data")

    def train(successes, iterations, eval_every=1, name="looked"):
        def evaluate_policy(policies, cfg):
            assert (cfg.first_state, cfg.stop) == (40, "oracle") and data.load_checkpoint(policies[0], "policy")
            return {policies[0]: {"libero_goal:1": dict(successes=successes.pop(0), trials=20)}}
        monkeypatch.setattr(evaluate, "evaluate_policy", evaluate_policy)
        if not Path("runs", name).exists():
            shutil.copytree(smoke_run.run, Path("runs", name), ignore=shutil.ignore_patterns("policy_rl.pt", "ppo_loop.jsonl", "videos"))
        ppo_loop.train(dataclasses.replace(ppo_loop.PRESETS["smoke"], tasks="goal:1,7", run=name, iterations=iterations, eval_every=eval_every))
        return data.load_checkpoint(Path("runs", name, "policy_rl.pt"), "policy_rl")
    return train


def same(a, b):
    return all(torch.equal(a["model"][key], value) for key, value in b["model"].items())


def test_the_policy_that_is_best_in_real_libero_is_kept(with_real_success, capsys):
    after_one = with_real_success([], 1, 0, "one")
    kept = with_real_success([10, 14, 13], 2)
    assert kept["finished"] and kept["step"] == 2 and same(kept, after_one) and "policy after iteration 1" in capsys.readouterr().out
    assert [r["successes"] for r in evaluate.read_records("runs/looked/real_success.jsonl")] == [10, 14, 13]
    last = with_real_success([10, 14, 15], 2, name="rising")
    assert not same(last, after_one) and same(last, with_real_success([], 2, 0, "two"))
    every_second = with_real_success(looks := [10, 9], 3, 2, "second")
    assert not looks and every_second["step"] == 3 and same(every_second, data.load_checkpoint("runs/second/policy_sft.pt", "policy_sft"))


def test_a_policy_that_only_pleases_the_simulator_ends_training(with_real_success, capsys):
    kept = with_real_success([10, 14, 8, 20], 3)  # 14 of 20: 48 to 85 %
    assert kept["finished"] and kept["step"] == 2 and same(kept, with_real_success([], 1, 0, "one"))
    assert "pleases the simulator, not LIBERO: training ends" in capsys.readouterr().out
    assert with_real_success([10, 14, 10], 2, name="chance")["step"] == 2  # 10 of 20 may be chance


def test_a_loop_that_was_killed_remembers_its_best_policy(with_real_success, monkeypatch):
    def kill(*args):
        raise KeyboardInterrupt
    log = data.log
    monkeypatch.setattr(data, "log", lambda run, script, step, metrics: kill() if (script, step) == ("ppo_loop", 2) else log(run, script, step, metrics))
    with pytest.raises(KeyboardInterrupt):
        with_real_success([10, 14, 13], 3)  # after the second look, before that iteration is saved
    monkeypatch.setattr(data, "log", log)
    assert same(with_real_success([13, 12], 3), with_real_success([], 1, 0, "one"))


def test_looks_at_real_libero_leave_the_states_of_the_comparison_alone(smoke_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = dataclasses.replace(ppo_loop.PRESETS["smoke"], tasks="goal:7", run="look")
    best, fallen = evaluate.keep_best(None, policy.load_policy(smoke_run.run / "policy_sft.pt"), 0, cfg)
    assert {r["init_index"] for r in evaluate.read_records("runs/look/episodes.jsonl")} == {40, 41} and best["successes"] == 0 and not fallen
    assert "real LIBERO after iteration 0: 0/2, best 0 after iteration 0\n" in capsys.readouterr().out
    assert not list(Path("runs").rglob("*.pt"))


def test_another_judge_than_the_two_is_refused(refused):
    assert "got --judge maybe, expected reward_head or binary" in refused(reflector, "--judge", "maybe")
    assert "got --judge maybe, expected reward_head or binary" in refused(ppo_loop, "--judge", "maybe")


@pytest.mark.parametrize("flags", ["--warmup 0", "--horizon 0.0", "--keyframe-starts -1", "--micro-starts 0", "--noise-scale 0.0", "--ppo-weight -1.0", "--sft-weight -1.0", "--lr -1.0", "--lr-heads -1.0"])
def test_values_that_no_loop_can_run_with_are_refused(refused, flags, tmp_path):
    assert f"got {flags}, expected at least" in refused(ppo_loop, *flags.split()) and not list(tmp_path.iterdir())


def test_another_simulator_than_the_two_is_refused(refused, tmp_path):
    assert "got --env mujoco, expected world_sim or libero" in refused(ppo_loop, "--env", "mujoco") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--eval-every -1", "--eval-every 5 --eval-episodes 41"])
def test_looks_that_cannot_be_are_refused_before_anything_is_trained(refused, flags, tmp_path):
    assert f"got {flags.split(' --eval-ep')[0]} --eval-episodes" in refused(ppo_loop, *flags.split()) and not list(tmp_path.iterdir())


# ---- processes -----------------------------------------------------------------------------------------------------------

HALF_SUCCEED = """
import data, evaluate, ppo_loop
rollouts = evaluate.rollouts
evaluate.rollouts = lambda *args: [record | dict(ever_success=bool(i % 2)) for i, record in enumerate(rollouts(*args))]
if __name__ == "__main__":
    data.command_line(ppo_loop.main, ppo_loop.PRESETS, ppo_loop.__doc__)
"""


@pytest.mark.parametrize("env", ["libero", "world_sim"])
def test_two_processes_share_the_starts_and_make_one_update(smoke_run, tmp_path, env):
    """In real LIBERO the rollouts are those of one process, and so is the policy; in imagination each process has its own noise."""
    (tmp_path / "data").symlink_to(smoke_run.cwd / "data")
    (tmp_path / "half.py").write_text(HALF_SUCCEED)  # untrained policies never do
    flags = ["half.py", *TASKS, "--env", env, "--iterations", "1", "--rollouts", "2", "--eval-episodes", "1"]
    for name, launcher in (("one", ()), ("two", ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--"))):
        shutil.copytree(smoke_run.run, tmp_path / "runs" / name, ignore=shutil.ignore_patterns("policy_rl.pt", "ppo_loop.jsonl", "videos"))
        environment = os.environ | dict(MASTER_PORT="29542", PYTHONPATH=str(ROOT))
        done = subprocess.run([sys.executable, *launcher, *flags, "--run", name], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    start, one, two = (data.load_checkpoint(path, "policy") for path in
                       (smoke_run.run / "policy_sft.pt", tmp_path / "runs/one/policy_rl.pt", tmp_path / "runs/two/policy_rl.pt"))
    (alone,), (shared,) = (evaluate.read_records(tmp_path / "runs" / name / "ppo_loop.jsonl") for name in ("one", "two"))
    assert two["finished"] and two["step"] == 1 and shared["length"] == alone["length"] and (shared["reward"] == alone["reward"]) == (env == "libero")
    flat = lambda checkpoint: torch.cat([checkpoint["model"][name].double().flatten() for name in start["model"]])
    apart, moved = (flat(two) - flat(one)).norm(), (flat(one) - flat(start)).norm()
    assert moved > 0 and (apart < 0.02 * moved if env == "libero" else apart > 0.1 * moved), float(apart / moved)


@pytest.mark.parametrize("changes", [dict(starts=3), dict(minibatch=5), dict(eval_every=1)])
def test_what_two_processes_cannot_share_is_refused(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "processes", lambda: types.SimpleNamespace(process_index=0, num_processes=2, device="cpu"))
    with pytest.raises(data.UserError, match="on 2 processes, expected multiples of 2, and no --eval-every"):
        ppo_loop.train(dataclasses.replace(ppo_loop.PRESETS["smoke"], **changes))
    assert not list(tmp_path.iterdir())


def test_without_egl_one_line_says_what_to_install(tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "libero_demos.npz", tmp_path / "data")
    environment = os.environ | dict(MUJOCO_GL="egl", __EGL_VENDOR_LIBRARY_FILENAMES="/nonexistent")
    done = subprocess.run([sys.executable, ROOT / "policy.py", "--tasks", "goal:7", "--preset", "smoke"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: no off-screen rendering") and "apt-get install libegl1" in message
    assert not list(tmp_path.rglob("*.part*"))


def test_learning_scripts_import_no_simulator():
    code = "import sys, policy, world_sim, reflector; sys.exit(bool({'mujoco', 'robosuite', 'libero'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
