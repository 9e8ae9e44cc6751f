"""VideoAlign as a reward: a Qwen2-VL that scores videos for pictures (VQ), motion (MQ) and what the prompt asks (TA).

It has the form of every reward in this project: see rewards.py. `check_folder` reads its files before a run, without
their weights. `python -m video.score` scores mp4 files with it.
"""

import ast
import json
import math
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from video.json_file import check_pointers, read_json
from video.mp4 import check_videos
from video.numerics import exact_float32, settle_vector_math

DIMENSIONS = ("VQ", "MQ", "TA")
REWARD_TOKENS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
# Qwen2-VL's chat around (video, text), with its default system message; the video is one pad token per merged patch.
CHAT_HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
CHAT_VIDEO = "<|video_pad|>"
CHAT_MIDDLE = "<|vision_end|>"
CHAT_TAIL = "<|im_end|>\n<|im_start|>assistant\n"
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", CHAT_VIDEO]
PATCH = 14  # Qwen2-VL: a patch is 14 × 14 pixels of 2 frames
MERGE = 2  # 2 × 2 patches are merged into a token
# Of CLIP and of Qwen2-VL, for red, green and blue.
PIXEL_MEAN = [0.48145466, 0.4578275, 0.40821073]
PIXEL_STD = [0.26862954, 0.26130258, 0.27577711]
MIN_FRAME_PIXELS = 128 * 28 * 28  # 100,352; the upper bound is the checkpoint's max_frame_pixels
# Sizes of the base model, with three more tokens, because the released checkpoint comes without sizes. A config.json in
# its folder takes the place of these.
QWEN2_VL_2B = """{"vocab_size": 151660, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
"num_attention_heads": 12, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
"vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}}"""
# Settings of model_config.json that change what a score is, and the values of each that are implemented here.
IMPLEMENTED = {
    "sample_type": ["uniform"],
    "num_frames": [None],
    "prompt_template_type": ["detailed_special"],
    "use_special_tokens": [True],
    "reward_token": ["special"],
    "output_dim": [1, 3],
    "use_rslora": [False],
}
# The numbers of model_config.json that are read, with their section and their bounds.
NUMBERS = {
    "fps": ("data_config", 1e-3, 1e3),
    "max_frame_pixels": ("data_config", PATCH * MERGE * PATCH * MERGE, 1e8),
    "lora_r": ("peft_lora_config", 1, 1e5),
    "lora_alpha": ("peft_lora_config", 1e-3, 1e6),
}
for _name in DIMENSIONS:
    NUMBERS[f"{_name}_mean"] = ("inference_config", -1e6, 1e6)
    NUMBERS[f"{_name}_std"] = ("inference_config", 1e-6, 1e6)
# Where the LoRA lies, and where transformers 5 keeps what transformers 4.45 named in model.pth.
LORA_TARGETS = r"model\.language_model\..*_proj"
NEW_NAMES = {
    "base_model.model.model.": "base_model.model.model.language_model.",
    "base_model.model.visual.": "base_model.model.model.visual.",
}


