"""VideoAlign as a reward, CLIPScore and PickScore for evaluation, and the mp4 files that they are run on.

Each follows the form of every reward: see rewards.py. `python videoalign.py a.mp4 b.mp4 …` scores files.
"""

import argparse
import ast
import json
import math
import re
from pathlib import Path

import torch

DIMENSIONS = ("VQ", "MQ", "TA")
REWARD_TOKENS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
# Qwen2-VL's chat around (video, text), with its default system message; the video is one pad token per merged patch.
CHAT_HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
CHAT_VIDEO, CHAT_MIDDLE, CHAT_TAIL = "<|video_pad|>", "<|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n"
PATCH, MERGE = 14, 2  # Qwen2-VL: a patch is 14 × 14 pixels of 2 frames; 2 × 2 patches are merged into a token
PIXEL_MEAN_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's and Qwen2-VL's
MIN_FRAME_PIXELS = 128 * 28 * 28  # 100,352; the upper bound is the checkpoint's max_frame_pixels
# Sizes of the base model, with three more tokens: the checkpoint has none. A config.json in its folder takes their place.
QWEN2_VL_2B = """{"vocab_size": 151660, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
"num_attention_heads": 12, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
"vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}}"""
# Settings of model_config.json that change what a score is, and the values of each that are implemented here.
IMPLEMENTED = {"sample_type": ["uniform"], "num_frames": [None], "prompt_template_type": ["detailed_special"]}
IMPLEMENTED |= {"use_special_tokens": [True], "reward_token": ["special"], "output_dim": [1, 3], "use_rslora": [False]}
# Keys of model.pth, written by transformers 4.45 under PEFT: a plain weight, or a wrapped one beside its LoRA pair.
KEY = re.compile(r"base_model\.model\.(model|visual|[lr]m_head)(.*?)(\.base_layer|\.lora_[AB]\.default)?\.(weight|bias)")


class VideoAlign:
    """The reward function of VideoAlign (KwaiVGI/VideoReward): frozen, in fp32, on the classes of transformers 5.

    folder: its checkpoint, with model_config.json and checkpoint-<N>/{model.pth, tokenizer/}.
    repo: a clone of its code, for the prompt template. fps: frame rate of the videos. failures: the cause of every NaN.
    """

    def __init__(self, folder, repo, device="cpu", batch_size=4, fps=24):
        from transformers import AutoTokenizer

        self.device, self.batch_size, self.fps, self.failures = torch.device(device), batch_size, fps, []
        self.template = read_template(repo)
        settings, checkpoint = read_checkpoint(Path(folder))
        self.sample_fps, self.max_pixels = settings["fps"], settings["max_frame_pixels"]
        self.mean, self.std = (torch.tensor([settings[f"{name}_{of}"] for name in DIMENSIONS]) for of in ("mean", "std"))
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer", local_files_only=True)
        if lacking := {*REWARD_TOKENS, CHAT_VIDEO} - self.tokenizer.get_vocab().keys():
            raise ValueError(f"{checkpoint / 'tokenizer'} must be VideoAlign's own tokenizer: it lacks {sorted(lacking)}")
        *self.reward_ids, self.video_id = self.tokenizer.convert_tokens_to_ids([*REWARD_TOKENS, CHAT_VIDEO])
        self.module = build_module(Path(folder), settings["output_dim"], self.video_id, self.device)
        state = torch.load(checkpoint / "model.pth", map_location="cpu", weights_only=True, mmap=True)
        load_weights(self.module, state, settings["lora_r"], settings["lora_alpha"])
        self.module.requires_grad_(False).eval()
        settle_cos_and_sin()

    def __call__(self, videos, prompts, fps=None):
        """Videos uint8 [B, F, C, H, W] and B prompts -> {"VQ": [B], "MQ": [B], "TA": [B]}, normalised, float32."""
        check_videos(videos, prompts)
        scores, self.failures = torch.full((len(prompts), 3), torch.nan), []  # [B, 3]
        for start in range(0, len(prompts), self.batch_size):
            samples = {}
            for i in range(start, min(start + self.batch_size, len(prompts))):
                try:
                    samples[i] = self.prepare(videos[i], prompts[i], fps or self.fps)
                except ValueError as error:  # this sample's own fault; any other error is the set-up's and stops the run
                    self.failures.append(f"sample {i}: {error}")
            if samples:
                logits = self.logits(list(samples.values())).cpu()
                scores[list(samples)] = logits.where(logits.isfinite().all(1, keepdim=True), torch.nan)
                self.failures += [f"sample {i}: its score is not finite" for i in samples if scores[i].isnan().any()]
        return dict(zip(DIMENSIONS, ((scores - self.mean) / self.std).to(videos.device).unbind(1)))

    def prepare(self, video, prompt, fps):
        """[F, C, H, W] -> (token ids [L], patches [N, 1176], grid [3]); ValueError where it cannot be scored."""
        frames = video[frame_indices(len(video), fps, self.sample_fps)].to(self.device)
        patches, grid = patchify(resize_frames(frames, self.max_pixels))
        tokens = len(patches) // MERGE**2
        text = CHAT_HEAD + CHAT_VIDEO * tokens + CHAT_MIDDLE + self.template.format(text_prompt=prompt) + CHAT_TAIL
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0].to(self.device)
        if [(ids == token).sum().item() for token in (*self.reward_ids, self.video_id)] != [1, 1, 1, tokens]:
            raise ValueError(f"a prompt must not contain {CHAT_VIDEO} or a reward token: got {prompt!r}")
        return ids, patches, grid

    @torch.no_grad()
    def logits(self, samples):
        """Raw scores [B, 3]: rm_head on the last hidden state at each of the three reward tokens."""
        ids, patches, grids = zip(*samples)
        # Padded on the right, where attention is causal: no token attends to the padding, so that no mask is needed.
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id)  # [B, L]
        # VideoAlign never had M-RoPE, whose positions would move scores by about 0.5: plain 1-D ones on all three axes.
        positions = torch.arange(ids.shape[1], device=self.device).expand(3, *ids.shape)  # [3, B, L]
        with torch.autocast(self.device.type, enabled=False):  # scoring in bf16 moves scores by up to 0.29
            seen = {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.stack(grids)}
            output = self.module["model"](ids, position_ids=positions, use_cache=False, **seen)
            where = torch.stack([(ids == token).int().argmax(1) for token in self.reward_ids], 1)[..., None]  # [B, 3, 1]
            out = self.module["rm_head"](output.last_hidden_state.take_along_dim(where, 1))  # [B, 3, output_dim]
        return out.squeeze(-1) if out.shape[-1] == 1 else out.diagonal(dim1=1, dim2=2)  # of three outputs, the token's own


