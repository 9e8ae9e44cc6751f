"""Prompts as the transformer reads them: two text encoders that come and go, and a folder that keeps their output."""

import gc
import hashlib
import inspect
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import HunyuanVideo15Pipeline
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts
from safetensors import safe_open
from safetensors.torch import save

from video.files import COMPONENTS, ENCODE_TEXT, SYSTEM_TOKENS, chat_tokens, load_network, load_tokenizers

ENCODE_GLYPHS = HunyuanVideo15Pipeline._get_byt5_prompt_embeds
TEXT_TOKENS = inspect.signature(ENCODE_TEXT).parameters["tokenizer_max_length"].default  # 1,000 of Qwen2.5-VL
GLYPH_TOKENS = inspect.signature(ENCODE_GLYPHS).parameters["tokenizer_max_length"].default  # 256 of ByT5
LONGEST_TEXT = TEXT_TOKENS + GLYPH_TOKENS


class Prompt(NamedTuple):
    """The text condition of one sample, without padding, on the CPU."""

    text: torch.Tensor  # [L, 3584] Qwen2.5-VL, third hidden state from the end
    glyphs: torch.Tensor  # [G, 1472] ByT5 of the quoted parts of the prompt; G = 0 without quotes


class PromptEncoder:
    """list of texts -> list of Prompt. A folder keeps one file for each text.

    The encoders (Qwen2.5-VL 7B and ByT5) need as much memory as the transformer. They are loaded only when a text has
    no file yet, and freed afterwards.
    """

    def __init__(self, model, folder, device, dtype):
        self.model = model
        self.folder = Path(folder)
        self.device = device
        self.dtype = dtype
        self.version = encoders_version(model)

    def __call__(self, prompts):
        found = {prompt: self._read(prompt) for prompt in prompts}
        missing = [prompt for prompt, encoded in found.items() if encoded is None]
        if missing:
            found |= self._encode(missing)
        return [found[prompt] for prompt in prompts]

    def path(self, prompt):
        """The file of a text. Its name is a hash of all that the embeddings depend on: encoders, dtype and text."""
        key = repr((self.version, str(self.dtype), prompt))
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    @torch.no_grad()
    def _encode(self, prompts):
        """{prompt: Prompt}, each written to its file."""
        qwen, byt5 = load_tokenizers(self.model)
        check_prompts(prompts, qwen, byt5)
        text_encoder = load_network(self.model, "text_encoder", self.dtype).to(self.device)
        glyph_encoder = load_network(self.model, "text_encoder_2", self.dtype).to(self.device)
        # The stock functions add the system message, cut its 108 tokens off again, and search for quotes. They pad to
        # 1000 and 256 tokens. What their masks keep is all that the transformer would attend to.
        encoded = {}
        for prompt in prompts:
            text, text_mask = ENCODE_TEXT(text_encoder, qwen, [prompt], self.device)
            glyphs, glyph_mask = ENCODE_GLYPHS(byt5, glyph_encoder, [prompt], self.device)
            encoded[prompt] = Prompt(text[text_mask.bool()].cpu(), glyphs[glyph_mask.bool()].cpu())
            if not all(tensor.isfinite().all() for tensor in encoded[prompt]):
                rule = "the text encoders must give finite embeddings"
                raise ValueError(f"{rule}: those of {prompt!r} are not; the weights of {self.model} are damaged")
            self._write(prompt, encoded[prompt])
        del text_encoder, glyph_encoder
        gc.collect()  # modules hold reference cycles: without this the memory stays taken
        torch.cuda.empty_cache()  # does nothing without a GPU
        return encoded

    def _read(self, prompt):
        """What the file of a text holds. None where it is missing, damaged or another text's: it is encoded anew."""
        path = self.path(prompt)
        if not path.is_file():  # reading a pipe would wait for ever
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if metadata.get("checksum") == checksum(path, tensors):
                return Prompt(**tensors)
            problem = "its checksum is another"
        except Exception as error:  # a damaged file can break the reader in any way; it is written anew
            problem = repr(error)
        print(f"{path} is not what was written there ({problem}): its prompt is encoded anew", file=sys.stderr)
        return None

    def _write(self, prompt, encoded):
        """Write under a temporary name first: ranks may write the same file, and a killed run must not leave half."""
        path = self.path(prompt)
        tensors = {name: tensor.contiguous() for name, tensor in encoded._asdict().items()}
        content = save(tensors, metadata={"checksum": checksum(path, tensors)})
        temporary = self.folder / f"{uuid.uuid4().hex}.tmp"  # tempfile's would be for their owner alone
        self.folder.mkdir(parents=True, exist_ok=True)  # here, since it may be removed during a run
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder).free
            raise OSError(
                f"an encoded prompt could not be written to {self.folder}, which has {free:,} bytes free: "
                f"{len(content):,} are needed ({error}); make room, or choose another --prompt_cache"
            ) from error


def encoders_version(model):
    """What the embeddings depend on in a model: the id of a hub model; of a folder its path and the encoders' files.

    A file of weights counts by its size and time. All others, the tokenizers' among them, count by their contents.
    """
    files = sorted(path for path in Path(model).glob("t*/*") if path.parent.name in COMPONENTS[2:] and path.is_file())
    if not files:
        return str(model)
    version = [str(Path(model).resolve())]
    for file in files:
        state = file.stat()
        by_state = file.suffix == ".safetensors"
        content = (state.st_size, state.st_mtime_ns) if by_state else hashlib.sha256(file.read_bytes()).hexdigest()
        version.append((file.parent.name, file.name, content))
    return repr(version)


def checksum(path, tensors):
    """sha256 of the name of a cache file and of all that its tensors hold: a damaged or a renamed file has another."""
    total = hashlib.sha256(path.name.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def check_prompts(prompts, qwen, byt5):
    """Raise on a prompt of which the stock functions would cut off the end."""
    for prompt in prompts:
        length = len(prompt.encode())  # no text has more tokens than bytes
        if length > TEXT_TOKENS - 100:
            length = len(chat_tokens(qwen, prompt)) - SYSTEM_TOKENS
        rule = f"the text encoder reads {TEXT_TOKENS:,} tokens: a prompt, with the few that end it, must have no more"
        if length > TEXT_TOKENS:
            raise ValueError(f"{rule}: got {length:,} in {prompt[:60]!r}…; shorten it")
        quoted = extract_glyph_texts(prompt) or ""
        length = len(byt5(quoted).input_ids)
        if length > GLYPH_TOKENS:
            rule = f"ByT5 reads {GLYPH_TOKENS} bytes: a prompt's quotes must fit in, each with 9 bytes around it"
            raise ValueError(f"{rule}: got {length:,} in {prompt[:60]!r}…; quote less")
