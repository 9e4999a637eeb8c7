"""One density for sampling, storing and updating; conventions both ways; invariants of the network; it learns."""
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from torch.distributions import Laplace

import data
import policy as script
from conftest import make_episode, make_obs

CFG = script.PRESETS["smoke"]
STATS = dict(action=np.array([[-0.9, -0.8, -0.7, -0.2, -0.1, -0.3, -1], [0.9, 0.8, 0.7, 0.2, 0.1, 0.4, 1]]), proprio=np.array([[-0.3, -0.1, 1, 3, -0.1, -0.1, 0, -0.04], [0, 0.1, 1.3, 3.2, 0.1, 0.1, 0.04, 0]]))


@pytest.fixture
def policy(tokenizer):
    torch.manual_seed(0)
    return script.Policy(CFG, tokenizer, STATS).eval()


def rows(obs, *index):
    return {key: [value[i] for i in index] if isinstance(value, list) else value[list(index)] for key, value in obs.items()}


# ---- the density ---------------------------------------------------------------------------------------------------------

def test_laplace_log_prob_is_torchs():
    a, loc, log_scale = torch.randn(3, 4, 8, 7)
    torch.testing.assert_close(script.laplace_log_prob(a, loc, log_scale), Laplace(loc, log_scale.exp()).log_prob(a).sum(-1), atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_the_density_that_samples_is_the_density_that_scores(policy):
    obs = make_obs(3)
    for policy.noise_scale in (1.0, 3.0):
        action_chunk, log_prob = policy.act(obs)
        assert log_prob.dtype == torch.float32 and action_chunk.shape == (3, CFG.chunk_size, 7) and log_prob.shape == (3, CFG.chunk_size)
        torch.testing.assert_close(policy.log_prob(obs, action_chunk), log_prob, atol=1e-4, rtol=0)


@torch.no_grad()
def test_noise_scale_multiplies_the_scale_in_sampling_and_in_density(policy):
    obs = rows(make_obs(1), *[0] * 256)
    loc, log_scale = policy(obs)
    policy.noise_scale = 3.0
    action_chunk, log_prob = policy.act(obs)
    assert ((action_chunk - loc).abs() / log_scale.exp()).mean() == pytest.approx(3, rel=0.04)  # E|a - loc| of a Laplace is its scale
    torch.testing.assert_close(log_prob, Laplace(loc, 3 * log_scale.exp()).log_prob(action_chunk).sum(-1), atol=1e-3, rtol=0)


@torch.no_grad()
def test_deterministic_act_is_loc_and_sampling_follows_the_seed(policy):
    obs = make_obs(2)
    assert torch.equal(policy.act(obs, deterministic=True)[0], policy(obs)[0])
    draws = [(torch.manual_seed(seed), policy.act(obs)[0])[1] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0, 0], draws[0][0, 1])


def test_log_scale_has_a_floor(policy):
    torch.nn.init.constant_(policy.scale_out.bias, -50.0)
    assert (policy(make_obs(1))[1] == CFG.min_log_scale).all()


# ---- conventions ---------------------------------------------------------------------------------------------------------

def test_gripper_convention_both_ways(policy):
    """LIBERO: -1 open, +1 close. OpenVLA-OFT's head: 1 open, 0 close."""
    env = torch.tensor([[0, 0, 0, 0, 0, 0, -1.0], [0, 0, 0, 0, 0, 0, 1.0]])
    assert policy.from_env(env)[:, 6].tolist() == [1, 0]
    assert policy.to_env(policy.from_env(env))[:, 6].tolist() == [-1, 1]
    assert policy.to_env(torch.tensor([[0, 0, 0, 0, 0, 0, 0.6], [0, 0, 0, 0, 0, 0, 0.4]]))[:, 6].tolist() == [-1, 1]


def test_normalisation_round_trip(policy):
    low, high = torch.tensor(STATS["action"], dtype=torch.float32)
    inside = low + torch.rand(50, 7) * (high - low)
    inside[:, 6] = inside[:, 6].sign()
    torch.testing.assert_close(policy.to_env(policy.from_env(inside)), inside, atol=1e-5, rtol=0)
    assert policy.from_env(torch.stack([low, high]))[:, :6].tolist() == [pytest.approx([-1] * 6), pytest.approx([1] * 6)]
    assert policy.to_env(100 * torch.randn(20, 7)).abs().max() <= 1


def test_a_dimension_that_never_moves_stays_where_it_was():
    bounds = torch.tensor([[0.3, -1.0], [0.3, 1.0]])
    assert script.normalise(torch.tensor([[0.3, 0.5], [0.9, 5.0]]), bounds).tolist() == [[0, pytest.approx(0.5)], [0, 1]]


