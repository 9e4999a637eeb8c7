"""The equations against brute force and autograd; imagined rollouts and updates with tiny random models."""
import dataclasses

import pytest
import torch

import data
import policy as policy_script
import ppo_loop as script
import reflector as reflector_script
import world_sim as world_sim_script
from conftest import make_episode, make_obs

CFG = dataclasses.replace(script.PRESETS["smoke"], starts=2, rollouts=4, minibatch=8, micro_batch=2)
R, C, K = 8, 3, 8


# ---- equations -----------------------------------------------------------------------------------------------------------

def test_leave_one_out_advantage_is_brute_force_and_sums_to_zero():
    reward = torch.rand(3, 5)
    advantage = script.leave_one_out_advantage(reward)
    for g in range(3):
        for n in range(5):
            assert float(advantage[g, n]) == pytest.approx(float(reward[g, n] - torch.cat([reward[g, :n], reward[g, n + 1:]]).mean()), abs=1e-6)
    assert advantage.sum(1).abs().max() < 1e-5


def test_step_mask_includes_the_step_that_finished():
    assert script.step_mask(torch.tensor([0, 2, 4]), 5).tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


@pytest.fixture
def batch():
    """log_prob with gradient, equal old_log_prob, advantage, mask; rollouts of 3, 10 and 12 steps."""
    torch.manual_seed(0)
    log_prob = torch.randn(3, 12, requires_grad=True)
    return log_prob, log_prob.detach().clone(), torch.tensor([1.0, -0.5, 2.0]), script.step_mask(torch.tensor([2, 9, 11]), 12)


def gradient(log_prob, old, advantage, mask, clip_eps=0.1):
    return torch.autograd.grad(script.ppo_loss(log_prob, old, advantage, mask, clip_eps)[0], log_prob)[0]


def test_gradient_at_ratio_one_is_reinforces(batch):
    log_prob, old, advantage, mask = batch
    reinforce = -sum(advantage[n] * log_prob[n, :steps].mean() for n, steps in enumerate((3, 10, 12))) / 3
    torch.testing.assert_close(gradient(*batch), torch.autograd.grad(reinforce, log_prob)[0])


def test_every_executed_step_gets_gradient_and_rollouts_weigh_the_same(batch):
    log_prob, old, _, mask = batch
    grad = gradient(log_prob, old, torch.tensor([1.0, -1.0, 1.0]), mask)
    assert torch.equal(grad != 0, mask.bool())
    assert grad.abs().sum(1).tolist() == pytest.approx([1 / 3] * 3)


def test_steps_after_the_finish_change_nothing(batch):
    log_prob, old, advantage, mask = batch
    other = torch.where(mask == 1, old, old + 3.0)
    loss, metrics = script.ppo_loss(log_prob, old, advantage, mask, 0.1)
    for now, before in ((log_prob, other), (other, old)):
        again, same = script.ppo_loss(now, before, advantage, mask, 0.1)
        assert torch.equal(again, loss) and all(torch.equal(same[key], metrics[key]) for key in metrics)


def test_clipped_steps_give_no_gradient_and_the_others_do(batch):
    log_prob, old, _, mask = batch
    shift = torch.tensor([0.5, -0.5, 0.05, -0.05] * 3).expand(3, 12)  # ratio above, below, twice within 1 +- 0.1
    for sign, clipped in ((1.0, [True, False, False, False]), (-1.0, [False, True, False, False])):
        grad = gradient(log_prob, old - shift, torch.full((3,), sign), torch.ones(3, 12))
        assert torch.equal(grad == 0, torch.tensor(clipped * 3).expand(3, 12))
    assert script.ppo_loss(log_prob, old - shift, torch.ones(3), torch.ones(3, 12), 0.1)[1]["clip_frac"] == 0.5


# ---- rollouts ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def models(tokenizer):
    torch.manual_seed(0)
    policy = policy_script.Policy(dataclasses.replace(policy_script.PRESETS["smoke"], layers=2), tokenizer).eval()
    torch.nn.init.constant_(policy.scale_out.bias, -1.0)  # rollouts that differ
    return policy, world_sim_script.WorldSim(world_sim_script.PRESETS["smoke"]).eval(), reflector_script.Reflector(dataclasses.replace(reflector_script.PRESETS["smoke"], patience=1), tokenizer).eval()


def imagine(models, threshold):
    """The same seed every time -> rollouts."""
    policy, world_sim, reflector = models
    reflector.threshold.fill_(threshold)
    start_obs = world_sim_script.motion([(make_episode(seed=i), 5) for i in range(2)], 0, "cpu") | make_obs(2) | dict(horizon=C * K - 3)
    torch.manual_seed(3)
    return script.imagine(policy, world_sim, reflector, start_obs, CFG)


