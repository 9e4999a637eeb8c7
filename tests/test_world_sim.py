"""The diffusion recipe, the conditions, the dynamics against exact rotations and against MuJoCo; it learns."""
import dataclasses

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import data
import world_sim as script
from conftest import make_episode, make_obs

CFG = script.PRESETS["smoke"]
K, F = CFG.chunk_size, CFG.frames_per_chunk


@pytest.fixture
def world_sim():
    torch.manual_seed(0)
    return script.WorldSim(CFG).eval()


@pytest.fixture(scope="module")
def camera():
    return torch.tensor(data.parse_tasks("goal:7")[0].camera, dtype=torch.float32)[None]


def start(world_sim, camera, same=False, B=2):
    """Memory, proprio and an action chunk for B rollouts."""
    obs = {key: value[:1].expand(B, *value.shape[1:]) if same else value for key, value in make_obs(B).items() if key != "instruction"}
    actions = torch.rand(1, K, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        return world_sim.remember(obs["frames"], script.motion([(make_episode(), 0)] * B, 0, "cpu")), obs["proprio"], actions.expand(B, K, 7)


# ---- memory and noise ----------------------------------------------------------------------------------------------------

def test_sparse_memory_is_first_thirds_and_last():
    assert script.sparse_memory(1, 4) == [0, 0, 0, 0]
    assert script.sparse_memory(10, 4) == [0, 3, 6, 9]
    assert all(script.sparse_memory(n, 4)[0] == 0 and script.sparse_memory(n, 4)[-1] == n - 1 and np.diff(script.sparse_memory(n, 4)).min() >= 0 for n in range(1, 40))


VIDEO = dataclasses.replace(CFG, video_unet=True)


def test_zero_terminal_snr_sampled_from_pure_noise(world_sim):
    world_sim.scheduler.set_timesteps(CFG.sampling_steps)
    assert world_sim.scheduler.alphas_cumprod[-1] == 0 and world_sim.scheduler.timesteps[0] == 999
    assert world_sim.scheduler.config.prediction_type == CFG.prediction == "v_prediction"


def exact_output(world_sim, x0, noisy, timestep):
    """What a perfect U-Net answers when `noisy` came from x0: x0 itself, or the v of the noise between them."""
    if world_sim.cfg.prediction == "sample":
        return x0
    a = world_sim.scheduler.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1, 1)
    return a.sqrt() * (noisy - a.sqrt() * x0) / (1 - a).sqrt() - (1 - a).sqrt() * x0


@pytest.mark.parametrize("sampling_steps", [1, 3])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_perfect_denoiser_gives_back_the_frames(camera, prediction, residual, sampling_steps, monkeypatch):
    world_sim = script.WorldSim(dataclasses.replace(CFG, prediction=prediction, sampling_steps=sampling_steps, residual=residual)).eval()
    world_sim.change_std.fill_(0.5)
    memory, proprio, actions = start(world_sim, camera)
    x0 = 4 * torch.randn(2, F, CFG.latent_channels, world_sim.size, world_sim.size)  # beyond [-1, 1]: nothing may clip
    monkeypatch.setattr(world_sim, "denoise", lambda noisy, timestep, *conditions: exact_output(world_sim, x0, noisy, timestep))
    last = memory.latents[:, -1:].clone() * residual
    world_sim.predict(memory, proprio, actions)
    torch.testing.assert_close(memory.latents[:, 1:], last + 0.5 * x0, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_perfect_denoiser_has_no_loss_whatever_the_noise_on_memory(camera, prediction, residual, monkeypatch):
    """What `loss` trains is what `predict` integrates: the chunk's frames, or their change from the last frame that it was shown."""
    world_sim = script.WorldSim(dataclasses.replace(CFG, prediction=prediction, residual=residual))
    batch = make_training_batch(world_sim, camera)

    def denoise(noisy, timestep, known, *_):
        assert torch.equal(known[:, CFG.memory:], known[:, CFG.memory - 1:CFG.memory].expand(-1, F, -1, -1, -1))
        return exact_output(world_sim, (batch["target"] - known[:, -1:] * residual) / world_sim.change_std, noisy, timestep)

    assert world_sim.loss([batch])[1]["video"] > 0.1
    monkeypatch.setattr(world_sim, "denoise", denoise)
    assert world_sim.loss([batch])[1]["video"] < 1e-4


def test_identical_rollouts_draw_their_own_noise(world_sim, camera):
    memory, proprio, actions = start(world_sim, camera, same=True)
    frames, after = world_sim.predict(memory, proprio, actions)
    assert not torch.equal(frames[0], frames[1]) and torch.equal(after[0], after[1])


def test_same_generator_same_result_and_each_chunk_its_own_noise(world_sim, camera, monkeypatch):
    def two_chunks(seed):
        generator, (memory, proprio, actions) = torch.Generator().manual_seed(seed), start(world_sim, camera)
        return [world_sim.predict(memory, proprio, actions, generator)[0] for _ in range(2)]
    first, again, other = two_chunks(1), two_chunks(1), two_chunks(2)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    noise, normal = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **kwargs: noise.append(normal(*shape, **kwargs)) or noise[-1])
    two_chunks(1)
    assert not torch.equal(noise[-1], noise[-2])


