"""The presets: settings that belong together. What a preset does not name has the default in config.py, the paper's.

toy and mini were measured: RESULTS.md has their numbers, and tests/test_config.py holds them to these settings.
"""

from prompts import BLOBS

TOY, TINY, MINI = "toy", "tiny", "mini"
BUILT_IN = (TOY, TINY, MINI)  # their presets include the model, and with it the prompts that it knows
# The miniature knows one size, and is scored by the toy's rewards.
MINI_UNREAD = ("frames", "height", "width", "eval_height", "eval_width", "videoalign", "videoalign_repo",
               "clip_score", "pick_score")  # fmt: skip
# The LoRA for which the miniature has a reference. It needs a higher learning rate than full training: RESULTS.md.
MINI_LORA = dict(lora_rank=16, learning_rate=5e-3)
PAPER = dict(model="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v")  # all else: the defaults
# These save passes; on the miniature and the toy they learned about as well: RESULTS.md. Two samples of each group of
# four are trained, with the position KL on a quarter of their steps.
SAVINGS = dict(guidance_gradient="conditional", checkpointing="attention", kl_steps=5, train_samples=2)
PRESETS = {
    "toy": dict(  # measured on the toy, see RESULTS.md; the rest is the paper's
        model=TOY,
        group_size=16,
        batch_size=128,  # 8 prompts × 16
        micro_batch=128,
        reward_weights="A",  # its three scores lie in [0, 1], and their mean is what the table shows
        iterations=70,
        num_steps=10,
        noisy_last_step=False,
        learning_rate=6e-4,
        kl_schedule="fixed",
        kl_lambda=0.1,
        eval_steps=10,
        eval_noises=2,
    ),
    "tiny": dict(  # the smallest run in which every part of the full run takes part
        model=TINY,
        batch_size=4,
        micro_batch=2,
        iterations=3,
        num_steps=4,
        learning_rate=1e-4,
        anchor_every=2,
        kl_switch=1,
        frames=5,
        height=64,
        width=64,
        compute_dtype="float32",
        vae_dtype="float32",
        eval_height=64,
        eval_width=96,
        eval_steps=4,
        eval_every=2,
        checkpoint_every=2,
    ),
    "mini": dict(  # the paper's recipe on a model that a laptop can train: a rehearsal that ends in a number
        model=MINI,
        group_size=16,
        batch_size=64,  # of all ranks together, see preset_config
        micro_batch=32,
        reward_weights="A",
        iterations=48,
        num_steps=10,
        learning_rate=5e-4,
        kl_schedule="fixed",
        kl_lambda=0.03,
        guidance_scale=3.0,
        frames=9,
        height=48,
        width=48,
        fps=8,
        prompts=BLOBS,
        eval_prompts=BLOBS,
        compute_dtype="float32",
        vae_dtype="float32",
        eval_height=48,
        eval_width=48,
        eval_steps=10,
        eval_every=12,
    ),
    "paper": PAPER,
    "release": PAPER | dict(  # what the released script runs, where that differs from the paper's text
        batch_size=2,
        optimizer="muon",
        weight_decay=0.01,
        adam_beta1=0.95,
        adam_beta2=0.95,
        kl_schedule="controller",
        anchor_offload=True,
    ),
    "fast": PAPER | SAVINGS | dict(eval_every=20),
    "small": PAPER | SAVINGS | dict(  # one GPU for one night; computed, not run
        lora_rank=64,
        learning_rate=1e-4,  # ten times that of full training, as on the miniature
        frames=33,
        batch_size=16,
        eval_every=50,
    ),
}  # fmt: skip
