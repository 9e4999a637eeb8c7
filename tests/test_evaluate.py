"""Statistics against known values and brute force; the stop rules of one episode in a scripted environment; suites, repeatability
and `kill -9` in real LIBERO."""
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import policy
import reflector
from conftest import ROOT, make_episode


@pytest.mark.parametrize("successes, trials, low, high", [
    (0, 10, 0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1), (50, 100, 0.4038, 0.5962), (0, 0, 0, 1)])
def test_wilson_interval_has_the_published_values(successes, trials, low, high):
    assert evaluate.wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_paired_difference_uses_the_pairs():
    mean, low, high = evaluate.paired_difference([0, 0, 1, 1], [1, 1, 1, 1])
    assert mean == 0.5 and (low, high) == pytest.approx((-0.1657, 0.8323), abs=1e-3)  # by hand: (2 +- 1.96 * sqrt(3 - 4 / 6)) / 6
    same = evaluate.paired_difference([1] * 10, [1] * 10)
    assert same[0] == 0 and same[1] < -0.1 and same[2] > 0.1  # ten equal outcomes do not prove equality
    before = [0, 1] * 10
    paired, shuffled = (evaluate.paired_difference(before, after * 9 + [1, 1]) for after in ([0, 1], [1, 0]))
    assert paired[0] == pytest.approx(shuffled[0]) and paired[2] - paired[1] < shuffled[2] - shuffled[1]


def test_roc_auc_equals_brute_force_with_ties():
    rng = np.random.default_rng(0)
    score, label = rng.integers(0, 6, 60) / 5, rng.random(60) < 0.3
    pairs = [(p > n) + 0.5 * (p == n) for p in score[label] for n in score[~label]]
    assert evaluate.roc_auc(score, label) == pytest.approx(np.mean(pairs))
    assert np.isnan(evaluate.roc_auc([0.1, 0.9], [True, True]))


def test_psnr():
    black, grey = np.zeros((2, 3, 4, 4), np.uint8), np.full((2, 3, 4, 4), 16, np.uint8)
    assert evaluate.psnr(black, grey) == pytest.approx([20 * np.log10(255 / 16)] * 2)
    assert (evaluate.psnr(grey, black) == evaluate.psnr(black, grey)).all() and (evaluate.psnr(black, black) > 60).all()


class ScriptedEnv:
    """Succeeds after the control steps in `when`; counts its renders."""
    task = data.Task("libero_goal", 7, "turn_on_the_stove", "turn on the stove", "", 100)

    def __init__(self, *when):
        self.when, self.steps, self.renders = when, 0, 0

    def reset(self, init_index=None, seed=None):
        self.steps = 0
        return self.observe()

    def observe(self):
        return dict(frames=self.render(), proprio=self.proprio(), instruction=self.task.instruction)

    def step_chunk(self, actions, render=True):
        self.steps += len(actions)
        return {}, np.array([self.check_success()])

    def render(self):
        self.renders += 1
        return np.full((3, 32, 32), self.steps, np.uint8)

    env = property(lambda self: self)
    check_success = lambda self: self.steps in self.when
    proprio = lambda self: np.full(8, self.steps, np.float32)
    state = lambda self: np.full(5, self.steps, float)
    close = lambda self: None


class ScriptedPolicy:
    noise_scale, cfg = 1.0, SimpleNamespace(image_size=32, cameras=1, chunk_size=8)
    act = lambda self, obs, deterministic: (torch.zeros(1, 8, 7), torch.zeros(1, 8))
    to_env = lambda self, chunk: chunk


def run(env, judge=None, explore_scale=None, **settings):
    which = dict(seed=evaluate.EXPLORE_SEED + 3) if explore_scale else dict(init_index=0)
    return evaluate.run_episode(env, ScriptedPolicy(), evaluate.Config(**{"max_steps": 30, **settings}), **which, judge=judge,
                                explore_scale=explore_scale)


def test_oracle_stops_at_the_first_success():
    record, frames = run(ScriptedEnv(11))
    assert record["success"] and record["steps"] == 11 and [f.max() for f in frames] == [0, 8, 11]


