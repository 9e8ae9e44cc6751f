"""What the VAE's number format changes in a video, on the miniature's decoder."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from engine.draws import generator
from tiny import codec, miniature
from toy import world
from video import hunyuan


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """{vae_dtype: (dtype of the weights, 0 … 255 of eight clean clips)}."""
    folder = miniature.build_miniature(tmp_path_factory.mktemp("miniature") / "model")
    code = miniature.part(load_file(miniature.WEIGHTS), "code.")
    latents = codec.encode(world.clean_clips(miniature.PROMPTS[::8], generator("clean"), codec.SCALE), code)
    shape = hunyuan.latent_shape(codec.FRAMES, codec.SIDE, codec.SIDE)
    videos = {}
    for vae_dtype in ("float32", "tf32", "bfloat16", "float16"):
        policy = hunyuan.load(str(folder), shape, folder.parent / "cache", vae_dtype=vae_dtype)
        videos[vae_dtype] = policy.vae.dtype, policy.decode(latents).float()
    return videos


@pytest.mark.parametrize(
    "vae_dtype, weights, mean, most",
    [("tf32", torch.float32, 0, 0), ("float16", torch.float16, 0.2, 2), ("bfloat16", torch.bfloat16, 0.5, 16)],
)
def test_a_pixel_changes_by_so_many_levels(decoded, vae_dtype, weights, mean, most):
    """tf32 is float32 on a CPU."""
    dtype, video = decoded[vae_dtype]
    change = (video - decoded["float32"][1]).abs()
    assert dtype == weights and change.max() <= most
    assert 0.3 * mean <= change.mean() <= mean


def test_the_reward_hardly_notices_float16(decoded):
    prompts = miniature.PROMPTS[::8]
    exact, half = (
        miniature.reward(decoded[name][1].to(torch.uint8), prompts) for name in ("float32", "float16")
    )  # fmt: skip
    for name in exact:
        assert (exact[name] - half[name]).abs().max() < 0.003


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_allowed_while_the_vae_decodes_and_never_else(allowed):
    """VideoAlign's scores, which follow, are exact."""
    seen = []

    class VAE:
        dtype, config = torch.float32, SimpleNamespace(scaling_factor=1.0)

        def decode(self, latents, return_dict):
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return (torch.zeros(1, 3, 1, 2, 2),)

    policy = SimpleNamespace(vae=VAE(), vae_tf32=allowed)
    hunyuan.HunyuanPolicy.decode(policy, torch.zeros(1, 32, 1, 2, 2))
    assert seen == [(allowed, allowed)]
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