class VideoAlign:
    """The reward function of VideoAlign (KwaiVGI/VideoReward): frozen, in fp32, on the classes of transformers 5.

    folder: its checkpoint, with model_config.json and checkpoint-<N>/{model.pth, tokenizer/}.
    repo: a clone of its code, for the prompt template. fps: frame rate of the videos.
    failures: one line for each sample of the last call that got NaN, with the cause.
    """

    def __init__(self, folder, repo, device="cpu", batch_size=4, fps=24):
        exact_float32()
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.fps = fps
        self.failures = []
        self.template, settings, checkpoint, self.tokenizer, module = check_folder(Path(folder), repo)
        self.sample_fps = settings["fps"]
        self.max_pixels = settings["max_frame_pixels"]
        self.mean = torch.tensor([settings[f"{name}_mean"] for name in DIMENSIONS])
        self.std = torch.tensor([settings[f"{name}_std"] for name in DIMENSIONS])
        self.reward_ids = self.tokenizer.convert_tokens_to_ids(REWARD_TOKENS)
        self.video_id = self.tokenizer.convert_tokens_to_ids(CHAT_VIDEO)
        module = module.to_empty(device=self.device)
        set_rotary_frequencies(module, self.device)
        self.module = load_weights(module, read_state(checkpoint / "model.pth", "cpu"))
        self.module.requires_grad_(False).eval()
        settle_vector_math()

    def __call__(self, videos, prompts, fps=None):
        """Videos uint8 [B, F, C, H, W] and B prompts -> {"VQ": [B], "MQ": [B], "TA": [B]}, normalised, float32."""
        check_videos(videos, prompts)
        frame_rate = fps or self.fps
        self.failures = []
        scores = torch.full((len(prompts), 3), torch.nan)  # raw [B, 3]
        for start in range(0, len(prompts), self.batch_size):
            stop = min(start + self.batch_size, len(prompts))
            samples = self.prepare_batch(videos, prompts, range(start, stop), frame_rate)
            if samples:
                rows = list(samples)
                scores[rows] = self.finite_logits(samples)
        normalised = (scores - self.mean) / self.std
        return dict(zip(DIMENSIONS, normalised.to(videos.device).unbind(1)))

    def prepare_batch(self, videos, prompts, indices, fps):
        """-> {index: prepared sample} of those that can be scored; the cause for the others goes to failures."""
        samples = {}
        for i in indices:
            try:
                samples[i] = self.prepare(videos[i], prompts[i], fps)
            except ValueError as error:  # the fault of this sample; any other error is the set-up's and stops the run
                self.failures.append(f"sample {i}: {error}")
        return samples

    def finite_logits(self, samples):
        """{index: prepared sample} -> raw scores [B, 3]; all three of a sample are NaN if one of them is not finite."""
        logits = self.logits(list(samples.values())).cpu()
        finite = logits.isfinite().all(dim=1)  # one bool for each sample
        for i, is_finite in zip(samples, finite.tolist()):
            if not is_finite:
                self.failures.append(f"sample {i}: its score is not finite")
        return logits.where(finite[:, None], torch.nan)

    def prepare(self, video, prompt, fps):
        """[F, C, H, W] -> (token ids [L], patches [N, 1176], grid [3]); ValueError where it cannot be scored."""
        frames = video[frame_indices(len(video), fps, self.sample_fps)].to(self.device)
        patches, grid = patchify(resize_frames(frames, self.max_pixels))
        video_tokens = len(patches) // MERGE**2
        question = self.template.format(text_prompt=prompt)
        text = CHAT_HEAD + CHAT_VIDEO * video_tokens + CHAT_MIDDLE + question + CHAT_TAIL
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0].to(self.device)
        # A special token in the user's prompt would be read as one of ours: scores would be read at the wrong places.
        found_rewards = torch.isin(ids, torch.tensor(self.reward_ids, device=self.device)).sum().item()
        found_video = (ids == self.video_id).sum().item()
        if found_rewards != len(REWARD_TOKENS) or found_video != video_tokens:
            raise ValueError(f"a prompt must not contain {CHAT_VIDEO} or a reward token: got {prompt!r}")
        return ids, patches, grid

    @torch.no_grad()
    def logits(self, samples):
        """Raw scores [B, 3]: rm_head on the last hidden state at each of the three reward tokens."""
        ids, patches, grids = zip(*samples)
        # Padded on the right, where attention is causal: no token attends to the padding, so no mask is needed.
        padding = self.tokenizer.pad_token_id
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding)  # [B, L]
        # VideoAlign uses plain 1-D positions on all three axes. M-RoPE's, the default, would move scores by about 0.5.
        positions = torch.arange(padded.shape[1], device=self.device).expand(3, *padded.shape)  # [3, B, L]
        places = [(padded == token).int().argmax(dim=1) for token in self.reward_ids]  # three of [B]
        where = torch.stack(places, dim=1)[..., None]  # [B, 3, 1]
        with torch.autocast(self.device.type, enabled=False):  # scoring in bf16 moves scores by up to 0.29
            output = self.module["model"](
                padded,
                position_ids=positions,
                use_cache=False,
                pixel_values_videos=torch.cat(patches),
                video_grid_thw=torch.stack(grids),
            )
            hidden = output.last_hidden_state.take_along_dim(where, dim=1)  # [B, 3, D]
            outputs = self.module["rm_head"](hidden)  # [B, 3, output_dim]
        if outputs.shape[-1] == 1:
            return outputs.squeeze(-1)
        return outputs.diagonal(dim1=1, dim2=2)  # of three outputs, the one that belongs to the token