def test_horizon_judges_the_last_state():
    record, _ = run(ScriptedEnv(11), stop="horizon")
    assert not record["success"] and record["ever_success"] and record["steps"] == 30
    assert run(ScriptedEnv(30), stop="horizon")[0]["success"]


@pytest.mark.parametrize("succeeds_at", [8, 16])
def test_reflector_rule_judges_the_state_it_stopped_in(succeeds_at):
    record, _ = run(ScriptedEnv(succeeds_at), stop="reflector", judge=lambda frames, step: (0.9, len(frames) == 3))
    assert record["steps"] == 16 and record["success"] == (succeeds_at == 16) and record["p_success"] == 0.9


def test_only_policy_queries_are_rendered():
    env = ScriptedEnv()
    run(env, stop="horizon")
    assert env.renders == 1 + -(-30 // 8)


def test_exploration_goes_on_past_success_and_is_stored_aligned():
    record, episode = run(ScriptedEnv(11), explore_scale=2.0, explore_horizon=0.9, past_success=16, frame_every=4)
    assert 11 + 16 <= len(episode.actions) < 11 + 16 + 8 and record["ever_success"]
    assert episode.frame_steps.tolist() == list(range(0, len(episode.actions) + 1, 4))
    assert (episode.frames[:, 0, 0, 0] == episode.frame_steps).all() and episode.index == 3
    assert (episode.proprio[:, 0] == np.arange(len(episode.actions) + 1)).all()
    assert (episode.states[:, 0] == episode.proprio[:, 0]).all() and np.flatnonzero(episode.success).tolist() == [11]


def test_reflector_report_counts_false_wrong_and_late_stops():
    scores = {0: [0.1, 0.2, 0.9, 0.9], 1: [0.1, 0.9, 0.1, 0.1], 2: [0.1, 0.1, 0.1, 0.1], 3: [0.1, 0.1, 0.1, 0.2], 4: [0.1, 0.9, 0.9, 0.9]}
    episodes = [make_episode(T=12, index=index, success_from=step) for index, step in enumerate((6, None, None, 8, 12))]
    stub = SimpleNamespace(threshold=0.5, score=lambda episode: np.array(scores[episode.index]), cfg=SimpleNamespace(min_steps=0, patience=1))
    result = evaluate.evaluate_reflector(stub, episodes)
    assert result["false_stop_rate"] == 0.5 and result["found_rate"] == result["wrong_stop_rate"] == 1 / 3  # the last stops too early
    assert result["mean_delay_steps"] == 2 and result["positives"] == 5 and result["stop_precision"] == 1 / 3
    patient = SimpleNamespace(**vars(stub) | dict(cfg=SimpleNamespace(min_steps=0, patience=2)))
    result = evaluate.evaluate_reflector(patient, episodes)
    assert result["false_stop_rate"] == 0 and result["found_rate"] == 1 / 3 and result["mean_delay_steps"] == 6
    stub.threshold = 0.95
    result = evaluate.evaluate_reflector(stub, episodes)
    assert result["found_rate"] == 0 and np.isnan(result["stop_precision"]) and np.isnan(result["wrong_instruction_auc"])  # one instruction


def test_reflector_report_knows_wrong_instructions_and_calibration():
    episodes = [make_episode(T=12, index=index, success_from=8, instruction=text) for index, text in enumerate("ab")]
    done = {(0, "a"): 0.9, (1, "b"): 0.8, (0, "b"): 0.85, (1, "a"): 0.1}  # the last two: the same frames, another task's instruction
    stub = SimpleNamespace(threshold=0.5, score=lambda e: np.array([0.05, 0.05] + [done[e.index, e.instruction]] * 2), cfg=SimpleNamespace(min_steps=0, patience=1))
    result = evaluate.evaluate_reflector(stub, episodes)
    assert result["wrong_instruction_auc"] == 12 / 16 and result["auc"] == 1
    assert result["ece"] == pytest.approx((4 * 0.05 + 2 * 0.1 + 2 * 0.2) / 8)


def test_ssim_knows_equal_noisy_and_unrelated_frames():
    ssim = data.beside("ssim")
    rng = np.random.default_rng(0)
    frame = np.kron(rng.integers(0, 256, (3, 8, 8)), np.ones((8, 8))).astype(np.uint8)
    noisy = np.clip(frame + rng.normal(0, 20, frame.shape), 0, 255).astype(np.uint8)
    values = [ssim(frame, other) for other in (frame, noisy, frame[:, ::-1].copy())]
    assert values[0] == pytest.approx(1) and 0.3 < values[1] < 0.95 and values[2] < values[1]
    flat = np.full((3, 32, 32), 100, np.uint8)  # only the means differ: (2 a b + c) / (a^2 + b^2 + c)
    c = (0.01 * 255) ** 2
    assert ssim(flat, flat + 50) == pytest.approx((2 * 100 * 150 + c) / (100 ** 2 + 150 ** 2 + c), abs=1e-5)


def simulator(frames_of):
    """A simulator of chunks of 8 whose imagined frames of an episode are `frames_of(episode, actions, number of chunks)`."""
    def replay(_, episodes, actions=None):
        actions = actions or [e.actions for e in episodes]
        chunks = -(-max(map(len, actions)) // 8)
        frames = np.stack([frames_of(e, a, chunks) for e, a in zip(episodes, actions)])
        return frames, np.stack([np.concatenate([e.proprio[::8], np.repeat(e.proprio[-1:], 40, 0)])[:chunks + 1] + 0.003 for e in episodes])
    return SimpleNamespace(cfg=SimpleNamespace(chunk_size=8, frames_per_chunk=1)), replay


def test_world_sim_report_compares_with_the_frame_of_the_same_step(monkeypatch):
    """A perfect simulator whose picture changes only where it is given the real actions."""
    def frames_of(episode, actions, chunks):
        real = np.concatenate([episode.frames[::2], np.repeat(episode.frames[-1:], chunks, 0)])[:chunks + 1]
        return real if np.array_equal(actions, episode.actions) else np.repeat(real[:1], chunks + 1, 0)
    stub, replay = simulator(frames_of)
    monkeypatch.setattr(evaluate, "replay", replay)
    episodes = [make_episode(T=24, seed=0, index=4), make_episode(T=16, seed=1, index=9)]
    result = evaluate.evaluate_world_sim(stub, episodes, horizons=(8, 24, 64))
    assert result["psnr_imagined_8"] > 60 and result["ssim_imagined_24"] == pytest.approx(1) and not any(key.endswith("_64") for key in result)
    for other in ("shuffled", "still"):
        assert result[f"psnr_{other}_8"] == pytest.approx(result["psnr_frozen_8"]) and result["psnr_frozen_8"] < 15
    assert result["drift_mm_8"] == pytest.approx(3 * 3 ** 0.5, rel=1e-3) and result["drift_degrees_24"] == pytest.approx(np.degrees(0.003 * 3 ** 0.5), rel=1e-2)


def test_stability_measures_the_last_frame_after_304_steps(monkeypatch):
    fade = lambda episode, actions, chunks: np.stack([128 + (episode.frames[0].astype(float) - 128) * (1 - i / 76) for i in range(chunks + 1)]).astype(np.uint8)
    stub, replay = simulator(fade)
    monkeypatch.setattr(evaluate, "replay", replay)
    result = evaluate.stability(stub, [make_episode(T=24)])
    assert result["contrast_304"] == pytest.approx(0.5, abs=0.02) and result["sharpness_304"] == pytest.approx(0.5, abs=0.02)


def test_success_agreement_and_its_kappa(monkeypatch):
    """Episodes 0, 1 succeed and 2, 3 fail; the imagined frames of 0 and 2 look like success, the real ones tell the truth."""
    episodes = [dataclasses.replace(make_episode(T=16, index=i, success_from=9 if i < 2 else None)) for i in range(4)]
    for episode in episodes:
        episode.frames[:] = 0
        episode.frames[-1] = 255 * episode.success.any()
    stub, replay = simulator(lambda e, actions, chunks: np.repeat(np.full((1, 3, 32, 32), 255 * (e.index in (0, 2)), np.uint8), chunks + 1, 0))
    monkeypatch.setattr(evaluate, "replay", replay)
    judge = SimpleNamespace(cfg=SimpleNamespace(min_steps=0, patience=1), threshold=torch.tensor(0.5), score=lambda e: e.frames.mean((1, 2, 3)) / 255)
    result = evaluate.success_agreement(stub, judge, episodes)
    assert result == dict(agreement=0.5, kappa=0.0, episodes=4, successes=2, found=1, invented=1, agreement_on_real_frames=1.0)
    assert evaluate.success_agreement(stub, judge, [episodes[0], episodes[3]])["kappa"] == 1


def test_each_real_episode_is_judged_on_its_own(tokenizer, tmp_path, monkeypatch):
    """Scores of one episode do not count towards `min_steps` or `patience` of the next one in the same worker."""
    cfg = dataclasses.replace(reflector.PRESETS["smoke"], min_steps=2, patience=1)
    model = reflector.Reflector(cfg, tokenizer)
    model.threshold.fill_(0.0)  # every score is above
    data.save_checkpoint(tmp_path / "reflector.pt", "reflector", cfg, model, tokenizer=tokenizer.backend_tokenizer.to_str())
    monkeypatch.setattr(data, "LiberoEnv", lambda task, image_size, wrist: ScriptedEnv())
    monkeypatch.setattr(evaluate, "_cached_policy", lambda path: ScriptedPolicy())
    cfg = evaluate.Config(stop="reflector", max_steps=64)
    job = lambda index: evaluate._episode_job(cfg, "policy_sft.pt", ScriptedEnv.task, index, str(tmp_path))
    assert [job(index)["steps"] for index in (0, 1)] == [24, 24]  # the third score is the first that may stop


# ---- flags and suites ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, says", [
    ("--explore --noise-scale", "got --noise-scale without a number"), ("--explore --noise-scale -2", "got --noise-scale -2.0"),
    ("--explore --noise-scale 1 0", "got --noise-scale 1.0 0.0"), ("--explore --noise-scale nan", "got --noise-scale nan"),
    ("--explore --noise-scale inf", "got --noise-scale inf"), ("--explore --explore-horizon 0", "got --explore-horizon 0.0"),
    ("--explore --explore-episodes 0", "got --explore-episodes 0"), ("--explore --frame-every 0", "got --frame-every 0"),
    ("--workers 0", "got --workers 0"), ("--episodes 0", "got --episodes 0"), ("--max-steps -1", "got --max-steps -1"),
    ("--episodes 51", "libero_goal:7 has 50 official initial states, got --episodes 51"),
    ("--first-state 45", "libero_goal:7 has 50 official initial states, got --episodes 10 from 45 on"),
    ("--first-state -1", "got --first-state -1, expected at least 0"),
    ("--explore --tasks goal:7+libero_goal_swap:7", "two of these tasks have the same name"),
    ("--tasks libero_goal_env:3", "libero_goal_env:3 cannot be run"), ("--tasks libero_100", "libero_100"),
    ("--explore --tasks libero_goal_env", "libero_goal_env:0 cannot be run"),
    ("--tasks libero_10_with_milk:2,3", "libero_10_with_milk:3 cannot be run"),
])
def test_values_and_tasks_that_cannot_be_run_are_one_line(flags, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *(["--tasks", "goal:7"] if "--tasks" not in flags else []), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        data.command_line(evaluate.main, evaluate.PRESETS, evaluate.__doc__)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], lines
    assert not list(tmp_path.iterdir())