# ---- copies from memory --------------------------------------------------------------------------------------------------

WARP = dataclasses.replace(CFG, vae_channels=(), latent_channels=48, warp=True, prediction="sample", sampling_steps=1, pure_noise=1.0)  # 3 * 4 * 4 = 48: a VAE without loss
SOURCES = CFG.memory + 1


def copying(source, flow=(0.0, 0.0), change=0.0):
    """A simulator that loses nothing in its VAE, and the U-Net's output that asks for one picture, bent by a flow, changed by so much."""
    world_sim = script.WorldSim(WARP).eval()
    world_sim.vae.basis.copy_(torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))[0])
    world_sim.latent_mean.fill_(0.3), world_sim.latent_std.fill_(2.0), world_sim.change_std.fill_(0.5)
    output = torch.zeros(2, F, 48 + 24 * SOURCES, 8, 8)
    output[:, :, :48] = change
    output[:, :, 48 + 8 * source:][:, :, :8] = torch.tensor(flow).repeat_interleave(4)[:, None, None]
    output[:, :, 48 + 8 * SOURCES + 16 * source:][:, :, :16] = 50
    return world_sim, output


def composed(world_sim, output, memory, moved=0.0):
    """Memory frames (B, M, 3, H, W) uint8 -> what `copy` composes, as float frames (B, F, 3, H, W)."""
    recalled, moved = world_sim.encode(memory), torch.as_tensor(moved).expand(2, F, 2)
    return world_sim.to_frames(recalled[:, -1:] + world_sim.copy(output, recalled, moved) * world_sim.change_std)