def check_folder(folder, repo):
    """-> (template, settings, the checkpoint-<N> folder of the highest N, tokenizer, module without weights).
    Raise unless all files fit together."""
    template = read_template(repo)
    settings, checkpoint = read_checkpoint(folder)
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    module = build_module(folder, settings, tokenizer.convert_tokens_to_ids(CHAT_VIDEO))
    known = module.base_model.model["model"].config.text_config.vocab_size
    if len(tokenizer) > known:
        rule = f"the tokenizer's ids must be among the {known:,} of the model"
        raise ValueError(f"{rule}: {checkpoint} has {len(tokenizer):,}; take both from one download")
    fill(module, read_state(checkpoint / "model.pth", "meta"))
    return template, settings, checkpoint, tokenizer, module


def read_template(repo):
    """The text put to the model. It must be byte-exact and is VideoAlign's own, so it is read from the user's clone.
    The file is parsed and not run."""
    path = Path(repo) / "prompt_template.py"
    name = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
    clone = "git clone https://github.com/KwaiVGI/VideoAlign"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run `{clone}` and name that folder")
    template = ""
    try:
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
                template = ast.literal_eval(statement.value)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: brackets, nested deeply
        raise ValueError(f"{path} must be Python with {name} as a plain string: {error}; run `{clone}` again") from None
    lacking = [part for part in (*REWARD_TOKENS, "{text_prompt}") if str(template).count(part) != 1]
    if lacking:
        raise ValueError(f"{name} in {path} must contain each of {lacking} once, as KwaiVGI/VideoAlign's does")
    try:
        template.format(text_prompt="")
    except (AttributeError, LookupError, ValueError) as error:
        rule = f"{name} in {path} must have no field but {{text_prompt}}"
        raise ValueError(f"{rule}: {error!r}; run `{clone}` again") from None
    return template


def read_checkpoint(folder):
    """-> (settings of all sections of model_config.json, the checkpoint-<N> folder of the highest N)."""
    settings_file = folder / "model_config.json"
    checkpoint = newest_checkpoint(folder)
    needed = [settings_file, checkpoint / "model.pth", checkpoint / "tokenizer"]
    absent = [str(path) for path in needed if not path.exists()]
    if absent:
        rule = f"{folder} must be a download of KwaiVGI/VideoReward"
        if (folder / "model.pth").exists():
            raise FileNotFoundError(f"{rule}: it is one of its checkpoints; name the folder above, {folder.parent}")
        raise FileNotFoundError(f"{rule}: there is no {', '.join(absent)}")
    check_pointers(folder)
    settings = read_settings(settings_file)
    return settings, checkpoint


def newest_checkpoint(folder):
    """The checkpoint-<N> of the highest N among those with a model.pth. Without any: a path that does not exist."""
    by_step = {}
    for weights in folder.glob("checkpoint-*/model.pth"):
        step = weights.parent.name.removeprefix("checkpoint-")
        if step.isdecimal():
            by_step[int(step)] = weights.parent
    if not by_step:
        return folder / "checkpoint-<N>"
    return by_step[max(by_step)]