PRO = [f"libero_{base}_{kind}" for base in ("spatial", "object", "goal", "10") for kind in ("lan", "object", "swap", "task")]


def test_every_published_suite_is_known_by_name_and_runs_as_long_as_its_base():
    for suite in ["libero_90", *PRO, "libero_goal_with_mug", "libero_10_with_mug", "libero_object_with_yellow_book"]:
        tasks = evaluate.checked_tasks(evaluate.Config(tasks=suite))
        base = max((name for name in data.MAX_STEPS if suite.startswith(name)), key=len)
        assert {task.max_steps for task in tasks} == {data.MAX_STEPS[base]}, suite
        assert len(tasks) == (90 if suite == "libero_90" else 10) and all(task.camera.shape == (3, 4) for task in tasks)


@pytest.mark.parametrize("succeeds_at, steps", [(11, 11), (8, 8), (99, 20)])
def test_a_real_rollout_ends_with_the_step_that_succeeds(monkeypatch, succeeds_at, steps):
    """And holds an observation, an action chunk and its log-probability for each time the policy was asked, nothing of what came after."""
    monkeypatch.setattr(data, "LiberoEnv", lambda task, image_size, wrist: ScriptedEnv(succeeds_at))
    monkeypatch.setattr(evaluate, "_cached_policy", lambda path: ScriptedPolicy())
    monkeypatch.setattr(evaluate, "_cached_env", {})
    monkeypatch.setattr(data, "beside", lambda name: lambda env, episode, step: env.reset(seed=episode.index))
    cfg = evaluate.Config(explore=True, max_steps=20, noise_scale=(3.0,), frame_every=8, past_success=0, episodes=2)
    rollouts = evaluate._rollouts_job(cfg, "policy_candidate.pt", ScriptedEnv.task, SimpleNamespace(index=3, frame_steps=[0, 4]), 1, 100_000)
    record, queries = rollouts["records"][1], -(-steps // 8)
    assert len(rollouts["records"]) == 2 and rollouts["success"] == record["ever_success"]
    assert (record["steps"], record["ever_success"], record["noise_scale"]) == (steps, succeeds_at <= 20, 3.0)
    assert record["frames"][:, 0, 0, 0].tolist() == record["proprio"][:, 0].tolist() == [0, 8, 16][:queries]
    assert record["action_chunk"].shape == (queries, 8, 7) and record["log_prob"].shape == (queries, 8)


def test_every_iteration_and_every_loop_has_noise_of_its_own(monkeypatch):
    """Jobs come task by task, because a simulator takes seconds to build, records in the order of the starts."""
    sent = []

    def run_jobs(cfg, jobs, work, pool):
        sent.extend((job[1].index, cfg.max_steps, cfg.noise_scale) for job in jobs)
        return [(job, dict(records=[(job[2].task, *job[3:], n) for n in range(cfg.episodes)])) for job in reversed(jobs)]
    monkeypatch.setattr(evaluate, "candidate", lambda policy: contextlib.nullcontext("policy_candidate.pt"))
    monkeypatch.setattr(evaluate, "run_jobs", run_jobs)
    monkeypatch.setattr(evaluate, "_pool", lambda workers: None)
    bowl, stove = (SimpleNamespace(task=task.name) for task in data.parse_tasks("goal:1,7"))
    loop = lambda seed, first: [record[1:] for record in evaluate.rollouts(ScriptedPolicy(), [(stove, 5), (bowl, 2), (stove, 0)], 90, first, SimpleNamespace(
        preset="tiny", tasks="goal:1,7", noise_scale=3.0, rollouts=2, seed=seed))]
    assert loop(0, 6) == [(5, 100_006, 0), (5, 100_006, 1), (2, 100_007, 0), (2, 100_007, 1), (0, 100_008, 0), (0, 100_008, 1)]
    assert sent == [(1, 90, (3.0,)), (7, 90, (3.0,)), (7, 90, (3.0,))]
    noise = lambda seed, first: {record[1:] for record in loop(seed, first)}
    assert not noise(0, 0) & noise(0, 3) and not noise(0, 0) & noise(1, 0)


@pytest.mark.parametrize("frame_every", [4, 8])
def test_exploration_may_end_with_the_step_that_succeeds(frame_every):
    episode = run(ScriptedEnv(11), explore_scale=1.0, frame_every=frame_every, past_success=0)[1]
    assert len(episode.actions) == 11 and episode.frame_steps[-1] == 11 and len(episode.success) == 12


def test_the_policy_is_told_the_perturbed_instruction():
    """LIBERO-PRO writes it into the task description; the file name, LIBERO's own source of instructions, keeps the old one."""
    instruction = lambda spec: data.parse_tasks(spec)[0].instruction
    assert instruction("libero_goal_task:0") == "open the bottom drawer of the cabinet" != instruction("libero_goal:0")
    assert instruction("libero_10_lan:0") == "place alphabet soup and tomato sauce into basket"
    for suite in PRO:  # a paraphrase and a new task differ from the base suite, moved and replaced objects do not
        for task, base in zip(data.parse_tasks(suite), data.parse_tasks(suite.rsplit("_", 1)[0])):
            assert (task.instruction != base.instruction) == suite.endswith(("_lan", "_task")), (suite, task.index)


def test_noise_levels_are_mixed_by_the_number_of_the_episode(monkeypatch, tmp_path):
    scripted = ScriptedPolicy()
    monkeypatch.setattr(data, "LiberoEnv", lambda task, image_size, wrist: ScriptedEnv())
    monkeypatch.setattr(evaluate, "_cached_policy", lambda path: scripted)
    monkeypatch.setattr(evaluate, "_cached_env", {})
    cfg, used = evaluate.Config(explore=True, explore_horizon=0.1, noise_scale=(0.5, 3.0)), []
    for index in (3, 0, 1):
        record = evaluate._episode_job(cfg, "policy_sft.pt", ScriptedEnv.task, index, str(tmp_path))
        used.append((record["noise_scale"], scripted.noise_scale))
    assert used == [(3.0, 3.0), (0.5, 0.5), (3.0, 3.0)]
    evaluate._episode_job(dataclasses.replace(cfg, explore=False), "policy_sft.pt", ScriptedEnv.task, 0, str(tmp_path))
    assert scripted.noise_scale == 1  # exploration leaves nothing behind


# ---- processes -----------------------------------------------------------------------------------------------------------

def second_fails(begun):
    def job(cfg, number):
        begun.append(number)
        time.sleep(0.05)
        if number == 1:
            raise data.UserError("no such thing")
        return dict(success=True)
    return job


def test_an_error_is_told_before_the_queued_episodes_run(monkeypatch):
    begun, ended = [], []
    monkeypatch.setattr(data, "process_pool", ThreadPoolExecutor)
    monkeypatch.setattr(evaluate, "_episode_job", second_fails(begun))
    with pytest.raises(data.UserError, match="no such thing"):
        ended += [n for (n,), _ in evaluate.run_jobs(evaluate.Config(workers=1), [(n,) for n in range(20)])]
    assert len(begun) <= 4
    monkeypatch.setattr(evaluate, "_episode_job", lambda cfg, number: (_ for _ in ()).throw(BrokenExecutor("died")))
    with pytest.raises(data.UserError, match="simulator process was killed.*--workers 1"):
        list(evaluate.run_jobs(evaluate.Config(workers=1), [(0,)]))


def test_the_simulators_of_rollouts_stay_open_from_one_iteration_to_the_next(monkeypatch):
    begun, cfg = [], evaluate.Config(workers=1)
    job = second_fails(begun)
    with ThreadPoolExecutor(1) as pool:
        assert [job for job, _ in evaluate.run_jobs(cfg, [(0,)], job, pool)] == [(0,)]
        with pytest.raises(data.UserError, match="no such thing"):
            list(evaluate.run_jobs(cfg, [(n,) for n in range(1, 20)], job, pool))
        assert len(begun) <= 5  # what is queued would come before the next iteration's
        assert [job for job, _ in evaluate.run_jobs(cfg, [(0,)], job, pool)] == [(0,)]
    made, closed = [], []
    monkeypatch.setattr(data, "LiberoEnv", lambda task: made.append(task) or SimpleNamespace(close=lambda: closed.append(task)))
    monkeypatch.setattr(evaluate, "_cached_env", {})
    for task in "abacab":
        evaluate._open_env(task, kept=2)
    assert made == [*"abcab"] and closed == [*"abc"]
    evaluate._open_env("c")
    assert made == [*"abcabc"] and closed == [*"abcab"]  # without `kept` it is the only one


def test_a_line_cut_short_costs_that_record_only(tmp_path):
    path = tmp_path / "episodes.jsonl"
    for number in range(2):
        evaluate.append_record(path, dict(number=number))
    path.write_text(path.read_text()[:-4])  # a kill in mid line
    evaluate.append_record(path, dict(number=2))
    evaluate.append_record(path, dict(number=3))
    assert [record["number"] for record in evaluate.read_records(path)] == [0, 2, 3] and path.read_text().count("\n") == 4


# ---- real episodes ---------------------------------------------------------------------------------------------------------

EPISODES = evaluate.Config(tasks="goal:7", run="killed", workers=1, episodes=3, max_steps=32)
EXPLORE = dataclasses.replace(EPISODES, explore=True, explore_episodes=4, explore_horizon=0.11)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokenizer):
    """Random weights, and all episodes of EXPLORE and EPISODES in this process, in another order -> file, episodes, records."""
    cwd, cfg, task = tmp_path_factory.mktemp("undisturbed"), policy.PRESETS["smoke"], data.parse_tasks("goal:7")[0]
    torch.manual_seed(0)
    model, path = policy.Policy(cfg, tokenizer), cwd / "policy_sft.pt"
    data.save_checkpoint(path, "policy_sft", cfg, model, tokenizer=tokenizer.backend_tokenizer.to_str(), demos={})
    for index in (1, 3, 0, 2):
        evaluate._episode_job(EXPLORE, str(path), task, index, str(cwd))
    records = [evaluate._episode_job(EPISODES, str(path), task, index, str(cwd)) for index in (2, 0, 1)]
    yield SimpleNamespace(path=path, task=task, records=sorted(records, key=lambda r: r["init_index"]),
                          episodes=[read(cwd, task, index) for index in range(4)])
    for env in evaluate._cached_env.values():  # a gigabyte that later tests do not need
        env.close()
    evaluate._cached_env.clear()


