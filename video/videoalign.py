"""VideoAlign as a reward, CLIPScore and PickScore for evaluation, and the mp4 files that they are run on.

Each has the form of every reward in this project: see rewards.py. `python videoalign.py a.mp4 b.mp4 …` scores files.
"""

import argparse
import ast
import json
import math
import re
import shutil
from pathlib import Path

import torch

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
# A key of model.pth, as transformers 4.45 and PEFT wrote it: prefix, part of the model, layer, kind of tensor, leaf.
KEY = re.compile(
    r"base_model\.model\.(model|visual|[lr]m_head)(.*?)(\.base_layer|\.lora_[AB]\.default)?\.(weight|bias)"
)
# The kinds: a layer without LoRA has a plain tensor; a layer with LoRA has its base tensor and the pair A, B.
PLAIN, BASE, LORA_A, LORA_B = "", ".base_layer", ".lora_A.default", ".lora_B.default"
# Where the parts of the model are in transformers 5.
NEW_NAMES = {"model": "model.language_model", "visual": "model.visual", "lm_head": "lm_head", "rm_head": "rm_head"}


def exact_float32():
    """Float32 products and convolutions in float32: on GPUs PyTorch would take TF32 for convolutions, with 10 bits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


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
        settings, checkpoint = check_folder(Path(folder), repo)
        self.template = read_template(repo)
        self.sample_fps = settings["fps"]
        self.max_pixels = settings["max_frame_pixels"]
        self.mean = torch.tensor([settings[f"{name}_mean"] for name in DIMENSIONS])
        self.std = torch.tensor([settings[f"{name}_std"] for name in DIMENSIONS])
        self.tokenizer = load_tokenizer(checkpoint / "tokenizer")
        self.reward_ids = self.tokenizer.convert_tokens_to_ids(REWARD_TOKENS)
        self.video_id = self.tokenizer.convert_tokens_to_ids(CHAT_VIDEO)
        self.module = build_module(Path(folder), settings["output_dim"], self.video_id, self.device)
        state = read_state(checkpoint / "model.pth", "cpu")
        load_weights(self.module, state, settings["lora_r"], settings["lora_alpha"])
        self.module.requires_grad_(False).eval()
        settle_cos_and_sin()

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


def check_videos(videos, prompts):
    """Every reward model here takes the same arguments."""
    is_video = videos.dtype == torch.uint8 and videos.ndim == 5 and videos.shape[2] == 3
    if not is_video or len(videos) != len(prompts):
        got = f"{videos.dtype} {tuple(videos.shape)}"
        raise ValueError(f"{len(prompts)} prompts need uint8 videos [B,F,3,H,W]: got {got}")


def check_folder(folder, repo):
    """-> (settings, the checkpoint-<N> folder of the highest N).
    Raise unless all files fit together. No weight is loaded."""
    read_template(repo)
    settings, checkpoint = read_checkpoint(folder)
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    module = build_module(folder, settings["output_dim"], tokenizer.convert_tokens_to_ids(CHAT_VIDEO), "meta")
    known = module["model"].config.text_config.vocab_size
    if len(tokenizer) > known:
        rule = f"the tokenizer's ids must be among the {known:,} of the model"
        raise ValueError(f"{rule}: {checkpoint} has {len(tokenizer):,}; take both from one download")
    state = read_state(checkpoint / "model.pth", "meta")
    targets = module.state_dict()
    check_keys(*group_keys(state, targets), state, targets, settings["lora_r"])
    return settings, checkpoint


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
        raise FileNotFoundError(f"{folder} must be a download of KwaiVGI/VideoReward: there is no {', '.join(absent)}")
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


def read_json(path):
    """The object of a JSON file, with an error that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} must hold {path.name}: it is missing; download it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}; download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object: got {content!r:.60}; download it again")
    return content


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
    """Raise unless each token of the chat and of the rewards is one id.
    In pieces, no score would be read at its place."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        known = tokenizer.get_vocab()
        lacking = [token for token in REWARD_TOKENS + CHAT_TOKENS if tokenizer(token).input_ids != [known.get(token)]]
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


def check_clip(setting, model):
    """Raise unless this is a CLIP model's folder, or can be a hub id."""
    from hunyuan import check_hub_id

    if not Path(model).is_dir():
        check_hub_id(setting, model, CLIPScore.model_id)
        return
    path = Path(model) / "config.json"
    kind = read_json(path).get("model_type")
    if kind != "clip":
        raise ValueError(f'{path} must have "model_type": "clip": got {kind!r}; name a CLIP model for --{setting}')


