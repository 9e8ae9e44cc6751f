"""Machines that hold a whole model each: two of two ranks, which are forked from this process.

Gradients that leave a machine once for each optimizer step; and training the extremes of each group, beside one rank.
"""

from datetime import timedelta
from types import SimpleNamespace

import forked
import pytest
import torch
import torch.distributed as dist
from test_ranks import COMPARED, TOLERANCE, curve, deviation

from engine.build import make_anchor, make_optimizers
from engine.config import Config
from engine.draws import own_prompts, sample_generators
from engine.ranks import AllRanks
from grpo import OneRank, collect, update
from ranks import rewards_by_place
from tiny.hunyuan import GLYPH_DIM, TEXT_DIM, tiny_transformer
from video import hunyuan, kernels, parallel
from video.prompts import Prompt

MICRO_BATCHES = 3
GROUP, TRAINED = 4, 2


def make_policy(lora_rank, context=None, mesh=None):
    """With guidance, so that a micro-batch has two passes."""
    torch.manual_seed(0)
    stock = tiny_transformer()
    transformer = hunyuan.make_trainable(stock, lora_rank, context=context)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:  # 0 would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    if mesh is not None:
        hunyuan.shard(transformer, mesh)
    vae = SimpleNamespace(enable_slicing=lambda: None, enable_tiling=lambda: None)
    policy = hunyuan.HunyuanPolicy(transformer, vae, encoded, (32, 2, 4, 4), guidance_scale=3.0)
    policy.encode([])
    policy.decode = lambda latents: latents
    return policy


def encoded(texts):
    return [prompt(torch.Generator().manual_seed(len(text))) for text in texts]


def prompt(generator):
    return Prompt(torch.randn(5, TEXT_DIM, generator=generator), torch.randn(2, GLYPH_DIM, generator=generator))


def gradients(policy, place, once):
    """{name: whole gradient} of an optimizer step, and the all-reduces of FSDP2 that it took."""
    reductions = []
    all_reduce = dist.all_reduce

    def counted(tensor, *arguments, **options):
        if options.get("op") is not None:  # FSDP2 names its operation; the exchange of tokens and heads does not
            reductions.append(tensor.numel())
        return all_reduce(tensor, *arguments, **options)

    dist.all_reduce = counted
    for number in range(MICRO_BATCHES):
        parallel.reduce_between_machines(policy.module, last=not once or number == MICRO_BATCHES - 1)
        generator = torch.Generator().manual_seed(10 * place + number)
        x, wanted = torch.randn(2, 1, 32, 2, 4, 4, generator=generator)
        v = policy.velocity(x, torch.tensor([0.5]), [prompt(generator)])
        (v - wanted).square().mean().backward()
    dist.all_reduce = all_reduce
    parameters = [(name, p) for name, p in policy.module.named_parameters() if p.requires_grad]
    whole = {name: p.grad.full_tensor() for name, p in parameters}
    for _, parameter in parameters:
        parameter.grad = None
    return whole, sum(reductions)


def train_extremes(policy, lora_rank, groups, ranks):
    """The log of two iterations of two optimizer steps each, whose second one needs the anchor's own passes."""
    samples = groups * GROUP
    config = Config(
        lora_rank=lora_rank,
        learning_rate=1e-1 if lora_rank else 3e-3,  # so that no ratio differs from 1 by a few roundings alone
        group_size=GROUP,
        train_samples=TRAINED,
        batch_size=samples // ranks.dp_world,
        micro_batch=2 if ranks.dp_world > 1 else 4,
        num_steps=2,
        optimizer_steps=2,
        anchor_every=4,
        stepwise_kl="closed_form",
        kl_schedule="fixed",
        kl_lambda=1.0,
    )
    policy.micro_batch = config.micro_batch
    optimizers, anchor = make_optimizers(policy.module, config), make_anchor(policy.module, config)
    log, steps_made = [], 0
    for iteration in range(2):
        texts = own_prompts(["a", "bb", "ccc", "dddd"], config, iteration, ranks)
        noise, orders = (sample_generators(config, purpose, iteration, ranks) for purpose in ("noise", "order"))
        scores = rewards_by_place(config, steps_made, 0, None, range(samples))  # of all ranks' samples
        batch = collect(policy, lambda *videos: scores, texts, config.sde(), noise, config, steps_made, ranks)
        metrics, steps_made = update(policy, batch, config, optimizers, anchor, orders, iteration, steps_made, ranks)
        log.append({**batch.metrics, **metrics})
    return log


def kernel_of_the_first_rank(rank):
    """The kernel of --attention auto, where every rank would choose another one."""
    kernels.choose = lambda *where: ("math", "flash")[rank % 2]
    return kernels.attention_kernel("auto", "cpu", torch.float32, 2, 16, 32)


def work(lora_rank, context_parallel, out):
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    ranks = AllRanks(parallel.context_group(context_parallel, timedelta(minutes=1)))
    policy = make_policy(lora_rank, ranks.context, parallel.device_mesh("cpu", replicate=2))
    each, sent_each = gradients(policy, ranks.dp_rank, once=False)
    once, sent_once = gradients(policy, ranks.dp_rank, once=True)
    log = train_extremes(policy, lora_rank, ranks.dp_world, ranks)  # a whole group to a rank
    taken = ranks.exchange(kernel_of_the_first_rank(ranks.rank))
    if ranks.rank == 0:
        torch.save((each, once, sent_each, sent_once, log, taken), out)
    dist.barrier()


@pytest.fixture(scope="module", params=[(0, 2), (2, 1)], ids=["full, tokens shared", "lora"])
def launched(request, tmp_path_factory):
    """(rank of the LoRA, ranks to a video, what the four ranks have saved)."""
    lora_rank, context_parallel = request.param
    folder = tmp_path_factory.mktemp("machines")
    forked.finish(forked.start(4, folder / "shown", work, lora_rank, context_parallel, folder / "saved.pt"))
    return lora_rank, context_parallel, torch.load(folder / "saved.pt")


def test_gradients_that_leave_the_machine_once_are_those_that_leave_it_each_time(launched):
    each, once, sent_each, sent_once, _, _ = launched[-1]
    assert each.keys() == once.keys() and len(each) > 20
    for name in each:
        scale = each[name].abs().max()
        assert scale > 0 and (once[name] - each[name]).abs().max() <= 1e-6 * scale, name
    assert sent_each == MICRO_BATCHES * sent_once > 0


def test_two_machines_that_train_the_extremes_of_each_group_equal_one_rank(launched):
    lora_rank, context_parallel, (*_, several, _) = launched
    groups = 4 // context_parallel
    one = train_extremes(make_policy(lora_rank), lora_rank, groups, OneRank())
    of_a_group = [line["update_passes"] for line in several]
    assert of_a_group == [TRAINED * 2 * 2, 2 * TRAINED * 2 * 2]  # samples × steps × guidance; then the anchor's, too
    assert [line["update_passes"] for line in one] == [groups * passes for passes in of_a_group]
    for name in COMPARED:
        assert deviation(one, several, name) < TOLERANCE["lora" if lora_rank else "full"], name  # 1e-4 by rounding
        assert curve(one, name).abs().max() > 1e-4, name  # what was compared is not rounding


def test_all_ranks_take_the_kernel_that_the_first_one_chooses(launched):
    *_, taken = launched[-1]
    assert taken == ["math"] * 4