def read(folder, task, index):
    episode, = data.read_libero_hdf5(folder / f"{task.name}_{index}.hdf5")
    return episode


def assert_same_bits(a, b):
    for name in ("actions", "states", "success", "proprio", "frames", "frame_steps"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_an_exploration_episode_depends_on_nothing_but_its_number(undisturbed, tmp_path):
    """Episode 3 alone in a fresh process, and after episode 1 in this one."""
    with data.process_pool(1) as pool:
        pool.submit(evaluate._episode_job, EXPLORE, str(undisturbed.path), undisturbed.task, 3, str(tmp_path)).result()
    assert_same_bits(read(tmp_path, undisturbed.task, 3), undisturbed.episodes[3])
    assert len(undisturbed.episodes[3].actions) == 33 and np.ptp(undisturbed.episodes[3].states, 0).max() > 0.01
    assert not np.array_equal(undisturbed.episodes[3].states, undisturbed.episodes[0].states)  # as noisy, but another number


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for worker processes in /proc")
@pytest.mark.parametrize("cfg", [EXPLORE, EPISODES], ids=["explore", "evaluate"])
def test_kill_9_costs_the_episodes_in_flight_and_nothing_else(undisturbed, cfg, tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "killed"
    run.mkdir(parents=True)
    shutil.copy(undisturbed.path, run)
    finished = lambda: {p.name: p.read_bytes() for p in (run / "explore").glob("[!.]*.hdf5")} if cfg.explore else dict(
        enumerate((run / "episodes.jsonl").read_text().splitlines() if (run / "episodes.jsonl").exists() else []))
    flags = [x for name in ("tasks", "run", "workers", "episodes", "max_steps", "explore_episodes", "explore_horizon")
             for x in (f"--{name.replace('_', '-')}", str(getattr(cfg, name)))]
    process = subprocess.Popen([sys.executable, ROOT / "evaluate.py", *flags, *["--explore"] * cfg.explore], cwd=tmp_path)
    while not finished():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.4)  # into the next episode
    workers = [int(pid) for path in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in path.read_text().split()]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, 9)
    assert workers and not left, "worker processes outlived the run"
    before, total = finished(), cfg.explore_episodes if cfg.explore else cfg.episodes
    assert 1 <= len(before) < total
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    evaluate.main(cfg)
    assert f"{total - len(before)} episodes" in capsys.readouterr().out and before.items() <= finished().items()
    assert len(finished()) == total and not list(tmp_path.rglob("*.part*"))
    if cfg.explore:
        for index in range(total):
            assert_same_bits(read(run / "explore", undisturbed.task, index), undisturbed.episodes[index])
    else:
        records = sorted(evaluate.read_records(run / "episodes.jsonl"), key=lambda r: r["init_index"])
        assert [r | dict(stamp=None) for r in records] == [r | dict(stamp=None) for r in undisturbed.records]
        row, = json.loads((run / "results_policy_sft_oracle.json").read_text())["policies"]["policy_sft"]["tasks"].values()
        assert row["success"] == [r["success"] for r in undisturbed.records] and row["mean_steps"] == 32