def build_module(folder, output_dim, video_id, device):
    """{"model": Qwen2VLModel, "rm_head": Linear} in fp32, still undefined: drawing the weights would take minutes."""
    from transformers import Qwen2VLModel

    path = folder / "config.json"
    sizes = read_json(path) if path.is_file() else json.loads(QWEN2_VL_2B)
    try:
        config = read_model_config(sizes, video_id)
        with torch.device("meta"):
            model = Qwen2VLModel(config)
            head = torch.nn.Linear(config.text_config.hidden_size, output_dim, bias=False)
    except Exception as error:  # a wrong size can break a library in any way
        raise ValueError(f"{path} must describe a Qwen2-VL: {error!r}; remove it, or download it again") from error
    module = torch.nn.ModuleDict({"model": model, "rm_head": head}).to_empty(device=device)
    set_rotary_frequencies(module, device)
    check_buffers(module)
    return module


def read_model_config(sizes, video_id):
    """The Qwen2VLConfig of these sizes, with every part in fp32."""
    from transformers import Qwen2VLConfig

    if max(sizes["num_hidden_layers"], sizes["vision_config"]["depth"]) > 1000:
        raise ValueError("no Qwen2-VL has more than 1,000 layers")  # to build them would take for ever
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


def settle_cos_and_sin():
    """Call cos and sin on one number, so that the rotary embeddings are exact from the first batch on.

    On the CPU, PyTorch takes float32 cos and sin from oneMKL, which chooses a kernel at a function's first call. When
    two threads make that call together, one of them may run a kernel with errors of 1.5e-4, and the scores of the first
    batch are wrong by 3e-4 (seen with torch 2.13 and its oneMKL 2024.2). A call on one number runs in one thread.
    """
    number = torch.zeros(1)
    number.cos()
    number.sin()


def load_weights(module, state, rank, alpha):
    """Fill the module from model.pth, whose LoRA is unmerged.
    Every key must fit: a missing weight would silently produce wrong scores."""
    targets = module.state_dict()
    groups, unexpected = group_keys(state, targets)
    check_keys(groups, unexpected, state, targets, rank)
    for name, keys in groups.items():
        target = targets[name]
        tensors = {kind: state[key].to(target.device, torch.float32) for kind, key in keys.items()}
        target.copy_(merge_lora(tensors, alpha / rank))
        if not target.isfinite().all():
            raise ValueError(f"the weights of model.pth must be finite: {name} is not; download it again")


def parse_key(key):
    """A key of model.pth -> (name of the module's tensor that it fills, kind). Of another form: (None, None)."""
    match = KEY.fullmatch(key)
    if match is None:
        return None, None
    part, layer, kind, leaf = match.groups(default=PLAIN)
    return f"{NEW_NAMES[part]}{layer}.{leaf}", kind


def group_keys(state, targets):
    """-> ({name of a target: {kind: key}}, keys that belong to no target)."""
    groups = {}
    unexpected = []
    for key in state:
        name, kind = parse_key(key)
        if name in targets:
            groups.setdefault(name, {})[kind] = key
        elif name != "lm_head.weight":  # the language model's own head, which no score reads
            unexpected.append(key)
    return groups, unexpected