def check_videos(videos, prompts):
    if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[2] != 3 or len(videos) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need uint8 videos [B,F,3,H,W]: got {videos.dtype} {tuple(videos.shape)}")


def read_template(repo):
    """The text put to the model. It must be byte-exact and is VideoAlign's: read (not run) from the user's clone of it."""
    path, name = Path(repo) / "prompt_template.py", "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run `git clone https://github.com/KwaiVGI/VideoAlign` and name that folder")
    lines = [line for line in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(line, ast.Assign)]
    template = "".join(ast.literal_eval(line.value) for line in lines if ast.unparse(line.targets[0]) == name)
    if lacking := [part for part in (*REWARD_TOKENS, "{text_prompt}") if template.count(part) != 1]:
        raise ValueError(f"{name} in {path} must contain each of {lacking} once, as KwaiVGI/VideoAlign's does")
    return template


def read_checkpoint(folder):
    """-> (settings of all sections of model_config.json, the checkpoint-<N> folder of the highest N)."""
    path = folder / "model_config.json"
    found = {int(model.parent.name.split("-")[1]): model.parent for model in folder.glob("checkpoint-[0-9]*/model.pth")}
    checkpoint = found[max(found)] if found else folder / "checkpoint-<N>"
    if absent := [str(part) for part in (path, checkpoint / "model.pth", checkpoint / "tokenizer") if not part.exists()]:
        raise FileNotFoundError(f"{folder} must be a download of KwaiVGI/VideoReward: there is no {', '.join(absent)}")
    sections = json.loads(path.read_text(encoding="utf-8"))
    settings = dict(item for of in ("data", "model", "peft_lora", "inference") for item in sections[f"{of}_config"].items())
    for key, values in IMPLEMENTED.items():
        if settings.get(key) not in values:
            raise ValueError(f"{key} must be one of {values}: {path} has {settings.get(key)!r}")
    return settings, checkpoint


