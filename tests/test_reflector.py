"""Which frames it sees, when it stops, how the threshold is chosen; invariants of the network; it learns."""
import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import reflector as script
from conftest import INSTRUCTIONS, make_episode, make_obs

CFG = script.PRESETS["smoke"]


@pytest.fixture
def reflector(tokenizer):
    torch.manual_seed(0)
    return script.Reflector(dataclasses.replace(CFG, frames=4), tokenizer).eval()


def test_pick_is_uniform_with_first_and_last():
    assert script.pick(1, 4).tolist() == [0, 0, 0, 0] and script.pick(10, 4).tolist() == [0, 3, 6, 9] and script.pick(4, 4).tolist() == [0, 1, 2, 3]
    assert all(script.pick(n, 4)[0] == 0 and script.pick(n, 4)[-1] == n - 1 for n in range(1, 50))


# ---- stopping ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scores, settings, expected", [
    ([.9, .1, .9, .1], {}, 0),                       # success in the first chunk is seen
    ([.1, .2, .9, .1], {}, 2),
    ([.1, .2, .3, .4], {}, 3),                       # never: the last step
    ([.1, .5, .1, .9], {}, 3),                       # above the threshold, not at it
    ([.9, .9, .1, .9], dict(min_steps=2), 3),
    ([.9, .1, .9, .9], dict(patience=2), 3),
    ([.9, .1, .9, .1], dict(patience=2), 3),         # never two in a row: the last step
    ([.9, .9, .9, .9], dict(min_steps=1, patience=2), 2),
])
def test_finish_step(scores, settings, expected):
    p = torch.tensor([scores, [0.0] * 4])
    assert script.finish_step(p, 0.5, **settings).tolist() == [expected, 3]
    hit = script.stops(p, 0.5, **settings)
    assert not hit[1].any() and not hit[0, :expected].any()


def test_stopping_never_looks_ahead():
    p = torch.rand(20, 12)
    for patience in (1, 2, 3):
        whole = script.stops(p, 0.6, 2, patience)
        assert all(torch.equal(script.stops(p[:, :t], 0.6, 2, patience), whole[:, :t]) for t in range(1, 13))


def test_threshold_separates_what_is_separable():
    threshold = script.choose_threshold([0.1, 0.2, 0.35, 0.7, 0.8], [0, 0, 0, 1, 1])
    assert 0.35 < threshold < 0.7
    assert script.choose_threshold([0.2, 0.9], [1, 1]) == script.choose_threshold([0.2, 0.9], [0, 0]) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_threshold_has_the_best_f_half_of_all(seed):
    rng = np.random.default_rng(seed)
    label = rng.random(80) < 0.3
    p = (0.1 + 0.8 * np.clip(0.3 * label + 0.7 * rng.random(80), 0, 1)).round(2)  # with ties

    def f_half(threshold):
        called, hits = (p > threshold).sum(), (label & (p > threshold)).sum()
        precision, recall = hits / max(called, 1), hits / label.sum()
        return 1.25 * precision * recall / max(0.25 * precision + recall, 1e-9)
    assert f_half(script.choose_threshold(p, label)) == pytest.approx(max(f_half(t) for t in np.arange(0.055, 0.95, 0.005)))


def test_the_threshold_must_not_stop_an_episode_before_it_succeeds():
    """The first is at 0.6 two frames before its success, at 0.8 in it; the last never succeeds."""
    p, label = [[0.1, 0.6, 0.6, 0.8, 0.9], [0.1, 0.2, 0.2, 0.8, 0.8], [0.1, 0.3, 0.3, 0.3, 0.3]], [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0] * 5]
    assert 0.6 <= script.choose_threshold(p, label) < 0.8
    assert 0.6 <= script.choose_threshold(p, label, patience=2) < 0.8
    brief = [[0.1, 0.6, 0.1, 0.8, 0.9], *p[1:]]  # a single score is not two in a row
    assert 0.3 <= script.choose_threshold(brief, label, patience=2) < 0.8 and 0.6 <= script.choose_threshold(brief, label) < 0.8


# ---- the network ---------------------------------------------------------------------------------------------------------

def frames_of(B, T, seed=0):
    return make_obs(B * T, seed=seed)["frames"].unflatten(0, (B, T))