@torch.no_grad()
@pytest.mark.parametrize("source", range(SOURCES))
def test_a_mask_picks_one_of_the_memory_frames_or_the_last_moved(source):
    memory = torch.stack([make_smooth_frames(2) // (m + 1) for m in range(CFG.memory)], 1)
    frames = composed(*copying(source), memory)
    torch.testing.assert_close(frames, memory[:, min(source, CFG.memory - 1)][:, None].float().expand(-1, F, -1, -1, -1), atol=0.02, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dx, dy", [(4, 0), (0, -4), (-6, 2)])
@pytest.mark.parametrize("how", ["with the gripper", "by its flow"])
def test_a_copy_moves_as_far_as_it_is_told(dx, dy, how):
    """Right and down on the picture by (dx, dy) pixels: by the way of the gripper, or by a flow, which says where to look instead."""
    memory, shift = make_smooth_frames(2)[:, None].expand(-1, CFG.memory, -1, -1, -1), torch.tensor([dx, dy]) / 16
    if how == "with the gripper":
        frames = composed(*copying(CFG.memory), memory, moved=shift)
    else:
        frames = composed(*copying(CFG.memory - 1, flow=(-10 * shift).tolist()), memory)
    expected = torch.roll(memory[:, -1].float(), (dy, dx), (-2, -1))
    torch.testing.assert_close(frames[:, -1, :, 8:-8, 8:-8], expected[:, :, 8:-8, 8:-8], atol=0.02, rtol=0)


@torch.no_grad()
def test_changes_are_added_to_what_is_copied():
    memory = make_smooth_frames(2)[:, None].expand(-1, CFG.memory, -1, -1, -1)
    world_sim, output = copying(CFG.memory - 1, change=0.4)
    copied = world_sim.copy(output, world_sim.encode(memory), torch.zeros(2, F, 2))
    torch.testing.assert_close(copied, torch.full_like(copied, 0.4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("other", [dict(prediction="v_prediction"), dict(residual=False), dict(video_unet=True)])
def test_copying_with_settings_that_it_cannot_serve_is_the_users_error(other):
    with pytest.raises(data.UserError, match="--no-warp"):
        script.WorldSim(dataclasses.replace(WARP, **other))
    script.WorldSim(dataclasses.replace(WARP, **other, warp=False))


@torch.no_grad()
def test_an_untrained_simulator_mostly_keeps_the_last_frame(camera):
    torch.manual_seed(0)
    world_sim, (seen, last) = script.WorldSim(WARP).eval(), make_smooth_frames(2)
    known = world_sim.encode(torch.stack([seen] * 3 + [last])[None])
    conditions = world_sim.condition(known, make_obs(1)["proprio"], torch.zeros(1, K, 7), make_obs(1)["proprio"][:, None].expand(-1, K, -1), camera)
    frame = world_sim.to_frames(world_sim.sample(known, conditions, 1))[0, -1]
    share = torch.exp(torch.tensor(3.0)) + 1  # of the last frame and its moved copy, against one for each of the others
    torch.testing.assert_close(frame, (share * last.float() + 3 * seen.float()) / (share + 3), atol=0.1, rtol=0)


def test_the_gripper_moves_on_the_picture_as_it_does_in_mujoco():
    """Of all shifts of the last frame, that by which the projected gripper moves lays the hand best over the hand, give or take 4 of
    192 pixels: the hand is nearer to the camera than the grip site below it."""
    env = data.LiberoEnv(data.parse_tasks("goal:7")[0], 192)
    before = env.reset(0)
    actions = np.zeros((K, 7), np.float32)
    actions[:, 1], actions[:, 2], actions[:, 6] = 0.7, -0.7, -1
    after, _ = env.step_chunk(actions)
    env.close()
    pose, camera = torch.tensor(np.stack([x["proprio"] for x in (before, after)]))[None], torch.tensor(env.task.camera, dtype=torch.float32)[None]
    seen, size = (script.project(pose, camera)[0, :, :, 0].numpy() + 1) / 2, env.image_size
    (u, v), way = (seen[1] * size).round().astype(int), (seen[1] - seen[0]) * size
    hand = np.s_[:, v - size // 6:v, u - size // 10:u + size // 10]  # the hand is above the grip site
    shifts = [(du, dv) for du in range(-24, 25) for dv in range(-24, 25)]
    error = lambda du, dv: abs(np.roll(before["frames"], (dv, du), (1, 2))[hand].astype(int) - after["frames"][hand]).mean()
    best = min(shifts, key=lambda shift: error(*shift))
    assert abs(way).max() > size / 20 and abs(np.array(best) - way).max() < 4, (best, way)


# ---- predictions ---------------------------------------------------------------------------------------------------------

def test_shapes_and_types(world_sim, camera):
    memory, proprio, actions = start(world_sim, camera)
    frames, after = world_sim.predict(memory, proprio, actions)
    assert frames.shape == (2, F, 3, 32, 32) and frames.dtype == torch.uint8 and after.shape == (2, 8)
    assert memory.latents.shape[1] == 1 + F


def test_frames_heed_the_action_and_earlier_ones_not_later_actions(world_sim, camera):
    def rollout(*chunks):
        generator, (memory, proprio, _) = torch.Generator().manual_seed(0), start(world_sim, camera)
        frames = []
        for chunk in chunks:
            imagined, proprio = world_sim.predict(memory, proprio, chunk, generator)
            frames.append(imagined.clone())
        return frames, memory.latents
    actions = start(world_sim, camera)[2]
    (first, second), latents = rollout(actions, actions)
    (kept, changed), kept_latents = rollout(actions, -actions)
    assert torch.equal(first, kept) and torch.equal(latents[:, :1 + F], kept_latents[:, :1 + F]) and not torch.equal(second, changed)
    assert not torch.equal(rollout(-actions)[0][0], first)


def test_each_frame_of_a_chunk_is_shown_the_pose_after_its_own_actions(world_sim, camera):
    """Frame f of F follows K / F * (f + 1) actions; its part of the action map moves with that pose and with no other."""
    memory, proprio, actions = start(world_sim, camera)
    path = proprio[:, None].repeat(1, K, 1)
    recalled = memory.latents[:, [0] * CFG.memory]
    maps = lambda path: world_sim.condition(recalled, proprio, actions, path, memory.camera)[1][:, CFG.memory - 1:]
    assert world_sim.condition(recalled, proprio, actions, path, memory.camera)[1][:, :CFG.memory - 1].abs().max() == 0
    for step in range(K):
        moved = path.clone()
        moved[:, step, 1] += 0.2
        changed = (maps(moved) != maps(path)).flatten(2).any(2).any(0).tolist()
        assert changed == [False] + [step == K // F * (f + 1) - 1 for f in range(F)]


@torch.no_grad()
def test_rollouts_are_independent_and_select_leaves_the_others_alone(world_sim, camera, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *shape, **kwargs: torch.ones(*shape))  # the same noise for every row
    memory, proprio, actions = start(world_sim, camera, B=3)
    kept = memory.latents.clone()
    memory.velocity = 0.01 * torch.arange(24.0).view(3, 8)
    part = memory.select(torch.tensor([2, 0]))
    world_sim.predict(part, proprio[[2, 0]], actions[[2, 0]])
    assert torch.equal(memory.latents, kept)
    world_sim.predict(memory, proprio, actions)
    torch.testing.assert_close(part.latents, memory.latents[[2, 0]], atol=1e-4, rtol=0)
    torch.testing.assert_close(part.velocity, memory.velocity[[2, 0]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(2, K, 8), (2, K + 1, 7)])
def test_other_robots_and_chunk_sizes_are_the_users_error(world_sim, camera, shape):
    memory, proprio, _ = start(world_sim, camera)
    with pytest.raises(data.UserError, match="shape"):
        world_sim.predict(memory, proprio, torch.zeros(shape))


def test_frames_of_another_size_are_the_users_error(world_sim):
    with pytest.raises(data.UserError, match="image-size 32"):
        world_sim.remember(make_obs(1, size=48)["frames"], script.motion([(make_episode(), 0)], 0, "cpu"))


def test_open_loop_gives_the_first_frame_and_F_frames_a_chunk(world_sim):
    episode = make_episode(T=2 * K + 3)
    frames = script.open_loop(world_sim, episode)
    assert frames.shape == (1 + 3 * F, 3, 32, 32) and frames.dtype == np.uint8 and np.array_equal(frames[0], episode.frames[0])


def test_replaying_together_is_replaying_alone(world_sim, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *shape, **kwargs: torch.ones(*shape))
    episodes = [make_episode(T=2 * K + 3, seed=1), make_episode(T=K, seed=2)]
    frames, proprio = script.replay(world_sim, episodes)
    assert frames.shape == (2, 1 + 3 * F, 3, 32, 32) and proprio.shape == (2, 4, 8)
    for b, (episode, shown) in enumerate(zip(episodes, (1 + 3 * F, 1 + F))):
        alone = script.open_loop(world_sim, episode)
        assert len(alone) == shown and abs(alone.astype(int) - frames[b, :shown]).max() <= 1
    other = script.replay(world_sim, episodes, [-e.actions for e in episodes])
    assert np.array_equal(other[0][:, 0], frames[:, 0]) and not np.array_equal(other[0], frames) and not np.allclose(other[1], proprio)


# ---- conditions and the two U-Nets -----------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_video_unet_sees_latents_condition_mask_and_map_of_each_frame(camera, monkeypatch):
    torch.manual_seed(0)
    world_sim, seen = script.WorldSim(VIDEO).eval(), []
    forward = world_sim.denoiser.unet.forward
    monkeypatch.setattr(world_sim.denoiser.unet, "forward", lambda x, t, encoder_hidden_states: seen.append((x, encoder_hidden_states)) or forward(x, t, encoder_hidden_states))
    batch, M, C = make_training_batch(world_sim, camera), CFG.memory, CFG.latent_channels
    conditions = world_sim.condition(batch["recalled"], batch["proprio"], batch["actions"], batch["path"], batch["camera"])
    noisy = torch.randn_like(batch["target"])
    out = world_sim.denoise(noisy, torch.tensor([999, 5]), *conditions)
    x, tokens = seen[0][0].transpose(1, 2), seen[0][1]
    assert out.shape == noisy.shape and x.shape == (2, M + F, 2 * C + 81, world_sim.size, world_sim.size) and tokens.shape == (2, 1 + K, CFG.hidden)
    assert torch.equal(x[:, M:, :C], noisy) and torch.equal(x[:, :M, :C], batch["recalled"]) and torch.equal(x[:, :M, C:2 * C], batch["recalled"])
    assert torch.equal(x[:, M:, C:2 * C], batch["recalled"][:, -1:].expand_as(noisy))
    assert (x[:, :M, 2 * C] == 1).all() and (x[:, M:, 2 * C] == 0).all() and torch.equal(x[:, :, 2 * C + 1:], conditions[1])
    for changed in (0, 1, 2, 3):  # every condition counts
        other = [value + 0.5 * (i == changed) for i, value in enumerate(conditions)]
        assert not torch.allclose(world_sim.denoise(noisy, torch.tensor([999, 5]), *other), out, atol=1e-6), changed


def test_conditions_are_dropped_in_training_only(world_sim, camera):
    world_sim.cfg = dataclasses.replace(CFG, condition_dropout=0.5)
    batch = make_training_batch(world_sim, camera, B=64)
    conditions = lambda: world_sim.condition(batch["recalled"], batch["proprio"], batch["actions"], batch["path"], batch["camera"])
    known, maps, steps, *_ = conditions()
    assert maps.flatten(1).any(1).all() and steps.flatten(1).any(1).all()
    world_sim.train()
    same, dropped_maps, dropped_steps, *_ = conditions()
    kept = [(x.flatten(1) != 0).any(1) for x in (dropped_maps, dropped_steps)]
    assert torch.equal(same, known) and all(15 < k.sum() < 49 for k in kept) and not torch.equal(*kept)
    assert torch.equal(dropped_maps[kept[0]], maps[kept[0]]) and torch.equal(dropped_steps[kept[1]], steps[kept[1]])


def test_a_published_text_to_video_model_loads_and_what_it_lacks_starts_at_zero(tmp_path, camera):
    torch.manual_seed(1)
    source = script.WorldSim(VIDEO)
    source.denoiser.unet.register_to_config(in_channels=CFG.latent_channels)
    source.denoiser.unet.conv_in = torch.nn.Conv2d(CFG.latent_channels, CFG.channels[0], 3, padding=1)
    source.denoiser.unet.save_pretrained(tmp_path / "unet")
    source.vae.save_pretrained(tmp_path / "vae")
    world_sim = script.WorldSim(dataclasses.replace(VIDEO, pretrained=str(tmp_path)))
    load = data.beside("load_text_to_video")
    load(world_sim)
    ours, theirs = world_sim.denoiser.unet.state_dict(), source.denoiser.unet.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name != "conv_in.weight")
    assert torch.equal(ours["conv_in.weight"][:, :CFG.latent_channels], theirs["conv_in.weight"]) and ours["conv_in.weight"][:, CFG.latent_channels:].abs().max() == 0
    assert all(torch.equal(a, b) for a, b in zip(world_sim.vae.state_dict().values(), source.vae.state_dict().values()))
    for cfg in (dataclasses.replace(VIDEO, pretrained=str(tmp_path / "none")), dataclasses.replace(VIDEO, pretrained=str(tmp_path), channels=(16, 48))):
        with pytest.raises(data.UserError, match="--preset paper"):
            load(script.WorldSim(cfg))


def test_paper_has_the_published_names_and_shapes():
    """diffusers' defaults are the published configuration of ali-vilab/text-to-video-ms-1.7b; the VAE is Stable Diffusion's."""
    from diffusers import AutoencoderKL, UNet3DConditionModel
    with torch.device("meta"):
        world_sim, unet = script.WorldSim(script.PRESETS["paper"]), UNet3DConditionModel(sample_size=32)
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4)
    shapes = lambda module: {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes(world_sim.vae) == shapes(vae)
    ours, theirs = shapes(world_sim.denoiser.unet), shapes(unet)
    assert ours.pop("conv_in.weight") == (320, 89, 3, 3) and theirs.pop("conv_in.weight") == (320, 4, 3, 3) and ours == theirs
    assert 1.40e9 < sum(p.numel() for p in unet.parameters()) < 1.42e9


@pytest.mark.parametrize("preset, size", [("base", 16), ("paper", 28)])
def test_the_large_presets_fit_together(preset, size):
    """Without memory: 224 pixels give 28 x 28 latents, which `paper` halves three times, and back to 28; `base` has 128 pixels."""
    cfg = script.PRESETS[preset]
    with torch.device("meta"), torch.no_grad():
        world_sim, n = script.WorldSim(cfg).eval(), cfg.memory + cfg.frames_per_chunk
        latents = lambda frames, channels: torch.zeros(2, frames, channels, world_sim.size, world_sim.size)
        noisy = latents(cfg.frames_per_chunk, cfg.latent_channels)
        out = world_sim.denoiser(noisy, torch.zeros(2).long(), latents(n, cfg.latent_channels), latents(n, 80), torch.zeros(2, cfg.chunk_size, 15), torch.zeros(2, 8))
    assert world_sim.size == size and out.shape == noisy.shape


def test_short_episodes_are_learned_from_without_imagined_chunks():
    rows = script.training_rows([make_episode(T=K + 4)], CFG)
    latents = torch.zeros(4, CFG.latent_channels, 4, 4)
    assert len(script.make_batch(rows, latents, CFG, np.random.default_rng(0), "cpu", 8, before=3)) == 1


def test_more_and_more_chunks_are_imagined_before_the_one_that_is_learned(tmp_path, monkeypatch):
    """At most one in the first quarter of training, up to `own_chunks` = 4 in the last, and then all numbers up to it occur."""
    before, make_batch = [], script.make_batch
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "training_episodes", lambda *_: ([make_episode(T=64)], []))
    monkeypatch.setattr(script, "make_batch", lambda *args: before.extend(args[6:]) or make_batch(*args[:6]))  # `look` asks for none
    script.train(dataclasses.replace(CFG, run="grow", own_chunks=4, vae_steps=1, dynamics_steps=1, steps=80, batch_size=1, save_every=1000))
    assert [max(before[i:i + 20]) for i in range(0, 80, 20)] == [1, 2, 3, 4] and set(before[60:]) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("T, gap", [(K - 1, 4), (40, 8)], ids=["too short", "too few frames"])
def test_episodes_that_teach_nothing_are_the_users_error(tmp_path, monkeypatch, T, gap):
    episodes = [make_episode(T=40), make_episode(T=T, gap=gap, source="explore")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "training_episodes", lambda *_: (episodes, []))
    with pytest.raises(data.UserError, match="no explore episode has 8 actions and a frame every 4 .*--frame-every 4"):
        script.train(dataclasses.replace(CFG, run="short"))
    assert not list(tmp_path.rglob("*.pt"))


# ---- dynamics and action map ---------------------------------------------------------------------------------------------

def test_analytic_step_follows_the_command():
    dynamics, proprio = script.Dynamics(K, 8), make_obs(1)["proprio"]
    rest, still = torch.tensor(data.Episode.before[8:])[None], torch.zeros(1, 8)
    action = torch.zeros(1, 16, 7)
    action[:, :, 0], action[:, :, 6] = 1, 1
    path = dynamics(proprio, still, rest, action)[0].detach()  # what is learned is still zero
    a, b, c = (dynamics.gain[:, 0] * torch.tensor([K, 1, 1])).tolist()
    x = [proprio[0, 0].item()] * 2
    for step in range(16):  # a damped spring, by hand
        x.append(x[-1] + a * (x[-1] - x[-2]) + 0.05 * (b + (c if step else 0)))
    assert torch.allclose(path[:, 0], torch.tensor(x[2:]), atol=1e-6) and torch.allclose(path[:, 1:6], proprio[:, 1:6].expand(16, 5))
    assert path[-1, 6] < 0.015 and path[-1, 7] > -0.015
    closed = path[-1:].clone()
    action[:, :, 6] = -1
    opened = dynamics(closed, still, rest, action)[0].detach()
    assert opened[-1, 6] > 0.03 and opened[-1, 7] < -0.03


def test_a_chunk_goes_on_with_the_motion_that_the_last_one_left(world_sim, camera):
    """Two chunks at once are one after the other with the velocity and action between them handed on."""
    torch.nn.init.normal_(world_sim.dynamics.residual[-1].weight, std=0.05)
    memory, proprio, actions = start(world_sim, camera)
    rest = torch.tensor(data.Episode.before[8:]).expand(2, 7)
    both = world_sim.dynamics(proprio, torch.zeros(2, 8), rest, torch.cat([actions, -actions], 1))
    for chunk, at in ((actions, K - 1), (-actions, 2 * K - 1)):
        _, proprio = world_sim.predict(memory, proprio, chunk)
        torch.testing.assert_close(proprio, both[:, at])
        torch.testing.assert_close(memory.velocity, both[:, at] - both[:, at - 1])
        assert torch.equal(memory.action, chunk[:, -1])


def test_what_starts_on_the_way_goes_on_with_the_motion_there(world_sim, monkeypatch):
    """Told that the arm stands still, a simulator of Spatial was 12 mm off after the first chunk instead of 3."""
    monkeypatch.setattr(torch, "randn", lambda *shape, **kwargs: torch.ones(*shape))
    torch.nn.init.normal_(world_sim.dynamics.residual[-1].weight, std=0.05)
    whole = make_episode(T=3 * K, gap=K)
    part = dataclasses.replace(whole, frames=whole.frames[1:], frame_steps=whole.frame_steps[1:] - K, proprio=whole.proprio[K:],
                               actions=whole.actions[K:], success=whole.success[K:], before=script.arrival(whole, K))
    moving, lie = script.motion([(whole, K)], 2 * K, "cpu"), dataclasses.replace(part, before=data.Episode.before)
    expected = world_sim.dynamics(*(moving[key] for key in ("proprio", "velocity", "previous", "actions")))[:, [K - 1, 2 * K - 1]]
    torch.testing.assert_close(torch.from_numpy(script.replay(world_sim, [part])[1][:, 1:]), expected)
    assert np.abs(script.replay(world_sim, [lie])[1][:, 1:] - expected.detach().numpy()).max() > 1e-3
    memory = world_sim.remember(torch.from_numpy(whole.frames[1:2]), moving)
    torch.testing.assert_close(world_sim.predict(memory, moving["proprio"], moving["actions"][:, :K])[1], expected[:, 0])


@pytest.mark.parametrize("angle", [0.3, 2.5, 3.1, 3.4])
def test_turn_composes_rotations_in_the_world_frame(angle):
    rng = np.random.default_rng(0)
    axis = rng.normal(size=(20, 3))
    rotation, delta = angle * axis / np.linalg.norm(axis, axis=1, keepdims=True), rng.normal(0, 0.01, (20, 3))
    turned = rotation + script.turn(torch.tensor(rotation), torch.tensor(delta)).numpy()
    exact = Rotation.from_rotvec(delta) * Rotation.from_rotvec(rotation)
    assert (Rotation.from_rotvec(turned) * exact.inv()).magnitude().max() < 1e-3


def test_analytic_dynamics_moves_as_mujoco_does(env):
    """A command in one dimension for a chunk: the same direction and the same order of magnitude as the real controller."""
    dynamics = script.Dynamics(K, 8)
    for dim in range(6):
        before = env.reset(0)["proprio"]
        actions = np.zeros((K, 7), np.float32)
        actions[:, dim], actions[:, 6] = 0.2, -1
        real = env.step_chunk(actions, render=False)[0]["proprio"] - before
        start = torch.tensor(before)[None], torch.zeros(1, 8), torch.tensor(data.Episode.before[8:])[None], torch.tensor(actions)[None]
        imagined = (dynamics(*start)[0, -1].detach() - torch.tensor(before)).numpy()
        part = slice(0, 3) if dim < 3 else slice(3, 6)
        cosine = real[part] @ imagined[part] / np.linalg.norm(real[part]) / np.linalg.norm(imagined[part])
        assert cosine > 0.9 and 0.25 < np.linalg.norm(real[part]) / np.linalg.norm(imagined[part]) < 1.5, (dim, real, imagined)


def test_dynamics_learn_how_mujoco_moves(env):
    """From 320 control steps, where the arm is eight steps later: twice as close as the spring alone, from states not learned from."""
    env.reset(0)
    rng, proprio, actions = np.random.default_rng(0), [env.proprio()], []
    for number in range(50):  # there and back
        there = -there if number % 2 else np.append(rng.uniform(-1, 1, 6) * [0.4, 0.4, 0.4, 0.05, 0.05, 0.05], 0)
        for action in (there + np.array([0] * 6 + [-1])).repeat(K).reshape(7, K).T.astype(np.float32):
            env.step_chunk(action[None], render=False)
            actions.append(action)
            proprio.append(env.proprio())
    episode = dataclasses.replace(make_episode(T=8), proprio=np.stack(proprio), actions=np.stack(actions))
    dynamics, known = script.Dynamics(K, 64), script.motion([(episode, t) for t in range(320)], 1, "cpu")
    asked = script.motion([(episode, t) for t in range(320, 392, 4)], K, "cpu")
    error = lambda m: (dynamics(*(m[key] for key in ("proprio", "velocity", "previous", "actions"))) - m["path"])[..., :3]
    for name, value in dict(mean=known["proprio"].mean(0), std=known["proprio"].std(0) + 1e-3, scale=torch.full((8,), 0.03)).items():
        getattr(dynamics, name).copy_(value)
    before = error(asked)[:, -1].norm(dim=-1).mean()
    optimizer = torch.optim.Adam(dynamics.parameters(), 3e-3)
    for _ in range(600):
        optimizer.zero_grad()
        error(known).abs().mean().backward()
        optimizer.step()
    assert error(asked)[:, -1].norm(dim=-1).mean() < before / 2


def test_dynamics_stay_finite_wherever_they_are_led():
    """Far from all they have learned, with weights that say anything."""
    torch.manual_seed(0)
    dynamics = script.Dynamics(K, 8)
    for network in (dynamics.coupling, dynamics.residual):
        torch.nn.init.normal_(network[-1].weight)
    path = dynamics(torch.randn(4, 8) * 10, torch.randn(4, 8) * 1e3, torch.randn(4, 7), torch.randn(4, 400, 7) * 10)
    assert path.isfinite().all() and path.diff(dim=1).abs().max() < 100


def test_action_map_peaks_at_the_projected_gripper(camera):
    proprio = make_obs(4)["proprio"][:, None]
    maps = script.action_map(script.project(proprio, camera.expand(4, 3, 4)), proprio[..., 6:], 64)
    for pose, drawn in zip(proprio[:, 0], maps[:, 0]):
        u, v, depth = camera[0] @ torch.cat([pose[:3], torch.ones(1)])
        row, column = divmod(int(drawn[0].argmax()), 64)
        assert abs(column + 0.5 - 64 * u / depth) <= 0.51 and abs(row + 0.5 - 64 * v / depth) <= 0.51 and drawn[0].max() > 0.5
        torch.testing.assert_close(drawn[4], drawn[0] * (pose[6] - pose[7]) / 0.08)


def test_action_map_is_black_when_the_gripper_is_out_of_view(camera):
    proprio = make_obs(1)["proprio"][:, None]
    proprio[..., 1] += 3.0
    assert script.action_map(script.project(proprio, camera), proprio[..., 6:], 16).max() < 1e-6


# ---- learning ------------------------------------------------------------------------------------------------------------

def test_training_rows_pair_frames_actions_and_path():
    cfg = CFG
    episodes = [make_episode(T=30, seed=0), make_episode(T=22, seed=1)]
    rows, shown = script.training_rows(episodes, cfg), np.concatenate([e.frame_steps for e in episodes])
    assert {(e.actions.shape[0], t) for e, t, *_ in rows} == {(30, t) for t in range(0, 23, 4)} | {(22, t) for t in range(0, 13, 4)}
    for _, t, frames in rows:
        assert shown[frames].tolist() == list(range(0, t + 9, 4))
    latents = torch.arange(len(shown)).float().view(-1, 1, 1, 1).expand(-1, CFG.latent_channels, 4, 4)
    batch, = script.make_batch(rows, latents, cfg, np.random.default_rng(0), "cpu", 64)
    assert batch["recalled"].shape == (64, CFG.memory, CFG.latent_channels, 4, 4) and batch["target"].shape[1] == F and (batch["own"] < 0).all()
    for recalled, target, proprio, velocity, previous, actions, path in zip(*(batch[key].numpy() for key in ("recalled", "target", "proprio", "velocity", "previous", "actions", "path"))):
        episode = episodes[int(target[0, 0, 0, 0] >= len(episodes[0].frames))]
        t = int(np.flatnonzero((episode.proprio == proprio).all(1))[0])
        assert np.array_equal(actions, episode.actions[t:t + K]) and np.array_equal(path, episode.proprio[t + 1:t + 1 + K])
        assert np.array_equal(velocity, episode.proprio[t] - episode.proprio[t - 1] if t else np.zeros(8)) and np.array_equal(previous, episode.actions[t - 1] if t else data.Episode.before[8:])
        assert shown[int(recalled[-1, 0, 0, 0])] == t and recalled[-1, 0, 0, 0] + 1 == target[0, 0, 0, 0]


def test_memory_holds_what_was_imagined_in_the_chunks_before(world_sim, camera, monkeypatch):
    """Two chunks imagined before the one that is learned: every frame after the last real one is an imagined one, in its own place."""
    episodes = [make_episode(T=40, seed=0)]
    rows, shown = script.training_rows(episodes, CFG), episodes[0].frame_steps
    latents = torch.arange(len(shown)).float().view(-1, 1, 1, 1).expand(-1, CFG.latent_channels, 4, 4)
    stages = script.make_batch(rows, latents, CFG, np.random.default_rng(0), "cpu", 64, before=2)
    calls = []

    def sample(recalled, conditions, steps, generator=None):
        calls.append(recalled)
        return (1000 + (len(calls) - 1) * F + torch.arange(F)).view(1, F, 1, 1, 1).expand(len(recalled), F, *recalled.shape[2:]).float()
    monkeypatch.setattr(world_sim, "sample", sample)
    monkeypatch.setattr(world_sim, "cfg", dataclasses.replace(CFG, memory_noise=0.0))
    monkeypatch.setattr(world_sim, "denoise", lambda noisy, timestep, known, *_: calls.append(known[:, :CFG.memory]) or noisy)
    world_sim.loss(stages)
    assert len(calls) == 3
    for b in range(64):
        step = [int(np.flatnonzero((episodes[0].proprio == stage["proprio"][b].numpy()).all(1))[0]) for stage in stages]
        assert step == [step[0], step[0] + K, step[0] + 2 * K] and shown[int(stages[2]["target"][b, -1, 0, 0, 0])] == step[0] + 3 * K
        first = step[0] // 4  # number of the last real frame, every 4 steps
        for stage, recalled in enumerate(calls):
            for value in recalled[b, :, 0, 0, 0].int().tolist():
                assert value <= first if value < 1000 else value - 1000 < stage * F
            assert int(recalled[b, -1, 0, 0, 0]) == (first if stage == 0 else 1000 + stage * F - 1)
    assert stages[1]["own"].max() == F - 1 and stages[0]["own"].max() < 0


def test_motion_is_what_the_arm_did():
    episode = make_episode(T=30)
    batch = script.motion([(episode, 3)] * 5, 2 * K, "cpu")
    assert np.array_equal(batch["actions"][4], episode.actions[3:3 + 2 * K]) and np.array_equal(batch["path"][0], episode.proprio[4:4 + 2 * K])


def make_training_batch(world_sim, camera, B=2):
    memory, proprio, actions = start(world_sim, camera, B=B)
    generator = torch.Generator().manual_seed(1)
    random = lambda n: torch.randn(B, n, world_sim.cfg.latent_channels, world_sim.size, world_sim.size, generator=generator)
    return dict(recalled=random(CFG.memory), own=torch.full((B, CFG.memory), -1), target=random(F), proprio=proprio, velocity=memory.velocity,
                previous=memory.action, actions=actions, camera=memory.camera, path=proprio[:, None] + 0.01 * torch.randn(B, K, 8, generator=generator).cumsum(1))


def descend(model, loss, steps=150, lr=3e-3, same_noise=True):
    """Loss before and after some steps of Adam on one batch."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=lr), []
    for step in range(steps):
        torch.manual_seed(0 if same_noise else step)
        value, _ = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses[0], losses[-1]


def test_the_vae_overfits_one_batch(world_sim):
    frames = make_smooth_frames(4)
    before, after = descend(world_sim, lambda: world_sim.vae.loss(world_sim.fold(frames)), same_noise=False)
    assert after < before / 10 and round_trip_error(world_sim, frames) < 2 * after  # encode and decode are what was trained


def make_smooth_frames(n):
    return torch.nn.functional.interpolate(make_obs(n, size=4)["frames"].float(), size=32, mode="bilinear").to(torch.uint8)


@torch.no_grad()
def round_trip_error(world_sim, frames):
    return ((world_sim.decode(world_sim.encode(frames)).float() - frames.float()) / 127.5).square().mean()


@torch.no_grad()
def test_the_linear_vae_keeps_what_varies():
    """As many latents as directions in which patches vary lose nothing; fewer lose more, the fewer they are."""
    frames, error = make_smooth_frames(6), []
    for channels in (48, 6, 2):
        world_sim = script.WorldSim(dataclasses.replace(CFG, vae_channels=(), latent_channels=channels))
        world_sim.vae.fit(world_sim.fold(frames))
        world_sim.latent_mean.fill_(0.3), world_sim.latent_std.fill_(2.0)
        error.append(float(round_trip_error(world_sim, frames)))
    assert error[0] < 1e-4 < error[1] < error[2] < frames.float().div(127.5).var()


@pytest.mark.parametrize("cfg", [CFG, VIDEO, WARP], ids=["stacked", "video", "warp"])
def test_the_unet_overfits_one_batch(cfg, camera):
    torch.manual_seed(0)
    world_sim = script.WorldSim(cfg).eval()  # eval: no condition is dropped
    batch = make_training_batch(world_sim, camera)
    before, after = descend(world_sim, lambda: world_sim.loss([batch]))
    assert after < before / 5


def test_the_dynamics_overfit_one_batch(world_sim, camera):
    batch = make_training_batch(world_sim, camera)
    before, after = descend(world_sim, lambda: world_sim.dynamics_loss(batch), steps=1500, lr=5e-4)
    assert after < before / 10


def test_a_checkpoint_gives_back_the_same_simulator(world_sim, camera, tmp_path):
    world_sim.latent_mean.fill_(0.3), world_sim.dynamics.scale.fill_(0.1)
    data.save_checkpoint(tmp_path / "world_sim.pt", "world_sim", CFG, world_sim)
    loaded = script.load_world_sim(tmp_path / "world_sim.pt")
    assert not loaded.training and loaded.cfg == CFG
    for (a, b) in zip(*(model.predict(*start(model, camera), torch.Generator().manual_seed(0)) for model in (world_sim, loaded))):
        assert torch.equal(a, b)
