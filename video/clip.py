"""CLIPScore and PickScore, for evaluation."""

from pathlib import Path

import torch

from video.json_file import read_json
from video.mp4 import check_videos

EXAMPLE = "openai/clip-vit-base-patch32"


def check_clip(setting, model):
    """Raise unless this is a CLIP model's folder, or can be a hub id."""
    from video.files import check_hub_id

    if not Path(model).is_dir():
        check_hub_id(setting, model, EXAMPLE)
        return
    path = Path(model) / "config.json"
    kind = read_json(path).get("model_type")
    if kind != "clip":
        raise ValueError(f'{path} must have "model_type": "clip": got {kind!r}; name a CLIP model for --{setting}')


class CLIPScore:
    """2.5·max(cos(frame, prompt), 0), mean over 8 frames, for evaluation.
    CLIP reads only the first 77 tokens of a prompt."""

    name = "CLIPScore"

    def __init__(self, folder, device="cpu"):
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).to(device)
        self.model.requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
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

    def score(self, cosine):
        return self.model.logit_scale.exp() * cosine / 26