@pytest.mark.parametrize("spec", ["libero_90:0", "libero_goal_swap:1"])
def test_other_suites_run_by_name(undisturbed, spec, tmp_path):
    task, = data.parse_tasks(spec)
    record = evaluate._episode_job(dataclasses.replace(EPISODES, max_steps=8), str(undisturbed.path), task, 0, str(tmp_path))
    assert record["task"] == spec and record["steps"] == 8 and len(list((tmp_path / "videos").glob(f"*{task.suite}*.mp4"))) == 1


def test_a_policy_with_two_cameras_sees_both(undisturbed, tokenizer, tmp_path, monkeypatch):
    cfg = dataclasses.replace(policy.PRESETS["smoke"], cameras=2)
    torch.manual_seed(0)
    data.save_checkpoint(tmp_path / "two.pt", "policy_sft", cfg, policy.Policy(cfg, tokenizer), tokenizer=tokenizer.backend_tokenizer.to_str(), demos={})
    seen, embed = [], policy.Policy.embed
    monkeypatch.setattr(policy.Policy, "embed", lambda self, obs: seen.append(obs) or embed(self, obs))
    record = evaluate._episode_job(dataclasses.replace(EPISODES, max_steps=16), str(tmp_path / "two.pt"), undisturbed.task, 0, str(tmp_path))
    assert record["steps"] == 16 and len(seen) == 2 and seen[0]["wrist_frames"].shape == (1, 3, 32, 32)
    assert seen[0]["wrist_frames"].float().std() > 5 and not torch.equal(seen[0]["wrist_frames"], seen[0]["frames"])
    assert not torch.equal(seen[0]["wrist_frames"], seen[1]["wrist_frames"])


