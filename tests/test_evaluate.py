"""Statistics against known values and brute force; the stop rules of one episode in a scripted environment."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import reflector
from conftest import make_episode


@pytest.mark.parametrize("successes, trials, low, high", [(0, 10, 0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1), (50, 100, 0.4038, 0.5962), (0, 0, 0, 1)])
def test_wilson_interval_has_the_published_values(successes, trials, low, high):
    assert evaluate.wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_paired_difference_uses_the_pairs():
    mean, low, high = evaluate.paired_difference([0, 0, 1, 1], [1, 1, 1, 1])
    assert mean == 0.5 and (low, high) == pytest.approx((-0.1657, 0.8323), abs=1e-3)  # by hand: (2 +- 1.96 * sqrt(3 - 4 / 6)) / 6
    same = evaluate.paired_difference([1] * 10, [1] * 10)
    assert same[0] == 0 and same[1] < -0.1 and same[2] > 0.1  # ten equal outcomes do not prove equality
    paired, shuffled = evaluate.paired_difference([0, 1] * 10, [0, 1] * 9 + [1, 1]), evaluate.paired_difference([0, 1] * 10, [1, 0] * 9 + [1, 1])
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
    noise_scale, cfg = 1.0, SimpleNamespace(image_size=32)
    act = lambda self, obs, deterministic: (torch.zeros(1, 8, 7), None)
    to_env = lambda self, chunk: chunk


def run(env, judge=None, explore_scale=None, **settings):
    return evaluate.run_episode(env, ScriptedPolicy(), evaluate.Config(**{"max_steps": 30, **settings}), init_index=None if explore_scale else 0,
                                seed=evaluate.EXPLORE_SEED + 3 if explore_scale else None, judge=judge, explore_scale=explore_scale)


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
    record, episode = run(ScriptedEnv(11), explore_scale=2.0, explore_horizon=0.9, past_success=16)
    assert 11 + 16 <= len(episode.actions) < 11 + 16 + 8 and record["ever_success"]
    assert episode.frame_steps.tolist() == list(range(0, len(episode.actions) + 1, 4))
    assert (episode.frames[:, 0, 0, 0] == episode.frame_steps).all() and (episode.proprio[:, 0] == np.arange(len(episode.actions) + 1)).all()
    assert (episode.states[:, 0] == episode.proprio[:, 0]).all() and np.flatnonzero(episode.success).tolist() == [11] and episode.index == 3


def test_reflector_report_counts_false_stops_and_delay():
    scores = {0: [0.1, 0.2, 0.9, 0.9], 1: [0.1, 0.9, 0.1, 0.1], 2: [0.1, 0.1, 0.1, 0.1], 3: [0.1, 0.1, 0.1, 0.2]}
    episodes = [make_episode(T=12, index=0, success_from=6), make_episode(T=12, index=1), make_episode(T=12, index=2), make_episode(T=12, index=3, success_from=8)]
    stub = SimpleNamespace(threshold=0.5, score=lambda episode: np.array(scores[episode.index]))
    result = evaluate.evaluate_reflector(stub, episodes)
    assert result["false_stop_rate"] == 0.5 and result["found_rate"] == 0.5 and result["mean_delay_steps"] == 2 and result["positives"] == 4
    assert evaluate.evaluate_reflector(stub, episodes, threshold=0.95)["found_rate"] == 0


def test_each_real_episode_is_judged_on_its_own(tokenizer, tmp_path, monkeypatch):
    """Scores of one episode do not count towards `min_steps` or `patience` of the next one in the same worker."""
    cfg = dataclasses.replace(reflector.PRESETS["smoke"], min_steps=2)
    model = reflector.Reflector(cfg, tokenizer)
    model.threshold.fill_(0.0)  # every score is above
    data.save_checkpoint(tmp_path / "reflector.pt", "reflector", cfg, model, tokenizer=tokenizer.backend_tokenizer.to_str())
    monkeypatch.setattr(data, "LiberoEnv", lambda task, image_size: ScriptedEnv())
    monkeypatch.setattr(evaluate, "_cached_policy", lambda path: ScriptedPolicy())
    job = lambda index: evaluate._episode_job(evaluate.Config(stop="reflector", max_steps=64), "policy_sft.pt", ScriptedEnv.task, index, str(tmp_path))
    assert [job(index)["steps"] for index in (0, 1)] == [24, 24]  # the third score is the first that may stop