@torch.no_grad()
def test_one_logit_a_rollout_and_see_then_read_is_forward(reflector):
    frames = frames_of(3, 9)
    logit = reflector(frames, INSTRUCTIONS)
    assert logit.shape == (3,) and logit.dtype == torch.float32
    torch.testing.assert_close(reflector.read(reflector.see(frames), INSTRUCTIONS), logit, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_of_shorter_instructions_changes_nothing(reflector):
    frames = frames_of(3, 5)
    together = reflector(frames, INSTRUCTIONS)
    for i in range(3):
        torch.testing.assert_close(together[i:i + 1], reflector(frames[i:i + 1], INSTRUCTIONS[i:i + 1]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_instruction_and_every_picked_frame_matter(reflector):
    frames = frames_of(1, 4)
    logit = reflector(frames, INSTRUCTIONS[:1])
    assert (reflector(frames, INSTRUCTIONS[1:2]) - logit).abs() > 1e-4
    for t in range(4):
        other = frames.clone()
        other[:, t] = frames_of(1, 1, seed=1)[:, 0]
        assert (reflector(other, INSTRUCTIONS[:1]) - logit).abs() > 1e-5
    assert (reflector(frames.flip(1), INSTRUCTIONS[:1]) - logit).abs() > 1e-6  # order, too


@torch.no_grad()
def test_score_is_forward_on_the_frames_so_far_and_judge_is_score(reflector):
    episode = make_episode(T=36)
    scores, frames = reflector.score(episode), torch.from_numpy(episode.frames)
    reflector.threshold.fill_(float(np.median(scores)))
    reflector.cfg = dataclasses.replace(reflector.cfg, patience=1)
    judge = reflector.judge(episode.instruction)
    for t in range(len(frames)):
        assert scores[t] == pytest.approx(float(reflector(frames[None, :t + 1], [episode.instruction]).sigmoid()), abs=1e-4)
        p_success, stop = judge(episode.frames[:t + 1], 4 * t)
        assert p_success == pytest.approx(float(scores[t]), abs=1e-4) and stop == (p_success > reflector.threshold)


def test_the_binary_judge_says_yes_or_no_where_the_other_is_more_or_less_sure(tokenizer, reflector):
    binary = script.Reflector(dataclasses.replace(reflector.cfg, judge="binary"), tokenizer).eval()
    binary.load_state_dict(reflector.state_dict())
    frames, text = frames_of(40, 4), INSTRUCTIONS[:1] * 40
    with torch.no_grad():
        reflector.head[-1].bias -= reflector(frames, text).median()
        binary.head[-1].bias.copy_(reflector.head[-1].bias)
        answer, sure = binary(frames, text).sigmoid(), reflector(frames, text).sigmoid()
    assert set(answer.tolist()) == {0.0, 1.0} and torch.equal(answer == 1, sure > 0.5)
    loss, _ = binary.train().loss(frames[:8], [[one] for one in text[:8]], torch.ones(8))  # learns from how sure it is
    loss.backward()
    assert loss.isfinite() and binary.head[1].weight.grad.abs().max() > 1e-4


def test_first_weights_are_large_enough_for_attention_to_choose(reflector):
    """With the 0.02 that transformers uses by default, learning to read took 2.5 times the steps; LlavaModel must not draw them anew."""
    for layer in reflector.llava.language_model.layers:
        for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
            assert abs(weight.std() * reflector.cfg.width ** 0.5 - 1) < 0.15


@torch.no_grad()
def test_every_preset_scores_a_video(tokenizer):
    for cfg in script.PRESETS.values():
        frames = torch.randint(0, 256, (1, 9, 3, cfg.image_size, cfg.image_size), dtype=torch.uint8)
        assert script.Reflector(cfg, tokenizer).eval()(frames, INSTRUCTIONS[:1]).isfinite().all(), cfg.preset


def test_frames_of_another_size_are_the_users_error(reflector):
    with pytest.raises(data.UserError, match="image-size 32"):
        reflector(make_obs(1, size=48)["frames"][None], INSTRUCTIONS[:1])


# ---- learning ------------------------------------------------------------------------------------------------------------

def test_batches_are_half_positive_in_every_task_and_labelled_by_frame_and_instruction():
    episodes = [make_episode(T=20, success_from=18), make_episode(T=20, seed=1, success_from=3, instruction=INSTRUCTIONS[1])]
    rows = [(e, f, e.success[s]) for e in episodes for f, s in enumerate(e.frame_steps)]
    positives, negatives = [r[:2] for r in rows if r[2]], [r[:2] for r in rows if not r[2]]
    cfg = dataclasses.replace(CFG, batch_size=200, wrong_instructions=1)
    of = lambda rows, episode: [row for row in rows if row[0] is episode]
    batch = lambda cfg, near=[]: script.make_batch([(of(positives, e), of(near, e), of(negatives, e)) for e in episodes],
                                                   INSTRUCTIONS, cfg, np.random.default_rng(0))
    frames, texts, label = batch(cfg)
    assert all(len(set(shown)) == len(shown) == 1 + cfg.wrong_instructions for shown in texts)  # its own and another
    assert {text for shown in texts for text in shown[1:]} == set(INSTRUCTIONS)
    texts = [shown[0] for shown in texts]
    assert frames.shape == (200, CFG.frames, 3, 32, 32) and label.sum() == 100
    for text in INSTRUCTIONS[:2]:  # one task has a tenth of its frames positive, the other nine: the words alone must not tell
        assert 0.35 < label[[shown == text for shown in texts]].mean() < 0.65
    for shown, text, y in zip(frames.numpy(), texts, label):
        episode = episodes[INSTRUCTIONS.index(text)]
        last = [f for f in range(len(episode.frames)) if np.array_equal(episode.frames[f], shown[-1])]
        assert y == episode.success[episode.frame_steps[last[0]]] and np.array_equal(shown[0], episode.frames[0])
    frames, _, label = batch(cfg, near=[(episodes[0], 2)])  # of that task, every other negative is the one near miss
    missed = [np.array_equal(shown[-1], episodes[0].frames[2]) for shown in frames.numpy()]
    assert label.sum() == 100 and 25 <= sum(missed) <= 40 and not any(y and miss for y, miss in zip(label, missed))


def test_the_vision_tower_starts_from_the_policys_and_one_of_another_size_is_refused(reflector, tokenizer, tmp_path):
    import policy
    cfg = dataclasses.replace(policy.PRESETS["smoke"], tower=CFG.tower)
    data.save_checkpoint(tmp_path / "policy_sft.pt", "policy_sft", cfg, theirs := policy.Policy(cfg, tokenizer))
    data.beside("load_tower")(tmp_path / "policy_sft.pt", reflector.llava.vision_tower)
    ours, theirs = reflector.llava.vision_tower.state_dict(), theirs.tower.resnet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    data.save_checkpoint(tmp_path / "policy_sft.pt", "policy_sft", cfg, policy.Policy(dataclasses.replace(cfg, tower=(8, 24)), tokenizer))
    with pytest.raises(data.UserError, match="--tower-from ''"):
        data.beside("load_tower")(tmp_path / "policy_sft.pt", reflector.llava.vision_tower)


def test_augmentation_keeps_shape_and_treats_the_frames_of_a_sample_alike(reflector):
    frames = frames_of(6, 1).expand(6, 4, 3, 32, 32)
    augmented = reflector.augment(frames, reflector.cfg)
    assert augmented.shape == frames.shape and augmented.min() >= 0 and augmented.max() <= 255 and not torch.equal(augmented, frames.float())
    torch.testing.assert_close(augmented, augmented[:, :1].expand_as(augmented))


def learn(reflector, steps, *batch):  # -> the metrics of the last step
    optimizer = torch.optim.Adam(reflector.parameters(), lr=3e-3)
    for _ in range(steps):
        loss, metrics = reflector.loss(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return metrics


def test_it_overfits_one_batch_where_only_frame_and_instruction_together_tell(reflector):
    """Four samples of an exclusive or: neither the picture nor the words alone give the label."""
    frames, texts, label = frames_of(2, 4)[[0, 0, 1, 1]], [[INSTRUCTIONS[i]] for i in (0, 1, 0, 1)], torch.tensor([0.0, 1.0, 1.0, 0.0])
    metrics = learn(reflector, 200, frames, texts, label)
    assert metrics["bce"] < 0.05 and metrics["contrast"] == 0  # there is nothing to contrast with
    assert torch.equal(reflector(frames, [shown[0] for shown in texts]) > 0, label > 0.5)


def test_the_contrast_teaches_instructions_where_the_label_never_needs_them(reflector):
    """Two scenes, each with one task and always done: the BCE alone is content with yes to everything."""
    frames, texts, label = frames_of(2, 4), [list(INSTRUCTIONS[:2]), list(INSTRUCTIONS[1::-1])], torch.ones(2)
    start, ranks = copy.deepcopy(reflector.state_dict()), {}
    for weight in (0.0, 0.6):
        reflector.load_state_dict(start)
        reflector.cfg = dataclasses.replace(reflector.cfg, contrast=weight)
        metrics = learn(reflector, 100, frames, texts, label)
        own, other = (reflector(frames, [shown[i] for shown in texts]) for i in (0, 1))
        assert (own > 1).all()
        ranks[weight] = (own - other).min()
        torch.testing.assert_close(metrics["contrast"], F.softplus(other - own).mean(), rtol=0.2, atol=1e-2)
    assert ranks[0.6] > 2 > 1 > ranks[0.0]
    assert reflector.loss(frames, texts, torch.zeros(2))[1]["contrast"] == 0  # a failure is one with any instruction


def test_a_checkpoint_gives_back_the_same_reflector(reflector, tokenizer, tmp_path):
    reflector.threshold.fill_(0.7)
    data.save_checkpoint(tmp_path / "reflector.pt", "reflector", reflector.cfg, reflector, tokenizer=tokenizer.backend_tokenizer.to_str())
    loaded, frames = script.load_reflector(tmp_path / "reflector.pt"), frames_of(3, 4)
    assert not loaded.training and loaded.cfg == reflector.cfg and float(loaded.threshold) == pytest.approx(0.7)
    assert torch.equal(loaded(frames, INSTRUCTIONS), reflector(frames, INSTRUCTIONS))
