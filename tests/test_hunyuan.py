"""HunyuanVideo-1.5 with tiny random weights of the real classes: ours against the stock pipeline."""

import re
import shutil

import pytest
import torch
import torch.distributed as dist
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from engine.config import Config
from engine.trace import CPU_ATTENTION
from grpo import collect, update
from sde import SDE, rollout, sigma_schedule
from tiny.hunyuan import build_tiny_hunyuan
from video import files, hunyuan
from video.files import export, meta_transformer
from video.hunyuan import HunyuanPolicy, latent_shape, load, token_count
from video.prompts import PromptEncoder

FRAMES, HEIGHT, WIDTH = 5, 64, 48
SHAPE = latent_shape(FRAMES, HEIGHT, WIDTH)
PROMPTS = [
    'A red cat holds a sign that says "hello", in the rain',
    "dog",
]  # with and without quotes, of different length
SIGMA = torch.tensor([0.97826, 0.4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_hunyuan(tmp_path_factory.mktemp("hunyuan") / "tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = HunyuanVideo15Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def make(folder, cache):
    """policy, conditions, x: loaded anew for each test, since most of them change the weights."""

    def make_policy(**options):
        policy = load(folder, SHAPE, cache, **options)
        return policy, policy.encode(PROMPTS), noise(len(PROMPTS), *policy.latent_shape)

    return make_policy


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(pipeline, x, steps, height=HEIGHT, width=WIDTH):
    options = {"height": height, "width": width, "num_frames": FRAMES, "output_type": "latent"}
    return pipeline(prompt=PROMPTS, num_inference_steps=steps, latents=x, **options).frames


def stock_velocity(transformer, policy, x, cond):
    stock = HunyuanPolicy(transformer, policy.vae, policy.prompts, policy.latent_shape)
    stock.encode(PROMPTS)
    return stock.velocity(x, SIGMA, cond)


@torch.no_grad()
def randomise(parameters):
    for seed, parameter in enumerate(parameters):
        parameter += 0.05 * noise(*parameter.shape, seed=seed)


def trainable(policy):
    return {name: p for name, p in policy.module.named_parameters() if p.requires_grad}


def gradients(policy, x, cond, frozen=None):
    policy.module.zero_grad()
    (policy.velocity(x, SIGMA, cond, frozen) * noise(*x.shape, seed=2)).sum().backward()
    return {name: p.grad.clone() for name, p in policy.module.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------ against stock
def test_velocity_is_the_stock_denoiser_call(make, pipeline, monkeypatch):
    policy, cond, x = make()
    calls, step = [], pipeline.scheduler.step

    def record(v, t, latents, **options):
        calls.append((v, t, latents))
        return step(v, t, latents, **options)

    monkeypatch.setattr(pipeline.scheduler, "step", record)
    sample(pipeline, x, steps=2)
    assert len(calls) == 2
    graphs = []
    policy.module.register_forward_hook(lambda module, inputs, output: graphs.append(output[0].requires_grad))
    with torch.no_grad():
        for v_stock, t, latents in calls:
            v = policy.velocity(latents, (t / 1000).expand(2), cond)
            assert v.dtype == torch.float32 and (v - v_stock).abs().max() < 1e-5
        assert policy.passes == 2 * 2 * 2  # steps × samples × (conditional and unconditional)
        assert graphs == [False] * 8  # neither branch keeps a graph
        policy.guidance_scale = 5.0  # the comparison above must be able to see guidance
        assert (policy.velocity(latents, (t / 1000).expand(2), cond) - v_stock).abs().max() > 1e-3


@pytest.mark.parametrize("height, width", [(HEIGHT, WIDTH), (48, 80)])
def test_ode_sampling_is_the_stock_pipeline_call(make, pipeline, height, width):
    """At the size that the policy was loaded for, and at another, as in evaluations."""
    policy, cond, _ = make()
    x = noise(len(PROMPTS), *latent_shape(FRAMES, height, width))
    stock = sample(pipeline, x, 4, height, width)
    ode = SDE("sage_grpo", 0.0, sigma_schedule(4, shift=5.0))
    ours = rollout(lambda x, sigma: policy.velocity(x, sigma, cond), x, ode, torch.Generator()).states[:, -1]
    assert ours.shape == x.shape
    assert (ours - stock).abs().max() < 1e-4 * stock.abs().max()


def test_decode_is_the_stock_decoder_for_a_batch(make, pipeline):
    policy, _, x = make()
    video = policy.decode(x)
    assert video.shape == (2, FRAMES, 3, HEIGHT, WIDTH) and video.dtype == torch.uint8 and video.is_contiguous()
    for ours, latent in zip(video, x):
        decoded = pipeline.vae.decode(latent[None] / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        stock = pipeline.video_processor.postprocess_video(decoded.detach(), output_type="pt")[0]
        assert (ours / 255 - stock).abs().max() <= 0.5 / 255 + 1e-4
    assert policy.vae.use_tiling and policy.vae.use_slicing
    wide = policy.decode(noise(1, 32, 1, 1, 17))  # wider than one tile of 256 pixels
    assert wide.shape == (1, 1, 3, 16, 17 * 16)


def test_a_vae_that_overflows_is_no_black_video(make):
    policy, _, x = make()
    policy.vae.decode = lambda scaled, return_dict: (torch.full((1, 3, 1, 8, 8), torch.inf),)
    with pytest.raises(FloatingPointError, match="use --vae_dtype bfloat16 or float32"):
        policy.decode(x)


@torch.no_grad()
def test_encoding_is_the_stock_one_without_padding(make, pipeline):
    policy, cond, _ = make()
    text, text_mask, glyphs, glyph_mask = pipeline.encode_prompt([*PROMPTS, ""], batch_size=3)
    for i, prompt in enumerate([*cond, policy.unconditional]):
        torch.testing.assert_close(prompt.text, text[i][text_mask[i].bool()], rtol=0, atol=1e-6)
        torch.testing.assert_close(prompt.glyphs, glyphs[i][glyph_mask[i].bool()], rtol=0, atol=1e-6)
    assert len(cond[0].text) != len(cond[1].text) and len(cond[0].glyphs) > 0 and len(cond[1].glyphs) == 0


# ------------------------------------------------------------------------------------------------ velocity
@torch.no_grad()
def test_a_batch_of_different_prompts_equals_one_by_one(make):
    policy, cond, x = make()
    together = policy.velocity(x, SIGMA, cond)
    alone = torch.cat([policy.velocity(x[i : i + 1], SIGMA[i : i + 1], [cond[i]]) for i in range(2)])
    swapped = policy.velocity(x, SIGMA, cond[::-1])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert (together - swapped).abs().max() > 1e-3


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("micro_batch, batches", [(2, [2, 2, 2, 2]), (4, [2, 2, 4])])
def test_samples_of_one_prompt_run_as_one_batch(make, lora_rank, micro_batch, batches):
    """Four samples of two prompts at four noise levels, and their unconditional branch: velocity and gradients."""
    policy, cond, _ = make(lora_rank=lora_rank)
    randomise(trainable(policy).values())
    x, sigma, sizes = noise(4, *SHAPE), torch.tensor([0.97826, 0.4, 0.7, 0.1]), []
    policy.module.x_embedder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))

    def velocity_and_gradients(cond):
        policy.module.zero_grad()
        v = policy.velocity(x, sigma, cond)
        (v * noise(*x.shape, seed=2)).sum().backward()
        return v.detach(), {name: parameter.grad for name, parameter in trainable(policy).items()}

    alone, gradients_alone = velocity_and_gradients([cond[0], cond[0], cond[1], cond[1]])
    assert sizes == [1] * 8
    sizes.clear()
    policy.micro_batch = micro_batch
    together, gradients_together = velocity_and_gradients(cond)
    assert sizes == batches and policy.passes == 8 + 8  # counted per sample
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * alone.abs().max())
    largest = max(gradient.norm() for gradient in gradients_alone.values())
    for name, gradient in gradients_alone.items():  # one of them is 0 up to rounding: that of a bias of the keys
        assert (gradients_together[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-7 * largest, name
    swapped, _ = velocity_and_gradients(cond[::-1])
    assert (swapped - alone).abs().max() > 1e-3 * alone.abs().max()


def test_no_attention_mask_over_the_video(make, pipeline, monkeypatch):
    policy, cond, x = make()
    shapes, attention = [], torch.nn.functional.scaled_dot_product_attention

    def record(query, *args, attn_mask=None, **options):
        shapes.append((query.shape[-2], None if attn_mask is None else tuple(attn_mask.shape)))
        return attention(query, *args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    prompts = (*cond, policy.unconditional)
    joint = {token_count(FRAMES, HEIGHT, WIDTH) + len(prompt.text) + len(prompt.glyphs) for prompt in prompts}
    with torch.no_grad():
        policy.velocity(x, SIGMA, cond)
        assert {length for length, mask in shapes if mask is None} == joint
        assert {length for length, mask in shapes if mask is not None} == {
            len(prompt.text) for prompt in prompts
        }  # refiner
        shapes.clear()
        stock_velocity(pipeline.transformer, policy, x, cond)
        assert joint <= {length for length, mask in shapes if mask == (1, 1, length, length)}  # what ours avoids


@pytest.mark.parametrize("attention, found", [("auto", "flash"), ("flash", "flash"), ("math", "math")])
def test_one_attention_kernel_with_and_without_a_gradient(make, attention, found):
    """On the CPU, which has two: the fused operator is called in both cases, or in neither."""
    if found == "flash" and not torch.backends.cuda.flash_sdp_enabled():
        pytest.skip("this process may not use it: see ranks.obey_cpu_capability")
    exact, cond, x = make()
    policy, _, _ = make(attention=attention)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    torch.testing.assert_close(policy.velocity(x, SIGMA, cond), exact.velocity(x, SIGMA, cond), rtol=0, atol=1e-5)
    for with_gradient in (False, True):
        with FlopCounterMode(display=False, custom_mapping={fused: lambda *shapes, **options: 1}) as counter:
            with torch.set_grad_enabled(with_gradient):
                policy.velocity(x, SIGMA, cond)
        blocks = counter.get_flop_counts()["HunyuanVideo15Transformer3DModel.transformer_blocks.0.attn"]
        assert (fused in blocks) == (found == "flash")


def test_an_attention_kernel_that_does_not_run_is_refused_before_the_weights(folder, cache, monkeypatch):
    monkeypatch.setattr(hunyuan, "load_network", lambda *arguments: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="attention must have a kernel that runs on cpu in torch.float32 .*cudnn: "):
        load(folder, SHAPE, cache, attention="cudnn")


def test_float32_is_not_tf32(make):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    make()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@torch.no_grad()
def test_bf16_compute_keeps_latent_and_timestep_in_float32(make):
    policy, cond, x = make(guidance_scale=1.0)
    exact = policy.velocity(x, SIGMA, cond)
    assert policy.passes == 2  # a guidance scale of 1 needs no unconditional pass
    policy.compute_dtype, seen = torch.bfloat16, []
    policy.module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    v = policy.velocity(x, SIGMA, cond)
    assert v.dtype == torch.float32 and (v - exact).norm() / exact.norm() < 0.02
    assert seen[0]["timestep"].dtype == seen[0]["hidden_states"].dtype == torch.float32
    assert abs(seen[0]["timestep"].item() - 978.26) < 1e-3  # bf16 would make it 980


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_checkpointing_leaves_gradients_bit_identical(make, lora_rank):
    policy, cond, x = make(lora_rank=lora_rank)
    randomise(trainable(policy).values())
    assert policy.module.is_gradient_checkpointing
    checkpointed = gradients(policy, x, cond)
    policy.module.disable_gradient_checkpointing()
    plain = gradients(policy, x, cond)
    assert checkpointed.keys() == plain.keys() and all(torch.equal(checkpointed[name], plain[name]) for name in plain)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_selective_checkpointing_saves_the_attention_alone(make, lora_rank):
    """At an attention-heavy size: the same gradients, and fewer FLOPs than full checkpointing by the attention's."""
    x, flops, found = noise(1, 32, 2, 14, 14), {}, {}
    for kind in ("full", "attention", "none"):
        policy, cond, _ = make(lora_rank=lora_rank, guidance_scale=1.0, checkpointing=kind)
        randomise(trainable(policy).values())
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            policy.velocity(x, SIGMA[:1], cond[1:]).square().sum().backward()
        flops[kind] = counter.get_total_flops()
        found[kind] = {name: parameter.grad for name, parameter in trainable(policy).items()}
    for kind in ("full", "attention"):
        for name, gradient in found["none"].items():
            assert torch.equal(found[kind][name], gradient), (kind, name)
    tokens = 2 * 14 * 14 + len(cond[1].text)
    width, blocks = 2 * 16, 2
    assert flops["full"] - flops["attention"] == blocks * 4 * tokens**2 * width
    assert flops["none"] < flops["attention"] < 0.9 * flops["full"]


def test_a_compiled_block_is_one_graph_whatever_the_length_of_the_text(make):
    """The first and the last block differ, so the two of them are two graphs; fullgraph raises at a break."""
    torch._dynamo.reset()
    counters.clear()
    policy, cond, x = make(guidance_scale=1.0)
    expected = gradients(policy, x, cond)
    hunyuan.compile_blocks(policy.module, backend="eager")  # a compiler would take a minute, and is not what is tested
    found = gradients(policy, x, cond)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    torch._dynamo.reset()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-5 * largest, name


# ------------------------------------------------------------------------------------------------ guidance's gradient
def test_a_frozen_branch_leaves_the_velocity_and_takes_its_gradient_away(make):
    policy, cond, x = make()
    assert policy.frozen_velocity(x, SIGMA, cond) is None  # both branches are trained
    whole = policy.velocity(x, SIGMA, cond)
    policy.guidance_gradient, before = "conditional", policy.passes
    frozen = policy.frozen_velocity(x, SIGMA, cond)
    assert not frozen.requires_grad and policy.passes - before == 2
    assert torch.equal(policy.velocity(x, SIGMA, cond, frozen), whole) and policy.passes - before == 4
    ours = gradients(policy, x, cond, frozen)
    policy.guidance_scale = 1.0  # v = v_cond; the gradient of the guided velocity is 6 times that one's
    assert policy.frozen_velocity(x, SIGMA, cond) is None
    alone = gradients(policy, x, cond)
    assert ours.keys() == alone.keys()
    largest = max(gradient.norm() for gradient in alone.values())
    for name, gradient in alone.items():
        assert (ours[name] - 6 * gradient).norm() < 6 * (1e-4 * gradient.norm() + 1e-7 * largest), name


@pytest.mark.parametrize("optimizer_steps", [1, 2])
def test_the_rollouts_unconditional_branch_is_not_computed_again(make, optimizer_steps):
    """Until the first optimizer step; after it the branch is computed, without a gradient."""
    policy, _, _ = make(guidance_gradient="conditional", micro_batch=2)
    config = Config(batch_size=4, micro_batch=2, kl_mode="none", optimizer_steps=optimizer_steps, clip_range=1e-4)
    sde, noises = SDE("sage_grpo", 0.5, sigma_schedule(2)), [torch.Generator().manual_seed(i) for i in range(4)]

    def reward(videos, prompts):
        return {name: torch.arange(len(prompts)).float() for name in ("VQ", "MQ", "TA")}

    batch = collect(policy, reward, PROMPTS[:1] * 4, sde, noises, config)
    assert policy.passes == 4 * 2 * 2  # samples × steps × branches
    optimizer = torch.optim.SGD(trainable(policy).values(), lr=0.1)
    metrics, _ = update(policy, batch, config, [optimizer], None, noises, 0, 0)
    assert metrics["update_passes"] == {1: 4 * 2, 2: 4 + 4 * 2}[optimizer_steps]
    assert metrics["grad_norm"] > 0
    off = max(abs(metrics["ratio_max"] - 1), abs(metrics["ratio_min"] - 1))
    assert off < 1e-5 if optimizer_steps == 1 else off > 1e-5


# ------------------------------------------------------------------------------------------------ what is trained
def test_frozen_are_exactly_the_parameters_without_a_gradient(make):
    policy, cond, x = make()
    frozen = {name for name, p in policy.module.named_parameters() if not p.requires_grad}
    assert gradients(policy, x, cond).keys().isdisjoint(frozen)
    policy.module.requires_grad_(True)  # as stock would train it
    found = gradients(policy, x, cond)
    dead = {name for name, _ in policy.module.named_parameters() if name not in found or not found[name].any()}
    assert frozen == dead
    without = {re.sub(r".*\.1\.|\.(net.*|weight|bias)$", "", name) for name in dead - found.keys()}
    assert without == {"attn.to_add_out", "ff_context"}  # the others' gradients are zeros


def test_lora_trains_float32_adapters_that_all_get_gradients(make):
    (base, cond, x), (policy, _, _) = make(), make(lora_rank=4)
    with torch.no_grad():  # it starts as the base model
        assert torch.equal(policy.velocity(x, SIGMA, cond), base.velocity(x, SIGMA, cond))
    adapters = trainable(policy)
    assert all("lora_" in name for name in adapters)
    assert not any(name.startswith(hunyuan.dead_parts(policy.module)) for name in adapters)
    randomise(adapters.values())
    found = gradients(policy, x, cond)
    assert found.keys() == adapters.keys() and all(gradient.any() for gradient in found.values())
    mixed, cond, _ = make(lora_rank=4, compute_dtype=torch.bfloat16)
    dtypes = {(p.requires_grad, p.dtype) for p in mixed.module.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)} and cond[0].text.dtype == torch.bfloat16
    assert gradients(mixed, x, cond).keys() == adapters.keys()


def test_a_loras_inputs_need_no_cast_of_pefts(make):
    """Under autocast the same bits come without it, with fewer copies. In float32 there is nothing to cast."""
    policy, cond, x = make(lora_rank=4, compute_dtype=torch.bfloat16)
    layers = [module for module in policy.module.modules() if isinstance(module, LoraLayer)]
    randomise(trainable(policy).values())
    found, copies = {}, {}
    for casts in (False, True):
        for layer in layers if casts else ():  # as it comes without us
            layer.cast_input_dtype_enabled = True
        counted = {torch.ops.aten._to_copy: lambda *shapes, **options: 1}
        with FlopCounterMode(display=False, custom_mapping=counted) as counter:
            found[casts] = gradients(policy, x, cond)
        copies[casts] = counter.get_flop_counts()["Global"][torch.ops.aten._to_copy]
    assert copies[True] - copies[False] > len(layers)
    assert all(torch.equal(found[False][name], gradient) for name, gradient in found[True].items())


def test_lora_starts_by_its_seed_alone_and_leaves_the_global_generator_alone(make):
    state = torch.manual_seed(5).get_state()
    first = trainable(make(lora_rank=4)[0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second = trainable(make(lora_rank=4)[0])
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = trainable(make(lora_rank=4, seed=1)[0])
    assert all(torch.equal(first[name], other[name]) == ("lora_B" in name) for name in first)


def test_lora_has_the_scale_the_places_and_the_first_weights_of_pefts_own(make):
    policy, _, _ = make(lora_rank=4)
    adapted = {}
    for name, module in policy.module.named_modules():
        if hasattr(module, "lora_A"):
            adapted[re.sub(r"transformer_blocks\.", "", name)] = module
    attention = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")]
    of_video = [*attention, "ff.net.0.proj", "ff.net.2"]
    of_text = ["attn.add_q_proj", "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"]
    assert set(adapted) == {f"0.{name}" for name in of_video + of_text} | {f"1.{name}" for name in of_video}
    for name, module in adapted.items():
        assert module.scaling["default"] == 1, name
        drawn = module.lora_A["default"].weight.abs().max().item()  # uniform within ±1/√in
        assert 0.9 < drawn * module.in_features**0.5 <= 1, name


# ------------------------------------------------------------------------------------------------ export and shards
@pytest.fixture
def mesh(tmp_path):
    """A mesh of one process: the code path of FSDP2 and of sharded state, without a second process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@torch.no_grad()
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_export_loads_in_stock_diffusers(make, folder, tmp_path, lora_rank):
    policy, cond, x = make(lora_rank=lora_rank)
    before = policy.velocity(x, SIGMA, cond)
    randomise(trainable(policy).values())
    after = policy.velocity(x, SIGMA, cond)
    export(policy, tmp_path, shift=5.0)
    if lora_rank:
        stock = HunyuanVideo15Transformer3DModel.from_pretrained(folder, subfolder="transformer")
        stock.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    else:
        stock = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(stock_velocity(stock, policy, x, cond), after, rtol=0, atol=1e-6)
    state = dict(policy.module.named_parameters())
    loaded = {name.replace(".default_0.", ".default."): p for name, p in stock.named_parameters()}
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_stock_diffusers_samples_from_an_export_as_the_run_does(make, folder, tmp_path):
    """At another guidance and another shift than those of the model that the run began with."""
    policy, cond, x = make(guidance_scale=2.0)
    export(policy, tmp_path, shift=9.0)
    pipeline = HunyuanVideo15Pipeline.from_pretrained(
        folder,
        transformer=HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
        guider=ClassifierFreeGuidance.from_pretrained(tmp_path, subfolder="guider"),
    )
    pipeline.set_progress_bar_config(disable=True)
    stock = sample(pipeline, x, 4)
    ode = SDE("sage_grpo", 0.0, sigma_schedule(4, shift=9.0))
    ours = rollout(lambda x, sigma: policy.velocity(x, sigma, cond), x, ode, torch.Generator()).states[:, -1]
    assert (ours - stock).abs().max() < 1e-4 * stock.abs().max()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # it returns a view: nothing writes into a velocity
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_sharded_policy_trains_and_exports_like_the_plain_one(make, mesh, tmp_path, lora_rank):
    exported = {}
    for name, options in (("plain", {}), ("sharded", {"mesh": mesh})):
        policy, cond, x = make(lora_rank=lora_rank, **options)
        found = gradients(policy, x, cond)
        assert all(isinstance(gradient, DTensor) == (name == "sharded") for gradient in found.values())
        torch.optim.SGD(trainable(policy).values(), lr=0.01).step()
        export(policy, tmp_path / name, shift=5.0)
        (file,) = (tmp_path / name).glob("*.safetensors")
        exported[name] = load_file(file)
    torch.testing.assert_close(exported["sharded"], exported["plain"], rtol=0, atol=1e-6)
    assert any(
        weight.any() for name, weight in exported["plain"].items() if "lora_B" in name or not lora_rank
    )  # it moved


@torch.no_grad()
def test_shards_compute_in_bf16_and_keep_inputs_and_sums_in_float32(make, mesh):
    exact, cond, x = make(guidance_scale=1.0)
    policy, _, _ = make(guidance_scale=1.0, mesh=mesh, compute_dtype=torch.bfloat16)
    wrapped = [module for module in policy.module.modules() if isinstance(module, FSDPModule)]
    assert len(wrapped) == 1 + 2 + 1  # the root, its blocks, the refiner's
    for module in wrapped:
        rounding = module._get_fsdp_state()._mp_policy
        assert rounding.param_dtype == torch.bfloat16 and rounding.reduce_dtype == torch.float32
        assert rounding.cast_forward_inputs is False
    v = exact.velocity(x, SIGMA, cond)
    assert (policy.velocity(x, SIGMA, cond) - v).norm() / v.norm() < 0.012


# ------------------------------------------------------------------------------------------------ prompt cache
def test_cached_prompts_load_no_encoder(folder, cache, make, monkeypatch):
    def refuse(cls, model, name, **options):
        raise AssertionError(f"{name} was loaded")

    _, cond, _ = make()
    monkeypatch.setattr(files, "load_component", refuse)
    again = PromptEncoder(folder, cache, "cpu", torch.float32)(PROMPTS)
    assert all(torch.equal(a, b) for first, second in zip(cond, again) for a, b in zip(first, second))
    assert not list(cache.glob("*.tmp"))
    with pytest.raises(AssertionError, match="was loaded"):
        PromptEncoder(folder, cache, "cpu", torch.float32)(["a prompt that nobody encoded"])


def test_cache_names_depend_on_model_weights_dtype_and_prompt(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")

    def path(model, dtype=torch.float32, prompt="dog"):
        return PromptEncoder(model, tmp_path, "cpu", dtype).path(prompt)

    paths = [path(model) for model in (folder, copy, "org/a", "org/b")]
    paths += [path(copy, prompt="dog "), path(copy, torch.bfloat16)]
    build_tiny_hunyuan(copy, seed=1)
    paths.append(path(copy))
    for file in ("tokenizer/chat_template.jinja", "tokenizer_2/tokenizer_config.json", "text_encoder/config.json"):
        with open(copy / file, "a") as end:
            end.write(" ")
        paths.append(path(copy))
    assert len(set(paths)) == len(paths)


# ------------------------------------------------------------------------------------------------ sizes
def test_released_architecture_has_the_published_sizes():
    transformer = meta_transformer()
    assert transformer.num_parameters() == 8_326_608_160 and len(transformer.transformer_blocks) == 54
    assert all(parameter.is_meta for parameter in transformer.parameters())
    assert latent_shape(81, 480, 848) == (32, 21, 30, 53)
    assert token_count(81, 480, 848) == 33_390 and token_count(81, 480, 832) == 32_760
    assert token_count(81, 352, 624) == 18_018 and token_count(81, 480, 864) == 34_020


def test_bad_arguments_say_what_to_do(folder, cache, tmp_path, make):
    for size, message in (
        ((80, 480, 832), "4k \\+ 1"),
        ((81, 480, 850), "multiples of 16"),
        ((0, 480, 832), "4k \\+ 1"),
    ):
        with pytest.raises(ValueError, match=message):
            token_count(*size)
    with pytest.raises(ValueError, match="compute_dtype"):
        load(folder, SHAPE, cache, compute_dtype=torch.float16)
    with pytest.raises(ValueError, match="lora_rank"):
        load(folder, SHAPE, cache, lora_rank=-1)
    policy, cond, x = make()
    wrong = [((x.bfloat16(), SIGMA, cond), "x must be float32"), ((x[:, :3], SIGMA, cond), "x must be float32")]
    for rest in ((SIGMA, [*cond, *cond]), (SIGMA, []), (SIGMA[:1], cond), (SIGMA[0], cond)):
        wrong.append(((x, *rest), "one sigma per sample"))
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            policy.velocity(*arguments)