def test_the_benchmark_renders_after_every_chunk_or_every_step(monkeypatch):
    import bench
    rendered, render = [], data.LiberoEnv.render
    monkeypatch.setattr(data.LiberoEnv, "render", lambda self, *args: rendered.append(1) or render(self, *args))
    shown = {}
    for per_step, renders in ((False, 1 + 2), (True, 1 + 16)):  # the reset, then 2 chunks of 8
        rendered.clear()
        steps, shown[per_step], _ = bench.episode(bench.Config(tasks="goal:7"), per_step, 0, 16)
        assert steps == 16 and len(rendered) == renders
    assert np.array_equal(shown[False], shown[True]) and shown[True].std() > 5
    bench.simulator("goal:7")[0].close()


def test_the_table_tells_what_the_oracle_would_have_stopped_in_time(capsys):
    row = dict(successes=3, ever_successes=7, trials=10, interval=(0.1, 0.6), instruction="turn on the stove")
    result = dict(protocol=dict(stop="horizon"), policies=dict(policy_sft=row | dict(tasks={"libero_goal:7": row})))
    data.beside("print_table")(result)
    assert capsys.readouterr().out.count("3/10   30.0 % [10.0, 60.0] ever 7") == 2
    data.beside("print_table")(result | dict(protocol=dict(stop="oracle")))
    assert "ever" not in capsys.readouterr().out


def test_a_suite_without_its_models_is_one_line():
    """LIBERO-PRO has descriptions and initial states of suites whose objects were never published."""
    with pytest.raises(data.UserError, match="libero_goal_with_red_stick:0 cannot be run: .* lacks red_sticker.xml"):
        evaluate._open_env(data.parse_tasks("libero_goal_with_red_stick:0")[0], 32, False)