def read_settings(path):
    """All sections of model_config.json that a score depends on, in one dict."""
    sections = read_json(path)
    settings = {}
    for section in ("data_config", "model_config", "peft_lora_config", "inference_config"):
        if not isinstance(sections.get(section), dict):
            got = repr(sections.get(section))[:60]
            raise ValueError(f"{path} must have an object {section}: got {got}; download it again")
        settings.update(sections[section])
    for key, values in IMPLEMENTED.items():
        value = settings.get(key)
        if value not in values or type(value) not in [type(known) for known in values]:
            rule = f"{key} must be one of {values}"
            raise ValueError(f"{rule}: {path} has {value!r}; only VideoAlign's release is supported")
    for key, (section, low, high) in NUMBERS.items():
        value = sections[section].get(key)
        if type(value) not in (int, float) or not low <= value <= high:
            rule = f"{key} must lie in [{low:g}, {high:g}]"
            raise ValueError(f"{rule}: {path} has {value!r} in {section}; download it again")
    if type(settings["lora_r"]) is not int:
        raise ValueError(f"lora_r must be a whole number: {path} has {settings['lora_r']!r}; download it again")
    return settings


def load_tokenizer(folder):
    """Raise unless each token of the chat and of the rewards is one id, and a prompt's words have ids.
    In pieces, no score would be read at its place. Without its vocabulary a tokenizer leaves words out, silently."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        known = tokenizer.get_vocab()
        lacking = [token for token in REWARD_TOKENS + CHAT_TOKENS if tokenizer(token).input_ids != [known.get(token)]]
        if tokenizer.decode(tokenizer("some words").input_ids) != "some words":
            lacking.append("the words of a prompt")
    except Exception as error:  # files from outside can break a library in any way
        rule = f"{folder} must be a tokenizer that can be loaded"
        raise ValueError(f"{rule}: {str(error)[:200]}; download it again") from error
    if lacking or tokenizer.pad_token_id is None:
        rule = f"{folder} must be VideoAlign's own tokenizer, with a pad token"
        raise ValueError(f"{rule}: it lacks {lacking or 'that'}; download it again")
    return tokenizer


def read_state(path, device):
    """{key: tensor} of model.pth. On meta, only names and shapes are read. No code of the file is ever run."""
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except Exception as error:  # torch's own message would advise to allow code
        rule = f"{path} must hold nothing but tensors, as torch.save writes them"
        raise ValueError(f"{rule}: it is damaged or holds more ({type(error).__name__}); download it again") from error
    values = list(state.values()) if isinstance(state, dict) else [None]
    if not all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values):
        raise ValueError(f"{path} must hold a dict of names and floating-point tensors: got another; download it again")
    return state


def build_module(folder, settings, video_id):
    """{"model": Qwen2VLModel, "rm_head": Linear} under PEFT's LoRA, in fp32, on meta: drawing weights takes minutes."""
    path = folder / "config.json"
    sizes = read_json(path) if path.is_file() else json.loads(QWEN2_VL_2B)
    lora = LoraConfig(r=settings["lora_r"], lora_alpha=settings["lora_alpha"], target_modules=LORA_TARGETS)
    try:
        config = read_model_config(sizes, video_id)
        with torch.device("meta"):
            model = Qwen2VLModel(config)
            head = torch.nn.Linear(config.text_config.hidden_size, settings["output_dim"], bias=False)
            module = torch.nn.ModuleDict({"model": model, "rm_head": head})
            adapted = get_peft_model(module, lora, low_cpu_mem_usage=True)  # or it would draw the LoRA on the CPU
    except Exception as error:  # a wrong size can break a library in any way
        raise ValueError(f"{path} must describe a Qwen2-VL: {error!r}; remove it, or download it again") from error
    check_buffers(module)
    return adapted


def read_model_config(sizes, video_id):
    """The Qwen2VLConfig of these sizes, with every part in fp32."""
    config = Qwen2VLConfig(**sizes)
    config.video_token_id = video_id
    # Each sub-model is built in the dtype of its own config, and a config.json with torch_dtype sets it to bf16.
    config.dtype = torch.float32
    config.text_config.dtype = torch.float32
    config.vision_config.dtype = torch.float32
    return config


def set_rotary_frequencies(module, device):
    """No checkpoint contains the frequencies. The official code's .to(bfloat16) rounds them together with the weights:
    exact ones would move scores by 0.013."""
    ropes = [part for part in module.modules() if hasattr(part, "inv_freq")]
    for rope in ropes:
        exact = type(rope)(rope.config).inv_freq
        rounded = exact.bfloat16().to(device, torch.float32)
        rope.inv_freq = rounded
        rope.original_inv_freq = rounded