def build_module(folder, output_dim, video_id, device):
    """{"model": Qwen2VLModel, "rm_head": Linear} in fp32, its weights still undefined (drawing them would take minutes)."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    path = folder / "config.json"
    config = Qwen2VLConfig(**json.loads(path.read_text(encoding="utf-8") if path.is_file() else QWEN2_VL_2B))
    config.video_token_id = video_id
    # Each sub-model is built in the dtype of its own config, and a config.json with torch_dtype sets it to bf16.
    config.dtype = config.text_config.dtype = config.vision_config.dtype = torch.float32
    with torch.device("meta"):
        head = torch.nn.Linear(config.text_config.hidden_size, output_dim, bias=False)
        module = torch.nn.ModuleDict({"model": Qwen2VLModel(config), "rm_head": head}).to_empty(device=device)
    for rope in [part for part in module.modules() if hasattr(part, "inv_freq")]:
        # The official code's .to(bfloat16) rounds the rotary frequencies too. Exact ones move scores by 0.013.
        rope.inv_freq = rope.original_inv_freq = type(rope)(rope.config).inv_freq.bfloat16().to(device, torch.float32)
    return module


def settle_cos_and_sin():
    """Call cos and sin on one number, so that the rotary embeddings are exact from the first batch on.

    On the CPU, PyTorch takes float32 cos and sin from oneMKL, which chooses a kernel at a function's first call. When two
    threads make that call together, one of them may run a kernel with errors of 1.5e-4 (seen with torch 2.13 and its oneMKL
    2024.2), and the scores of a process's first batch are wrong by 3e-4. A call on one number runs in a single thread.
    """
    number = torch.zeros(1)
    number.cos()
    number.sin()


def load_weights(module, state, rank, alpha):
    """Fill the module from model.pth, whose LoRA is unmerged. Every key must fit: a part left undefined still scores.
    W + alpha/rank·B·A is computed in fp32: in bf16, the dtype of the file, it would cost 0.028 of a score."""
    target, found, unexpected, misshaped = module.state_dict(), {}, [], []
    for key, tensor in state.items():
        match = KEY.fullmatch(key)
        top, path, kind, leaf = match.groups() if match else ("", "", None, "")
        name = {"model": "model.language_model", "visual": "model.visual"}.get(top, top) + f"{path}.{leaf}"
        if name in target:
            found.setdefault(name, {})[kind] = tensor
            shape = tuple(target[name].shape)
            shape = {".lora_A.default": (rank, shape[-1]), ".lora_B.default": (shape[0], rank)}.get(kind, shape)
            misshaped += [f"{key} {tuple(tensor.shape)}, not {shape}"] * (tuple(tensor.shape) != shape)
        elif name != "lm_head.weight":  # the language model's own head, which no score reads
            unexpected.append(key)
    wrapped = {"weight": {".base_layer", ".lora_A.default", ".lora_B.default"}, "bias": {".base_layer"}}
    unpaired = [name for name in found if found[name].keys() not in ({None}, wrapped[name.rpartition(".")[2]])]
    missing = sorted(target.keys() - found.keys())
    problems = {"missing": missing, "unexpected": unexpected, "without a LoRA pair": unpaired, "of another shape": misshaped}
    if listed := "; ".join(f"{len(keys)} {problem}: {', '.join(keys)}" for problem, keys in problems.items() if keys):
        raise ValueError(f"the keys of model.pth must be exactly those of VideoAlign's model: {listed}")
    for name, parts in found.items():
        parts = {kind: part.to(target[name].device, torch.float32) for kind, part in parts.items()}
        lora = alpha / rank * parts[".lora_B.default"] @ parts[".lora_A.default"] if len(parts) == 3 else 0
        target[name].copy_(parts.get(".base_layer", parts.get(None)) + lora)


def frame_indices(total, fps, sample_fps):
    """The frames that are looked at: sample_fps a second, within 4 … 768 and the video's, an even number, evenly spaced."""
    if total < 2:
        raise ValueError(f"a video must have at least 2 frames: got {total}")
    count = min(max(total / fps * sample_fps, 4), 768, total // 2 * 2)
    return torch.linspace(0, total - 1, round(count / 2) * 2).round().long()  # 81 frames at 24 fps: 6 of them


def resize_frames(frames, max_pixels):
    """uint8 [F, C, H, W] -> float [F, C, H', W'] at multiples of 28 near H and W, scaled into the range of pixels per frame.
    The values are whole numbers: the official code resizes uint8 tensors, which rounds."""
    (height, width), unit = frames.shape[-2:], PATCH * MERGE
    shape = [max(unit, round(side / unit) * unit) for side in (height, width)]
    if math.prod(shape) > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        shape = [math.floor(side / scale / unit) * unit for side in (height, width)]
    elif math.prod(shape) < MIN_FRAME_PIXELS:
        scale = math.sqrt(MIN_FRAME_PIXELS / (height * width))
        shape = [math.ceil(side * scale / unit) * unit for side in (height, width)]
    return torch.nn.functional.interpolate(frames.float(), shape, mode="bicubic", antialias=True).clamp(0, 255).round()


def patchify(frames):
    """0 … 255 [F, 3, H, W] -> normalised patches [N, 1176], those of one token next to each other, and their grid [3]."""
    mean, std = frames.new_tensor(PIXEL_MEAN_STD).view(2, 3, 1, 1)
    t, h, w = len(frames) // 2, frames.shape[2] // PATCH, frames.shape[3] // PATCH
    split = ((frames / 255 - mean) / std).view(t, 2, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    patches = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
    return patches, torch.tensor([t, h, w], device=frames.device)


class CLIPScore:
    """2.5·max(cos(frame, prompt), 0), mean over 8 frames, for evaluation. CLIP reads the first 77 tokens of a prompt."""

    name, model, tokenizer = "CLIPScore", "openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"

    def __init__(self, folder=None, device="cpu"):
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.model = CLIPModel.from_pretrained(folder or self.model, dtype=torch.float32).to(device).requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder or self.tokenizer)
        side = self.model.config.vision_config.image_size
        self.pixels = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def score(self, cosine):
        return 2.5 * cosine.clamp(min=0)

    @torch.no_grad()
    def __call__(self, videos, prompts):
        check_videos(videos, prompts)
        text = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=77, return_tensors="pt")
        text = self.model.get_text_features(**text.to(self.model.device)).pooler_output  # [B, D]
        frames = videos[:, torch.linspace(0, videos.shape[1] - 1, 8).round().long()].flatten(0, 1)  # [B·8, C, H, W]
        pixels = self.pixels(list(frames.cpu().numpy()), return_tensors="pt").pixel_values.to(self.model.device)
        image = self.model.get_image_features(pixel_values=pixels).pooler_output.unflatten(0, (-1, 8))  # [B, 8, D]
        cosine = torch.nn.functional.cosine_similarity(image, text[:, None], dim=-1)  # [B, 8]
        return {self.name: self.score(cosine).mean(1).to(videos.device)}


