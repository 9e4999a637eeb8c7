"""OpenVLA-OFT to the letter: towers against timm's, attention, published names and shapes, LoRA, two cameras, two processes."""
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import data
import policy as script
from conftest import ROOT, make_episode, make_obs
from test_policy import STATS

SMOKE = script.PRESETS["smoke"]
VIT = dataclasses.replace(SMOKE, tower=(), dino=(32, 3, 2), siglip=(48, 3, 2, 80), patch=8, tokens_per_action=7)


def make_policy(tokenizer, seed=0, **changes):
    torch.manual_seed(seed)
    return script.Policy(dataclasses.replace(VIT, **changes), tokenizer, STATS).eval()


def published(cfg, make):
    """Every name and shape of a published OpenVLA-OFT checkpoint of these sizes -> {file: {name: make(shape)}} (method.md, section 1.7)."""
    side, D, slots = (cfg.image_size // cfg.patch) ** 2, cfg.width, cfg.tokens_per_action * cfg.width
    linear = lambda name, inputs, outputs: {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    norm = lambda name, width: {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def tower(name, width, blocks, mlp, scales):
        shapes = {f"{name}.pos_embed": (1, side, width), f"{name}.patch_embed.proj.weight": (width, 3, cfg.patch, cfg.patch), f"{name}.patch_embed.proj.bias": (width,)}
        for block in (f"{name}.blocks.{i}" for i in range(blocks)):
            shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
            shapes |= linear(f"{block}.attn.qkv", width, 3 * width) | linear(f"{block}.attn.proj", width, width)
            shapes |= linear(f"{block}.mlp.fc1", width, mlp) | linear(f"{block}.mlp.fc2", mlp, width)
            shapes |= {f"{block}.ls{k}.scale_factor": (width,) for k in (1, 2) if scales}
        return shapes | norm(f"{name}.norm", width)

    dino, siglip, pool = "vision_backbone.featurizer", "vision_backbone.fused_featurizer", "vision_backbone.fused_featurizer.attn_pool"
    width, mlp, C = cfg.siglip[0], cfg.siglip[3], cfg.dino[0] + cfg.siglip[0]
    model = tower(dino, cfg.dino[0], cfg.dino[1], 4 * cfg.dino[0], True) | tower(siglip, width, cfg.siglip[1], mlp, False)
    model |= {f"{dino}.cls_token": (1, 1, cfg.dino[0]), f"{dino}.reg_token": (1, 4, cfg.dino[0]), f"{pool}.latent": (1, 1, width)}
    model |= linear(f"{pool}.q", width, width) | linear(f"{pool}.kv", width, 2 * width) | linear(f"{pool}.proj", width, width) | norm(f"{pool}.norm", width)
    model |= linear(f"{pool}.mlp.fc1", width, mlp) | linear(f"{pool}.mlp.fc2", mlp, width)
    model |= linear("projector.fc1", C, 4 * C) | linear("projector.fc2", 4 * C, D) | linear("projector.fc3", D, D)
    model |= {"language_model.model.embed_tokens.weight": (cfg.vocabulary, D), "language_model.model.norm.weight": (D,), "language_model.lm_head.weight": (cfg.vocabulary, D)}
    for layer in (f"language_model.model.layers.{i}" for i in range(cfg.layers)):
        model |= {f"{layer}.self_attn.{x}_proj.weight": (D, D) for x in "qkvo"} | {f"{layer}.{x}_layernorm.weight": (D,) for x in ("input", "post_attention")}
        model |= {f"{layer}.mlp.gate_proj.weight": (cfg.mlp, D), f"{layer}.mlp.up_proj.weight": (cfg.mlp, D), f"{layer}.mlp.down_proj.weight": (D, cfg.mlp)}
    head = norm("model.layer_norm1", slots) | linear("model.fc1", slots, D) | norm("model.layer_norm2", D) | linear("model.fc2", D, 7)
    for i in range(2):
        head |= norm(f"model.mlp_resnet_blocks.{i}.ffn.0", D) | linear(f"model.mlp_resnet_blocks.{i}.ffn.1", D, D)
    parts = dict(model=model, action_head=head, proprio_projector=linear("fc1", 8, D) | linear("fc2", D, D))
    return {part: {name: make(shape) for name, shape in shapes.items()} for part, shapes in parts.items()}


def write_published(folder, files, tokenizer, suite="libero_goal_no_noops"):
    """As on the model hub: safetensors shards, heads of torch.save with DDP's prefix, statistics, tokenizer."""
    folder.mkdir(exist_ok=True)
    names = sorted(files["model"])
    for shard in range(3):
        save_file({n: files["model"][n] for n in names[shard::3]}, folder / f"model-0000{shard + 1}-of-00003.safetensors")
    for part in ("action_head", "proprio_projector"):
        torch.save({f"module.{n}": v for n, v in files[part].items()}, folder / f"{part}--150000_checkpoint.pt")
    norms = dict(action=dict(q01=[-0.5] * 6 + [0], q99=[0.75] * 6 + [1]), proprio=dict(q01=[-1] * 8, q99=[1] * 8))
    (folder / "dataset_statistics.json").write_text(json.dumps({suite: norms}))
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), "utf-8")
    return folder


# ---- published checkpoints -------------------------------------------------------------------------------------------------

TIMM = """
import importlib.abc, importlib.machinery, sys
from unittest import mock
class NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):  # timm imports it for its data sets, which nobody needs here
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
    def create_module(self, spec):
        return mock.MagicMock(__path__=[])
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, NoTorchvision())
import timm, torch
torch.manual_seed(0)
sizes = dict(pretrained=False, img_size=32, patch_size=8, depth=3, num_heads=2, num_classes=0)
dino = timm.create_model("vit_large_patch14_reg4_dinov2", embed_dim=32, **sizes)
siglip = timm.create_model("vit_so400m_patch14_siglip_224", embed_dim=48, mlp_ratio=80 / 48, **sizes)
for p in [*dino.parameters(), *siglip.parameters()]:
    torch.nn.init.normal_(p, std=0.2)
images = torch.rand(2, 3, 32, 32)
mean, std = (torch.tensor(x)[:, None, None] for x in ((0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)))
with torch.no_grad():
    features = [dino.eval().get_intermediate_layers((images - mean) / std, n=[1])[0], siglip.eval().get_intermediate_layers(images * 2 - 1, n=[1])[0]]
names = {f"vision_backbone.featurizer.{n}".replace("gamma", "scale_factor"): v for n, v in dino.state_dict().items()}
names |= {f"vision_backbone.fused_featurizer.{n}": v for n, v in siglip.state_dict().items()}
torch.save((names, images, torch.cat(features, -1)), sys.argv[1])
"""


@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs: pip install --no-deps timm")
def test_towers_give_timms_features(tokenizer, tmp_path):
    done = subprocess.run([sys.executable, "-c", TIMM, tmp_path / "timm.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    names, images, features = torch.load(tmp_path / "timm.pt")
    cfg = dataclasses.replace(VIT, vocabulary=len(tokenizer))
    files = published(cfg, torch.zeros)
    assert {n for n in names if "attn_pool" not in n} == {n for n in files["model"] if n.startswith("vision") and "attn_pool" not in n}
    files["model"] |= names
    state = script.load_openvla(write_published(tmp_path / "openvla", files, tokenizer))
    policy = script.Policy(cfg, tokenizer, STATS, state).eval()
    with torch.no_grad():
        ours = policy.tower(images)
    assert ours.shape == features.shape == (2, 16, 80) and features.std() > 0.1
    assert (ours - features).abs().max() < 1e-4


def test_a_published_checkpoint_loads_and_leaves_nothing_over(tokenizer, tmp_path):
    torch.manual_seed(0)
    cfg = dataclasses.replace(VIT, vocabulary=len(tokenizer) + 64)
    folder = write_published(tmp_path / "openvla", published(cfg, lambda shape: 0.1 * torch.randn(shape)), tokenizer)
    state = script.load_openvla(folder, "libero_goal")
    missing, unexpected = script.Policy(cfg, tokenizer).load_state_dict(state, strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"scale_trunk", "scale_out"}  # World-Env's own
    policy = script.Policy(cfg, tokenizer, STATS, state)
    assert policy.action_bounds[:, 0].tolist() == [-0.5, 0.75] and script.load_openvla(folder, "libero_10").keys() < state.keys()
    assert torch.equal(policy.llama.layers[1].mlp.up_proj.weight, state["llama.layers.1.mlp.up_proj.weight"])
    state.pop("llama.norm.weight")
    with pytest.raises(data.UserError, match="1 weights do not fit, such as .'llama.norm.weight'"):
        script.Policy(cfg, tokenizer, STATS, state)
    with pytest.raises(data.UserError, match="weights do not fit.*--preset paper"):  # the sizes of another preset
        script.Policy(SMOKE, tokenizer, STATS, script.load_openvla(folder))
    with pytest.raises(data.UserError, match="no .*safetensors"):
        script.load_openvla(tmp_path)
    for name in ("action_head--150000_checkpoint.pt", "model-00002-of-00003.safetensors"):
        (folder / name).write_bytes(b"cut short")
        with pytest.raises(data.UserError, match=f"{name}: not a readable"):
            script.load_openvla(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(data.UserError, match="no tokenizer.json"):
        script.load_openvla(folder)


def test_the_7b_model_has_the_published_names_and_shapes(tokenizer, tmp_path, monkeypatch):
    cfg = dataclasses.replace(script.PRESETS["paper"], lora_rank=0)
    files = published(cfg, lambda shape: torch.empty(shape, device="meta"))
    assert sum(v.numel() for v in files["model"].values()) == pytest.approx(7.54e9, rel=2e-3)
    with torch.device("meta"):
        policy = script.Policy(cfg, tokenizer)
    import safetensors.torch
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    for part in ("action_head", "proprio_projector"):
        (tmp_path / f"{part}--1_checkpoint.pt").touch()
    monkeypatch.setattr(safetensors.torch, "load_file", lambda path: files["model"])
    monkeypatch.setattr(torch, "load", lambda path, **_: files[path.name.split("--")[0]])
    state, own = script.load_openvla(tmp_path), policy.state_dict()
    assert {n: v.shape for n, v in own.items() if not n.startswith("scale_") and "bounds" not in n} == {n: v.shape for n, v in state.items()}
    assert own["scale_trunk.stem.1.weight"].shape == (4096, 28672) and own["scale_out.weight"].shape == (7, 4096)


# ---- attention -------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_suffix_attention_with_a_cache_is_one_pass_with_a_block_mask(tokenizer):
    policy, obs = make_policy(tokenizer, attention="suffix"), make_obs(3)
    prefix, suffix, seen = policy.embed(obs)
    S, total = prefix.shape[1], seen.shape[1]
    assert (seen == 0).any()  # some prompts are padded
    allowed = seen.bool()[:, None, None].repeat(1, 1, total, 1)
    allowed[:, :, :S, S:] = False
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    states = policy.llama(inputs_embeds=torch.cat([prefix, suffix], 1), attention_mask=mask, position_ids=(seen.cumsum(1) - 1).clamp(min=0)).last_hidden_state
    once = states[:, S:-2].unflatten(1, (8, 7)).flatten(2)
    assert (policy.hidden(obs) - once).abs().max() < 1e-5
    full = make_policy(tokenizer)
    full.load_state_dict(policy.state_dict())
    assert (full.hidden(obs) - once).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("attention", ["full", "suffix"])
def test_whether_the_prompt_sees_the_placeholders(tokenizer, attention, monkeypatch):
    policy, obs, states = make_policy(tokenizer, attention=attention), make_obs(2), []
    run, embed = policy.llama.forward, policy.embed
    monkeypatch.setattr(policy.llama, "forward", lambda *inputs: states.append(run(*inputs)) or states[-1])
    policy.hidden(obs)
    before = torch.cat([s.last_hidden_state for s in states], 1)
    monkeypatch.setattr(policy, "embed", lambda obs: (lambda prefix, suffix, seen: (prefix, suffix + 1, seen))(*embed(obs)))
    states.clear()
    policy.hidden(obs)
    after, S = torch.cat([s.last_hidden_state for s in states], 1), embed(obs)[0].shape[1]
    assert torch.equal(before[:, :S], after[:, :S]) == (attention == "suffix") and not torch.equal(before[:, S:], after[:, S:])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["full", "suffix"])
def test_hidden_states_start_one_left_of_the_placeholders(tokenizer, attention, monkeypatch):
    """A one-hot probe: each state tells its own position."""
    policy, obs = make_policy(tokenizer, attention=attention), make_obs(2)
    prefix, suffix, seen = policy.embed(obs)
    S, n = prefix.shape[1], suffix.shape[1] - 2
    assert torch.equal(suffix[:, 1:-1], torch.zeros(2, n, VIT.width)) and (suffix[:, 0] != 0).any() and (suffix[:, -1] != 0).any()
    ids = policy.tokenizer.convert_tokens_to_ids(["▁", "</s>"])
    assert torch.equal(suffix[0, [0, -1]], policy.llama.embed_tokens.weight[ids])
    probe = lambda x, seen, cache: torch.eye(seen.shape[1])[None, -x.shape[1]:].expand(2, -1, -1)
    monkeypatch.setattr(policy, "attend", probe)
    states = policy.hidden(obs).reshape(2, n, seen.shape[1])
    assert states.argmax(-1).tolist() == [list(range(S, S + n))] * 2  # the last prompt token, then all placeholders but the last


def test_without_prompt_gradient_only_the_suffix_learns(tokenizer):
    policy, obs = make_policy(tokenizer, attention="suffix"), make_obs(2)
    chunk = torch.zeros(2, 8, 7)
    with_gradient = policy.log_prob(obs, chunk)
    policy.prompt_gradient = False
    log_prob = policy.log_prob(obs, chunk)
    assert torch.equal(log_prob, with_gradient)
    log_prob.sum().backward()
    touched = {name.split(".")[0] for name, p in policy.named_parameters() if p.grad is not None}
    assert touched == {"llama", "action_head", "scale_trunk", "scale_out"} and policy.llama.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


# ---- LoRA, precision, cameras ------------------------------------------------------------------------------------------------

def test_lora_starts_at_the_pretrained_model_and_trains_adapters_and_heads(tokenizer):
    base, obs = make_policy(tokenizer), make_obs(2)
    policy = script.Policy(dataclasses.replace(VIT, lora_rank=4), tokenizer, STATS, base.state_dict()).eval()
    torch.testing.assert_close(policy(obs)[0], base(obs)[0], atol=1e-5, rtol=0)
    adapters = {n for n, p in policy.named_parameters() if "lora_" in n}
    assert len(adapters) == 2 * (6 * 3 + 6 * 3 + 3 + 7 * VIT.layers)  # two matrices on each linear layer of DINOv2, SigLIP, projector, Llama
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained - adapters == {n for n, _ in policy.named_parameters() if n.split(".")[0] in ("proprio_projector", "action_head", "scale_trunk", "scale_out")}
    body, heads = policy.parameter_groups(1e-4, 1e-5)
    assert (body["lr"], heads["lr"]) == (1e-4, 1e-5) and len(body["params"]) == len(adapters) + 4 and len(body["params"]) + len(heads["params"]) == len(trained)
    policy.loss(obs, torch.zeros(2, 8, 7), torch.ones(2, 8))[0].backward()
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)
    assert all(p.grad.abs().max() > 0 for n, p in policy.named_parameters() if "lora_B" in n and ".2." not in n)  # the last blocks of the towers go unused


@torch.no_grad()
def test_bfloat16_stays_close_and_log_probs_are_float32(tokenizer):
    exact, obs = make_policy(tokenizer), make_obs(2)
    policy = script.Policy(dataclasses.replace(VIT, bf16=True, lora_rank=4), tokenizer, STATS, exact.state_dict()).eval()
    assert policy.llama.norm.weight.dtype == torch.bfloat16 and policy.action_head.out[1].weight.dtype == torch.float32
    loc, log_scale = policy(obs)
    assert loc.dtype == log_scale.dtype == policy.log_prob(obs, loc).dtype == torch.float32
    assert 0 < (loc - exact(obs)[0]).abs().max() < 0.05
    sampled, log_prob = policy.act(obs)
    torch.testing.assert_close(policy.log_prob(obs, sampled), log_prob, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_second_camera_adds_patches(tokenizer):
    policy, obs = make_policy(tokenizer, cameras=2), make_obs(2)
    obs["wrist_frames"] = make_obs(2, seed=1)["frames"]
    one = make_policy(tokenizer)
    assert policy.embed(obs)[0].shape[1] == one.embed(obs)[0].shape[1] + 16
    swapped = obs | dict(frames=obs["wrist_frames"], wrist_frames=obs["frames"])
    assert (policy(obs)[0] - policy(swapped)[0]).abs().max() > 1e-4
    episode = make_episode()
    episode.wrist_frames = 255 - episode.frames
    samples = script.dataset([episode], 8)
    assert torch.equal(samples["wrist_frames"], 255 - samples["frames"])


def test_augmentation_keeps_colours_in_range_and_draws_for_each_picture(tokenizer):
    policy, images = make_policy(tokenizer), torch.rand(4, 3, 32, 32)[[0, 0, 1, 1]]
    grey = torch.full((2, 3, 32, 32), 0.5)
    assert torch.equal(policy.augment(images, policy.cfg, False)[0], policy.augment(images, policy.cfg, False)[1]) and torch.allclose(policy.augment(grey, policy.cfg, False), grey)
    drawn = policy.augment(images, policy.cfg, True)
    assert 0 <= drawn.min() and drawn.max() <= 1 and (drawn[0] - drawn[1]).abs().max() > 0.02
    drawn = policy.augment(grey, policy.cfg, True)
    assert (drawn - drawn[:, :1, :1, :1]).abs().max() < 1e-5  # hue and saturation leave grey grey
    means = torch.stack([policy.augment(grey, policy.cfg, True)[:, 0, 0, 0] for _ in range(200)])
    assert 0.39 < means.min() < 0.42 and 0.58 < means.max() < 0.61  # brightness 0.8 to 1.2


# ---- the command line --------------------------------------------------------------------------------------------------------

TWO = "-m", "torch.distributed.run", "--nproc_per_node", "2", "--"  # `accelerate launch --cpu` starts one


def train(cwd, *flags, launcher=(), script="policy.py"):
    command = [sys.executable, *launcher, str(ROOT / script), "--tasks", "goal:7", "--preset", "smoke", "--demos", str(cwd / "demos"), *flags]
    environment = os.environ | dict(MASTER_PORT="29541")
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("openvla")
    for i in range(2):
        episode = make_episode(T=40, seed=i, index=i, success_from=36)
        data.write_libero_hdf5(cwd / "demos" / f"demo_{i}.hdf5", dataclasses.replace(episode, wrist_frames=episode.frames), "libero_goal")
    return cwd


def test_two_processes_train_what_one_trains(demos):
    vit = "--tower --dino 32 3 2 --siglip 32 3 2 64 --batch-size 5 --crop-area 1 --jitter 0 --proprio-noise 0 --steps 6 --scale-steps 3".split()
    one = train(demos, "--run", "one", *vit)
    two = train(demos, "--run", "two", *vit, launcher=TWO)
    assert one.returncode == 0 and two.returncode == 0, one.stderr[-1500:] + two.stderr[-3000:]
    a, b = (torch.load(demos / "runs" / name / "policy_sft.pt", weights_only=True) for name in ("one", "two"))
    assert len((demos / "runs" / "two" / "policy.jsonl").read_text().splitlines()) == 2  # a line at the end of each phase: only the first process writes
    torch.manual_seed(0)
    start = script.Policy(data.from_config(script.Config, a["config"]), data.beside("load_tokenizer")(a["tokenizer"])).state_dict()
    flat = lambda model: torch.cat([model[n].double().flatten() for n in start if not n.endswith("_bounds")])
    apart, moved = (flat(b["model"]) - flat(a["model"])).norm(), (flat(a["model"]) - flat(start)).norm()
    assert moved > 0 and apart / moved < 0.01, float(apart / moved)  # Adam turns rounding of small gradients into small steps


AT_THE_END = """
import dataclasses, os, data, torch

@dataclasses.dataclass
class Config:
    pass

def run(cfg):
    assert data.processes().num_processes == 1 and torch.distributed.is_initialized()
    from torch.distributed.nn import functional  # as transformers does when it builds a model
    torch.distributed.all_reduce(torch.ones(3))
    assert "gloo" in str(threads())

threads = lambda: [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
data.command_line(run, dict(tiny=Config()), "")
assert "gloo" not in str(threads()), threads()
"""


def test_no_thread_of_a_process_group_lives_to_abort_at_exit():
    environment = os.environ | dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="29542", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.mark.parametrize("kind", ["world_sim", "reflector"])
def test_simulator_and_reflector_train_on_two_processes(demos, kind):
    alone = ("--tower-from", "") if kind == "reflector" else ()  # there is no policy in this run
    done = train(demos, "--run", kind, "--kinds", "expert", *alone, launcher=TWO, script=f"{kind}.py")
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line)["step"] for line in (demos / "runs" / kind / f"{kind}.jsonl").read_text().splitlines()]
    checkpoint = data.load_checkpoint(demos / "runs" / kind / f"{kind}.pt", kind)
    assert steps == sorted(set(steps)) and checkpoint["finished"] and checkpoint["step"] == steps[-1]  # only the first process writes


def test_fine_tuning_a_published_checkpoint(demos, tokenizer, monkeypatch):
    torch.manual_seed(0)
    cfg = dataclasses.replace(VIT, tasks="goal:7", demos=str(demos / "demos"), run="lora", vocabulary=len(tokenizer) + 64, lora_rank=4, cameras=2, attention="suffix",
                              pretrained=str(demos / "openvla"), steps=10, save_every=6)
    folder = write_published(demos / "openvla", published(cfg, lambda shape: 0.02 * torch.randn(shape)), tokenizer)
    monkeypatch.chdir(demos)
    base = script.load_openvla(folder, "libero_goal")
    script.train(cfg)
    tuned = script.load_policy(demos / "runs" / "lora" / "policy_sft.pt")
    assert torch.equal(tuned.llama.layers[0].mlp.up_proj.base_layer.weight, base["llama.layers.0.mlp.up_proj.weight"]) and tuned.cfg.cameras == 2
    assert tuned.action_bounds[:, 0].tolist() == [-0.5, 0.75] and not torch.equal(tuned.action_head.out[1].bias, base["action_head.out.1.bias"])
    assert tuned.llama.layers[0].mlp.up_proj.lora_B["default"].weight.abs().max() > 0
    script.train(dataclasses.replace(cfg, run="published", steps=0))  # nothing but the scale head
    kept = script.load_policy(demos / "runs" / "published" / "policy_sft.pt").state_dict()
    assert torch.equal(kept["action_head.out.1.bias"], base["action_head.out.1.bias"]) and kept["llama.layers.0.mlp.up_proj.lora_B.default.weight"].abs().max() == 0
    assert kept["scale_out.bias"].ne(-3).any()


def test_wrong_flags_are_one_line(demos):
    for flag, value, message in (("--attention", "causal", "expected full or suffix"), ("--cameras", "3", "1 or 2"), ("--pretrained", str(demos / "demos"), "safetensors")):
        done = train(demos, "--run", "bad", flag, value)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