@pytest.fixture(scope="module")
def rollouts(models):
    """Half of the rollouts finish with the first chunk: the threshold is the median of what the reflector says then."""
    scores, read = [], models[2].read
    models[2].read = lambda tokens, instruction: scores.append(read(tokens, instruction).sigmoid()) or scores[-1].logit()
    imagine(models, 1.0)
    del models[2].read
    return imagine(models, float(scores[0].median())), scores[0]


def test_rollouts_end_where_the_reflector_says_and_keep_its_score(rollouts, models):
    rollouts, first = rollouts
    early = first > models[2].threshold
    assert 0 < early.sum() < R and torch.equal(rollouts.finish_step == K - 1, early)
    torch.testing.assert_close(rollouts.reward[early], first[early])
    assert torch.equal(rollouts.stopped, rollouts.reward > models[2].threshold)
    assert rollouts.frames.shape == (R, C, 3, 32, 32) and (rollouts.finish_step[~rollouts.stopped] == C * K - 1).all()
    assert torch.equal(rollouts.mask.flatten(1), script.step_mask(rollouts.finish_step, C * K))


def test_finished_rollouts_cost_nothing_and_never_change(rollouts, models, monkeypatch):
    rollouts, _ = rollouts
    rows, predict = [], models[1].predict
    monkeypatch.setattr(models[1], "predict", lambda memory, proprio, chunk: rows.append((len(memory.latents), len(proprio), len(chunk))) or predict(memory, proprio, chunk))
    again = imagine(models, float(models[2].threshold))
    executed = rollouts.mask.any(-1)  # (R, C)
    assert rows == [(n, n, n) for n in executed.sum(0).tolist() if n] and rows[1][0] < R
    assert torch.equal(again.reward, rollouts.reward) and torch.equal(again.action_chunk, rollouts.action_chunk)
    for field in ("frames", "proprio", "action_chunk", "old_log_prob"):
        assert not getattr(rollouts, field)[~executed].any() and getattr(rollouts, field)[executed].flatten(1).any(1).all()


def test_rollouts_of_one_start_share_it_and_then_part(rollouts):
    rollouts, _ = rollouts
    frames = rollouts.frames[:, 0].unflatten(0, (2, 4))
    assert torch.equal(frames, make_obs(2)["frames"][:, None].expand_as(frames))
    assert rollouts.instruction == [text for text in make_obs(2)["instruction"] for _ in range(4)]
    assert len(torch.unique(rollouts.action_chunk[:, 0], dim=0)) == R
    going_on = rollouts.frames[rollouts.mask[:, 1, 0] == 1, 1]
    assert len(torch.unique(going_on, dim=0)) == len(going_on) > 1


@torch.no_grad()
def test_the_update_sees_the_density_that_sampled(rollouts, models):
    rollouts, _ = rollouts
    fresh = script.log_prob_of(models[0], rollouts, torch.arange(R))
    torch.testing.assert_close(fresh, (rollouts.old_log_prob * rollouts.mask).flatten(1), atol=1e-4, rtol=0)
    assert fresh[rollouts.mask.flatten(1) == 1].all() and fresh.dtype == torch.float32


# ---- update --------------------------------------------------------------------------------------------------------------

def updated(models, rollouts, tokenizer, optimizer=torch.optim.AdamW, noise_scale=1.0, samples=None, **settings):
    """Parameters of a copy of the policy before and after one update, and the metrics."""
    policy = policy_script.Policy(models[0].cfg, tokenizer).eval()
    policy.load_state_dict(models[0].state_dict())
    policy.noise_scale = noise_scale
    torch.manual_seed(5)
    metrics = script.update(policy, optimizer(policy.parameters(), lr=1e-3, weight_decay=0.0), rollouts, dataclasses.replace(CFG, **settings), samples)
    return {name: p.detach() - models[0].get_parameter(name) for name, p in policy.named_parameters()}, metrics


def test_update_raises_when_the_densities_differ(rollouts, models, tokenizer):
    with pytest.raises(RuntimeError, match="first ratio must be 1"):
        updated(models, rollouts[0], tokenizer, noise_scale=1.2)


def test_the_first_ratio_is_one(rollouts, models, tokenizer):
    _, metrics = updated(models, rollouts[0], tokenizer)
    assert float(metrics["ratio"]) == pytest.approx(1, abs=1e-4) and metrics["clip_frac"] == 0 and metrics["approx_kl"].abs() < 1e-4


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.9])
def test_equal_rewards_teach_nothing(rollouts, models, tokenizer, reward):
    change, metrics = updated(models, dataclasses.replace(rollouts[0], reward=torch.full((R,), reward)), tokenizer)
    assert metrics["useful_groups"] == 0 and all(delta.abs().max() < 1e-6 for delta in change.values())