def check_keys(groups, unexpected, state, targets, rank):
    """ValueError with the first keys that are missing, unexpected, without their LoRA pair or of another shape."""
    unpaired = []
    misshaped = []
    for name, keys in groups.items():
        with_lora = {BASE} if name.endswith(".bias") else {BASE, LORA_A, LORA_B}
        if keys.keys() != {PLAIN} and keys.keys() != with_lora:
            unpaired.append(name)
        for kind, key in keys.items():
            shape = tuple(state[key].shape)
            expected = expected_shape(kind, tuple(targets[name].shape), rank)
            if shape != expected:
                misshaped.append(f"{key} {shape}, not {expected}")
    problems = {
        "missing": sorted(targets.keys() - groups.keys()),
        "unexpected": unexpected,
        "without a LoRA pair": unpaired,
        "of another shape": misshaped,
    }
    listed = []
    for problem, keys in problems.items():
        if keys:
            more = ", …" if len(keys) > 3 else ""
            listed.append(f"{len(keys)} {problem}: {', '.join(keys[:3])}{more}")
    if listed:
        rule = "the keys of model.pth must be exactly those of VideoAlign's model, as in a whole download"
        raise ValueError(f"{rule}: {'; '.join(listed)}")


def expected_shape(kind, shape, rank):
    """The shape of one tensor of a layer whose merged tensor has this shape."""
    if kind == LORA_A:
        return rank, shape[-1]
    if kind == LORA_B:
        return shape[0], rank
    return shape


def merge_lora(tensors, scale):
    """W + scale·B·A of {kind: fp32 tensor}. Computed in bf16, the dtype of the file, it would move scores by 0.028."""
    if PLAIN in tensors:
        return tensors[PLAIN]
    if LORA_A not in tensors:  # the bias of a layer with LoRA
        return tensors[BASE]
    return tensors[BASE] + scale * tensors[LORA_B] @ tensors[LORA_A]


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
        return [math.floor(side / scale / unit) * unit for side in sides]
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


class CLIPScore:
    """2.5·max(cos(frame, prompt), 0), mean over 8 frames, for evaluation.
    CLIP reads only the first 77 tokens of a prompt."""

    name = "CLIPScore"
    model_id = "openai/clip-vit-base-patch32"
    tokenizer_id = "openai/clip-vit-base-patch32"

    def __init__(self, folder=None, device="cpu"):
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.model = CLIPModel.from_pretrained(folder or self.model_id, dtype=torch.float32).to(device)
        self.model.requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder or self.tokenizer_id)
        side = self.model.config.vision_config.image_size
        self.image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
        )

    def score(self, cosine):
        return 2.5 * cosine.clamp(min=0)

    @torch.no_grad()
    def __call__(self, videos, prompts):
        check_videos(videos, prompts)
        text = self.embed_prompts(prompts)  # [B, D]
        indices = torch.linspace(0, videos.shape[1] - 1, 8).round().long()
        frames = videos[:, indices].flatten(0, 1)  # [B·8, C, H, W]
        images = self.embed_frames(frames).unflatten(0, (-1, 8))  # [B, 8, D]
        cosine = torch.nn.functional.cosine_similarity(images, text[:, None], dim=-1)  # [B, 8]
        return {self.name: self.score(cosine).mean(1).to(videos.device)}

    def embed_prompts(self, prompts):
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=77, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output

    def embed_frames(self, frames):
        pixels = self.image_processor(list(frames.cpu().numpy()), return_tensors="pt").pixel_values
        return self.model.get_image_features(pixel_values=pixels.to(self.model.device)).pooler_output


class PickScore(CLIPScore):
    """exp(logit_scale)·cos(frame, prompt) / 26, mean over 8 frames.
    The division by 26 brings it into the range of the paper's values, which lie near 0 … 1."""

    name = "PickScore"
    model_id = "yuvalkirstain/PickScore_v1"
    tokenizer_id = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def score(self, cosine):
        return self.model.logit_scale.exp() * cosine / 26


def read_video(path):
    """-> (uint8 [F, C, H, W], frames per second), by the ffmpeg inside the imageio-ffmpeg wheel."""
    import imageio.v2 as imageio

    with imageio.get_reader(path, format="FFMPEG") as reader:
        frames = [torch.from_numpy(frame) for frame in reader]
        fps = reader.get_meta_data()["fps"]
    return torch.stack(frames).permute(0, 3, 1, 2), fps