class PickScore(CLIPScore):
    """exp(logit_scale)·cos(frame, prompt) / 26, mean over 8 frames. The 26 brings it near 0 … 1, where the paper's lie."""

    name, model, tokenizer = "PickScore", "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def score(self, cosine):
        return self.model.logit_scale.exp() * cosine / 26


def read_video(path):
    """-> (uint8 [F, C, H, W], frames per second), by the ffmpeg inside the imageio-ffmpeg wheel."""
    import imageio.v2 as imageio

    with imageio.get_reader(path, format="FFMPEG") as reader:
        return torch.stack([torch.from_numpy(frame) for frame in reader]).permute(0, 3, 1, 2), reader.get_meta_data()["fps"]


def write_video(path, video, fps):
    """uint8 [F, C, H, W] -> an mp4 that every player takes: H.264 in yuv420p, hence the even sides."""
    import imageio.v2 as imageio

    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[1] != 3 or video.shape[2] % 2 or video.shape[3] % 2:
        raise ValueError(f"a video must be uint8 [F, 3, H, W] with even sides: got {video.dtype} {tuple(video.shape)}")
    settings = {"format": "FFMPEG", "fps": fps, "codec": "libx264", "quality": 9, "macro_block_size": 1}
    imageio.mimwrite(path, video.permute(0, 2, 3, 1).cpu().numpy(), **settings)


def main():
    parser = argparse.ArgumentParser(description="Score mp4 files with VideoAlign: a table, and JSON with --json.")
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--prompts", required=True, help="text file, a prompt a line: one for each video, or one for all")
    parser.add_argument("--videoalign", required=True, help="folder of the checkpoint, KwaiVGI/VideoReward")
    parser.add_argument("--videoalign_repo", required=True, help="clone of https://github.com/KwaiVGI/VideoAlign")
    parser.add_argument("--json", help="file to write the scores to")
    args = parser.parse_args()
    prompts = Path(args.prompts).read_text(encoding="utf-8").splitlines()
    if len(prompts) not in (1, len(args.videos)) or not all(prompt.strip() for prompt in prompts):
        parser.error(f"--prompts must have 1 or {len(args.videos)} (videos) lines, none of them empty: got {len(prompts)}")
    if missing := [path for path in args.videos if not Path(path).is_file()]:
        parser.error(f"every video must be a file: there is no {', '.join(missing)}")

    videoalign, rows = VideoAlign(args.videoalign, args.videoalign_repo, "cuda" if torch.cuda.is_available() else "cpu"), []
    print("       VQ       MQ       TA  Overall  video")
    for path, prompt in zip(args.videos, prompts * (len(args.videos) // len(prompts))):
        video, fps = read_video(path)
        scores = {name: score.item() for name, score in videoalign(video[None], [prompt], fps=fps).items()}
        scores["Overall"] = sum(scores.values())
        print("".join(f"{score:9.4f}" for score in scores.values()), "", path, *videoalign.failures)
        scores = {name: score if math.isfinite(score) else None for name, score in scores.items()}  # JSON has no NaN
        rows.append({"video": path, "prompt": prompt, **scores, "failures": videoalign.failures})
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