def test_dataset_pairs_each_frame_with_the_actions_that_follow():
    episode = make_episode(T=22, gap=4)
    samples = script.dataset([episode], 8)
    assert {value.device.type for key, value in script.dataset([episode], 8, "meta").items() if key != "instruction"} == {"meta"}
    for row, t in enumerate(range(0, 22, 4)):
        n = min(8, 22 - t)
        assert np.array_equal(samples["actions"][row, :n], episode.actions[t:t + n]) and samples["mask"][row].tolist() == [1] * n + [0] * (8 - n)
        assert np.array_equal(samples["frames"][row], episode.frames[t // 4]) and np.array_equal(samples["proprio"][row], episode.proprio[t])


def test_disturbed_samples_lead_back_to_where_the_chunk_ended():
    proprio, actions = torch.rand(4000, 8), torch.zeros(4000, 8, 7)
    actions[:, :, 2], actions[:, :, 6] = 0.95, 1.0
    there, back = data.beside("disturb")(proprio, actions, 0.02)
    error = there - proprio
    assert error[:, :3].std() == pytest.approx(0.02, rel=0.05) and (error[:, 3:] == 0).all()
    torch.testing.assert_close(0.012 * back[:, :, :2].sum(1), -error[:, :2])
    assert back.abs().max() <= 1 and (back[..., 3:] == actions[..., 3:]).all()
    assert all(torch.equal(a, b) for a, b in zip(data.beside("disturb")(proprio, actions, 0.0), (proprio, actions)))


@torch.no_grad()
def test_waves_tell_poses_apart_that_are_millimetres_from_each_other(tokenizer):
    near = make_obs(1)["proprio"] + torch.tensor([[0.0], [0.002]])
    apart = []
    for octaves in (0, 4):
        torch.manual_seed(0)
        policy, seen = script.Policy(dataclasses.replace(CFG, octaves=octaves), tokenizer, STATS).eval(), []
        policy.proprio_projector[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        policy(rows(make_obs(1), 0, 0) | dict(proprio=near))
        assert seen[0].shape == (2, 8 + 16 * octaves)
        torch.testing.assert_close(seen[0][:, :8], script.normalise(near, policy.proprio_bounds))
        apart.append((seen[0][0] - seen[0][1]).norm())
    assert apart[1] > 5 * apart[0]


@torch.no_grad()
def test_the_actions_learn_from_disturbed_samples_and_their_scale_does_not(policy):
    """In LOOP too, where the policy is in eval mode."""
    samples = script.dataset([make_episode(T=40)], CFG.chunk_size)
    value = lambda loss: float(script.share_of_loss(policy, loss, samples, torch.arange(8))[0])
    assert not policy.training and CFG.proprio_noise > 0
    assert value(policy.loss) != value(policy.loss) and value(policy.scale_loss) == value(policy.scale_loss)


def test_the_way_back_is_as_long_in_libero(env):
    """Two chunks that `disturb` makes of one, for errors of opposite sign, end apart by about these errors."""
    sample = env.reset(init_index=0)["proprio"], np.zeros((1, 8, 7), np.float32) - [0, 0, 0, 0, 0, 0, 1]
    torch.manual_seed(0)
    there, back = data.beside("disturb")(torch.from_numpy(sample[0])[None], torch.from_numpy(sample[1]).float(), 0.02)
    ends = []
    for sign in (1, -1):
        env.reset(init_index=0)
        obs, _ = env.step_chunk(np.concatenate([sign * back[0, :, :3].numpy(), sample[1][0, :, 3:]], 1), render=False)
        ends.append(obs["proprio"][:3])
    error = (there[0, :3] - torch.from_numpy(sample[0][:3])).numpy()
    assert np.linalg.norm(ends[1] - ends[0] - 2 * error) < 0.4 * np.linalg.norm(2 * error)


# ---- the network ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_padding_of_shorter_instructions_changes_nothing(policy):
    obs = make_obs(3)
    assert (policy.embed(obs)[2] == 0).any()
    together = policy(obs)
    for i in range(3):
        for batched, single in zip(together, policy(rows(obs, i))):
            torch.testing.assert_close(batched[i:i + 1], single, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("key", ["frames", "proprio", "instruction"])
def test_every_input_matters_to_every_action_of_the_chunk(policy, key):
    obs = rows(make_obs(3), 0, 0)
    obs[key] = make_obs(3, seed=1)[key][1:3] if key != "instruction" else ["turn on the stove", "open the drawer"]
    loc, log_scale = policy(obs)
    assert ((loc[0] - loc[1]).abs().amax(-1) > 1e-4).all() and ((log_scale[0] - log_scale[1]).abs().amax(-1) > 1e-6).all()


def test_frames_of_another_size_are_the_users_error(policy):
    with pytest.raises(data.UserError, match="image-size 32"):
        policy(make_obs(1, size=48))


@torch.no_grad()
def test_every_action_of_a_chunk_is_predicted_on_its_own(policy):
    loc, _ = policy(make_obs(1))
    assert ((loc[0, :, None] - loc[0, None]).abs().amax(-1) + torch.eye(CFG.chunk_size) > 1e-4).all()


# ---- learning ------------------------------------------------------------------------------------------------------------

def test_presets_are_numbers_only(tokenizer):
    """Every preset builds the same class; base and paper on the meta device, which holds no numbers."""
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in script.Policy(cfg, tokenizer).parameters()) for name, cfg in script.PRESETS.items()}
    assert sizes["smoke"] < 0.2e6 < sizes["tiny"] < 2e6 < sizes["base"] < 1e8 < 7.8e9 < sizes["paper"] < 7.9e9  # Llama and towers 7.4, heads 0.34, LoRA 0.11
    assert all(cfg.preset == name for name, cfg in script.PRESETS.items())


def test_masked_steps_reach_neither_loss_nor_gradient(policy):
    obs, mask = make_obs(2), torch.ones(2, CFG.chunk_size)
    mask[1, 3:] = 0
    for loss in (policy.loss, policy.scale_loss):
        target = torch.zeros(2, CFG.chunk_size, 7, requires_grad=True)
        value = loss(obs, target, mask)[0]
        grad, = torch.autograd.grad(value, target)
        assert (grad[1, 3:] == 0).all() and (grad[1, :3] != 0).any(-1).all() and (grad[0] != 0).any(-1).all()
        torch.testing.assert_close(loss(obs, target.masked_fill(mask[..., None] == 0, 9.0), mask)[0], value)
    singles = [policy.loss(rows(obs, i), target[i:i + 1], mask[i:i + 1])[0] * mask[i].sum() for i in range(2)]
    torch.testing.assert_close(policy.loss(obs, target, mask)[0], sum(singles) / mask.sum())  # a mean over executed steps, not over rows


def test_scale_loss_trains_the_scale_head_alone(policy):
    policy.scale_loss(make_obs(2), torch.zeros(2, CFG.chunk_size, 7), torch.ones(2, CFG.chunk_size))[0].backward()
    touched = {name.split(".")[0] for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {"scale_trunk", "scale_out"}


@pytest.mark.parametrize("preset, octaves", [("smoke", 0), ("smoke", 2), ("tiny", 0)])
def test_it_overfits_one_batch(tokenizer, preset, octaves):
    torch.manual_seed(0)
    cfg = dataclasses.replace(script.PRESETS[preset], crop_area=1.0, jitter=0.0, octaves=octaves)
    policy = script.Policy(cfg, tokenizer, STATS).train()
    obs, mask = make_obs(4, size=cfg.image_size), torch.ones(4, cfg.chunk_size)
    target = torch.rand(4, cfg.chunk_size, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3 if preset == "smoke" else 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400, 1e-5)
    for _ in range(400):
        loss, metrics = policy.loss(obs, target, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert metrics["l1"] < 0.01
    assert policy.eval().loss(obs, target, mask)[1]["l1"] < 0.03  # the same network when it acts


def test_a_checkpoint_gives_back_the_same_policy(policy, tokenizer, tmp_path):
    data.save_checkpoint(tmp_path / "policy_sft.pt", "policy_sft", CFG, policy, tokenizer=tokenizer.backend_tokenizer.to_str())
    loaded, obs = script.load_policy(tmp_path / "policy_sft.pt"), make_obs(2)
    assert not loaded.training and loaded.cfg == CFG and torch.equal(loaded.action_bounds, policy.action_bounds)
    assert torch.equal(loaded(obs)[0], policy(obs)[0])


@pytest.mark.parametrize("changes", [dict(bf16=True), dict(bf16=True, lora_rank=2)])
def test_a_policy_trained_in_bfloat16_acts_in_float32_unless_it_has_lora(tokenizer, tmp_path, changes):
    """Two batches of the same observations round differently in bfloat16, and PPO's first ratio is not 1: seen on an H200, 1.5 %."""
    cfg = dataclasses.replace(CFG, **changes)
    trained = script.Policy(cfg, tokenizer, STATS).eval()
    data.save_checkpoint(tmp_path / "policy_sft.pt", "policy_sft", cfg, trained, tokenizer=tokenizer.backend_tokenizer.to_str())
    loaded, obs = script.load_policy(tmp_path / "policy_sft.pt"), make_obs(4)
    assert loaded.cfg.bf16 == (cfg.lora_rank > 0)
    if not loaded.cfg.bf16:
        torch.testing.assert_close(loaded(obs)[0][:1], loaded(rows(obs, 0))[0], atol=1e-5, rtol=0)
        assert 1e-5 < (loaded.hidden(obs) - trained.hidden(obs)).abs().max() < 0.1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_the_same_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.write_libero_hdf5("demos/demo_0.hdf5", make_episode(T=40, success_from=36), "libero_goal")
    curves, smoke = [], dataclasses.replace(CFG, demos="demos", tasks="goal:7", steps=3, scale_steps=2, save_every=1)
    for run, changes in dict(eager={}, compiled=dict(compile=True)).items():
        script.train(dataclasses.replace(smoke, run=run, **changes))
        curves.append([row[key] for row in map(json.loads, open(f"runs/{run}/policy.jsonl")) for key in row if key != "time"])
    np.testing.assert_allclose(*curves, rtol=1e-3)
    assert script.load_policy("runs/compiled/policy_sft.pt").llama._compiled_call_impl is None  # LOOP's batches change size all the time