def check_buffers(module):
    """A buffer outside the state dict is filled by no checkpoint. If another version of transformers has one that we do
    not know, it would stay undefined and silently produce wrong scores."""
    saved = module.state_dict().keys()
    names = [name for name, _ in module.named_buffers()]
    undefined = [name for name in names if name not in saved and not name.endswith("inv_freq")]
    if undefined:
        raise RuntimeError(f"Qwen2-VL must have no buffers but its rotary frequencies: transformers adds {undefined}")


def load_weights(module, state):
    """Fill the module from model.pth, and merge the LoRA into it. Computed in bf16, the dtype of the file, the merge
    would move scores by 0.028."""
    fill(module, state)
    merged = module.merge_and_unload()
    for name, tensor in merged.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"the weights of model.pth must be finite: {name} is not; download it again")
    return merged


def fill(module, state):
    """Every key must fit: a missing weight would silently produce wrong scores."""
    renamed = {}
    for key, tensor in state.items():
        old = next((prefix for prefix in NEW_NAMES if key.startswith(prefix)), "")
        renamed[NEW_NAMES.get(old, "") + key.removeprefix(old)] = tensor
    renamed.pop("base_model.model.lm_head.weight", None)  # the language model's own head, which no score reads
    try:
        module.load_state_dict(renamed)
    except RuntimeError as error:
        rule = "the keys of model.pth must be exactly those of VideoAlign's model, as in a whole download"
        raise ValueError(f"{rule}: {str(error)[:400]}") from None


def frame_indices(total, fps, sample_fps):
    """The indices of the frames that are scored: sample_fps a second, an even number of them, evenly spaced.
    There are at least 4 and at most 768, and never more than the video has."""
    if total < 2:
        raise ValueError(f"a video must have at least 2 frames: got {total}")
    wanted = max(total / fps * sample_fps, 4)
    most = min(768, total // 2 * 2)
    count = round(min(wanted, most) / 2) * 2  # 81 frames at 24 fps: 6 of them
    return torch.linspace(0, total - 1, count).round().long()


def resize_frames(frames, max_pixels):
    """uint8 [F, C, H, W] -> float [F, C, H', W'], of the size that resized_shape gives.
    The values are whole numbers: the official code resizes uint8 tensors, which rounds."""
    shape = resized_shape(*frames.shape[-2:], max_pixels)
    resized = torch.nn.functional.interpolate(frames.float(), shape, mode="bicubic", antialias=True)
    return resized.clamp(0, 255).round()


def resized_shape(height, width, max_pixels):
    """[H', W']: the multiples of 28 nearest to H and W, scaled where a frame has not MIN_FRAME_PIXELS … max_pixels."""
    unit = PATCH * MERGE
    sides = (height, width)
    nearest = [max(unit, round(side / unit) * unit) for side in sides]
    if math.prod(nearest) > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        reduced = [math.floor(side / scale / unit) * unit for side in sides]
        if 0 in reduced:
            rule = f"within {max_pixels:,} pixels, each side of a frame must keep {unit}"
            raise ValueError(f"{rule}: {height} × {width} is too narrow; crop it")
        return reduced
    if math.prod(nearest) < MIN_FRAME_PIXELS:
        scale = math.sqrt(MIN_FRAME_PIXELS / (height * width))
        return [math.ceil(side * scale / unit) * unit for side in sides]
    return nearest


def patchify(frames):
    """0 … 255 [F, 3, H, W] -> (normalised patches [N, 1176], grid [3] of their numbers in time, height and width).
    The four patches of one token stand next to each other."""
    mean = frames.new_tensor(PIXEL_MEAN).view(3, 1, 1)
    std = frames.new_tensor(PIXEL_STD).view(3, 1, 1)
    normalised = (frames / 255 - mean) / std
    t = frames.shape[0] // 2
    h = frames.shape[2] // PATCH
    w = frames.shape[3] // PATCH
    split = normalised.view(t, 2, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    patches = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
    return patches, torch.tensor([t, h, w], device=frames.device)