def test_an_update_makes_good_actions_likelier_and_bad_ones_less(rollouts, models, tokenizer):
    rollouts = dataclasses.replace(rollouts[0], reward=torch.tensor([1.0, 0.0] * 4))
    policy = policy_script.Policy(models[0].cfg, tokenizer).eval()
    policy.load_state_dict(models[0].state_dict())
    script.update(policy, torch.optim.SGD(policy.parameters(), lr=1e-3), rollouts, CFG)
    with torch.no_grad():
        gain = (script.log_prob_of(policy, rollouts, torch.arange(R)) - (rollouts.old_log_prob * rollouts.mask).flatten(1)).sum(1) / rollouts.mask.sum((1, 2))
    assert gain[::2].mean() > 1e-5 and gain[::2].mean() > gain[1::2].mean() + 1e-5


def test_micro_batches_do_not_change_the_update(rollouts, models, tokenizer):
    rollouts = dataclasses.replace(rollouts[0], reward=torch.rand(R, generator=torch.Generator().manual_seed(0)))
    changes = [updated(models, rollouts, tokenizer, torch.optim.SGD, micro_batch=size)[0] for size in (1, 3, 8)]
    assert max(delta.abs().max() for delta in changes[0].values()) > 1e-5
    for other in changes[1:]:
        for name, delta in changes[0].items():
            torch.testing.assert_close(other[name], delta, atol=2e-6, rtol=1e-3)


def test_demonstrations_beside_the_rollouts_are_learned_too(rollouts, models, tokenizer):
    """With equal rewards nothing but the demonstrations teaches; twice their weight is twice the gradient."""
    samples = make_obs(3) | dict(actions=torch.rand(3, K, 7) * 2 - 1, mask=torch.ones(3, K))
    policy = policy_script.Policy(models[0].cfg, tokenizer).eval()
    policy.load_state_dict(models[0].state_dict())
    error = lambda: float(policy_script.share_of_loss(policy, policy.loss, samples, torch.arange(3))[1]["l1"])
    equal, errors, norms = dataclasses.replace(rollouts[0], reward=torch.full((R,), 0.5)), [error()], []
    for weight in (1.0, 2.0):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1e-9 if weight == 1 else 0.1)
        norms.append(float(script.update(policy, optimizer, equal, dataclasses.replace(CFG, sft_weight=weight), samples)["grad_norm"]))
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-3) and norms[0] > 1e-3 and error() < errors[0] - 1e-3


def test_the_control_learns_from_the_demonstrations_what_equal_rewards_leave(rollouts, models, tokenizer):
    """`--ppo-weight 0` is the update with all rewards equal, whatever they are, and half the weight half of PPO's step."""
    samples = make_obs(3) | dict(actions=torch.rand(3, K, 7) * 2 - 1, mask=torch.ones(3, K))
    unequal = dataclasses.replace(rollouts[0], reward=torch.tensor([1.0, 0.0] * 4))
    equal = dataclasses.replace(rollouts[0], reward=torch.full((R,), 0.5))
    change = lambda rollouts, weight, samples: updated(models, rollouts, tokenizer, torch.optim.SGD, samples=samples, grad_clip=1e9, ppo_weight=weight)[0]
    control, demonstrations, both = change(unequal, 0.0, samples), change(equal, 1.0, samples), change(unequal, 1.0, samples)
    for name, delta in control.items():
        torch.testing.assert_close(delta, demonstrations[name], atol=1e-8, rtol=1e-4)
    assert max((both[name] - delta).abs().max() for name, delta in control.items()) > 1e-5
    half, whole = (change(unequal, weight, None) for weight in (0.5, 1.0))
    for name, delta in whole.items():
        torch.testing.assert_close(2 * half[name], delta, atol=1e-6, rtol=1e-2)


def test_a_policy_with_suffix_attention_learns_in_its_suffix_only(models, tokenizer):
    cfg = dataclasses.replace(policy_script.PRESETS["smoke"], attention="suffix")
    torch.manual_seed(0)
    policy = policy_script.Policy(cfg, tokenizer).eval()
    torch.nn.init.constant_(policy.scale_out.bias, -1.0)
    policy.prompt_gradient = False
    rollouts = imagine((policy, *models[1:]), 1.0)
    before = {name: p.clone() for name, p in policy.state_dict().items()}
    script.update(policy, torch.optim.AdamW(policy.parameter_groups(1e-3, 1e-3), weight_decay=0.0), rollouts, CFG)  # raises where the first ratio is not 1
    moved = {name.split(".")[0] for name, p in policy.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == {"llama", "action_head", "scale_trunk", "scale_out"}