def write_video(path, video, fps):
    """uint8 [F, C, H, W] -> an mp4 that every player takes: H.264 in yuv420p, hence the even sides.
    Its frames are counted, because imageio ignores how ffmpeg ended: OSError where one is missing."""
    import imageio.v2 as imageio
    import imageio_ffmpeg

    is_rgb = video.dtype == torch.uint8 and video.ndim == 4 and video.shape[1] == 3
    if not is_rgb or video.shape[2] % 2 or video.shape[3] % 2:
        got = f"{video.dtype} {tuple(video.shape)}"
        raise ValueError(f"a video must be uint8 [F, 3, H, W] with even sides: got {got}")
    frames = video.permute(0, 2, 3, 1).cpu().numpy()
    Path(path).unlink(missing_ok=True)  # what is counted below must be new
    try:
        imageio.mimwrite(path, frames, format="FFMPEG", fps=fps, codec="libx264", quality=9, macro_block_size=1)
        found, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
        problem = f"{found} of {len(frames)} frames are in it" if found != len(frames) else ""
    except (OSError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
    if problem:
        free = shutil.disk_usage(Path(path).parent).free
        raise OSError(f"a video must be written whole: {path} is not ({problem}); {free:,} bytes are free on its disk")


def parse_arguments():
    """-> (the options, one prompt for each video)."""
    parser = argparse.ArgumentParser(description="Score mp4 files with VideoAlign: a table, and JSON with --json.")
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--prompts", required=True, help="text file: one line for each video, or one line for all")
    parser.add_argument("--videoalign", required=True, help="folder of the checkpoint, KwaiVGI/VideoReward")
    parser.add_argument("--videoalign_repo", required=True, help="clone of https://github.com/KwaiVGI/VideoAlign")
    parser.add_argument("--json", help="file to write the scores to")
    args = parser.parse_args()

    try:
        lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--prompts must be a text file in UTF-8: got {args.prompts}, {error}")
    try:
        check_folder(Path(args.videoalign), args.videoalign_repo)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    is_empty = [not line.strip() for line in lines]
    if len(lines) not in (1, len(args.videos)) or any(is_empty):
        allowed = f"1 or {len(args.videos)} (videos) lines"
        parser.error(f"--prompts must have {allowed}, none of them empty: got {len(lines)}")
    missing = [path for path in args.videos if not Path(path).is_file()]
    if missing:
        parser.error(f"every video must be a file: there is no {', '.join(missing)}")
    prompts = lines * len(args.videos) if len(lines) == 1 else lines
    return args, prompts


def score_file(videoalign, path, prompt):
    """-> {"video", "prompt", "scores": {"VQ", "MQ", "TA", "Overall"}, "failures"}."""
    video, fps = read_video(path)
    batch = videoalign(video[None], [prompt], fps=fps)
    scores = {name: values.item() for name, values in batch.items()}
    scores["Overall"] = sum(scores.values())
    return {"video": path, "prompt": prompt, "scores": scores, "failures": videoalign.failures}


def print_result(result):
    columns = [f"{score:9.4f}" for score in result["scores"].values()]
    print("".join(columns) + " ", result["video"], *result["failures"])


def write_results(path, results):
    """JSON has no NaN: a score that failed is null."""
    rows = []
    for result in results:
        scores = {name: score if math.isfinite(score) else None for name, score in result["scores"].items()}
        row = {"video": result["video"], "prompt": result["prompt"], **scores, "failures": result["failures"]}
        rows.append(row)
    Path(path).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def main():
    args, prompts = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    videoalign = VideoAlign(args.videoalign, args.videoalign_repo, device)
    print("       VQ       MQ       TA  Overall  video")
    results = []
    for path, prompt in zip(args.videos, prompts):
        result = score_file(videoalign, path, prompt)
        print_result(result)
        results.append(result)
    if args.json:
        write_results(args.json, results)


if __name__ == "__main__":
    main()
