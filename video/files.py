"""The files of HunyuanVideo-1.5: where they are, what is checked of them before a weight is loaded, loading, export.

model_folder        the folder of a hub id: its small files are checked before the large ones are fetched
check_model_words   what the folder says of itself (guidance, shift) against the settings of a run
check_model         whether its parts fit together and its tensors are all there
load_network, load_shards, load_tokenizers   read them
export              writes what stock diffusers loads
"""

import functools
import inspect
import json
import math
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import format_text_input
from huggingface_hub import snapshot_download
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import ByT5Tokenizer, Qwen2_5_VLTextModel, Qwen2Tokenizer, T5EncoderModel

from video.json_file import check_pointers, read_json
from video.parallel import own_rank

# The networks of a model, each with the name of its file of weights.
NETWORKS = {
    "transformer": (HunyuanVideo15Transformer3DModel, "diffusion_pytorch_model"),
    "vae": (AutoencoderKLHunyuanVideo15, "diffusion_pytorch_model"),
    "text_encoder": (Qwen2_5_VLTextModel, "model"),
    "text_encoder_2": (T5EncoderModel, "model"),
}
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")  # a quantised weight would be taken for a plain one
RELEASE = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"
COMPONENTS = ("transformer", "vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
# The VAE makes one latent of 32 channels from 4 frames × 16 × 16 pixels; the first frame has a latent of its own.
CHANNELS, TIME, SPACE = 32, 4, 16
# The stock functions that encode a prompt, and what they take for granted.
ENCODE_TEXT = HunyuanVideo15Pipeline._get_mllm_prompt_embeds
SYSTEM_MESSAGE = inspect.signature(ENCODE_TEXT).parameters["system_message"].default
SYSTEM_TOKENS = inspect.signature(ENCODE_TEXT).parameters["crop_start"].default  # 108, cut off without looking
# What a run samples with, too: classifier-free guidance of both branches in all steps, a schedule with a fixed shift.
GUIDER, SCHEDULER = "guider/guider_config.json", "scheduler/scheduler_config.json"
SAMPLING = {
    "model_index.json": {"_class_name": "HunyuanVideo15Pipeline"},
    GUIDER: {
        "_class_name": "ClassifierFreeGuidance",
        "guidance_rescale": 0.0,
        "use_original_formulation": False,
        "start": 0.0,
        "stop": 1.0,
    },
    SCHEDULER: {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": False},
}
# What this file relies on in the configs. Where a config is silent, the default of its class counts.
REQUIRED = {
    "transformer": {
        "in_channels": 2 * CHANNELS + 1,
        "out_channels": CHANNELS,
        "patch_size": 1,
        "patch_size_t": 1,
        "use_meanflow": False,  # a distilled model reads a second timestep
    },
    "vae": {"latent_channels": CHANNELS, "spatial_compression_ratio": SPACE, "temporal_compression_ratio": TIME},
    "text_encoder": {},
    "text_encoder_2": {},
}


def chat_tokens(qwen, prompt):
    """The ids of a prompt in its chat, as the stock function makes them, without padding and uncut."""
    (chat,) = format_text_input([prompt], SYSTEM_MESSAGE)
    return qwen.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True).input_ids


# ------------------------------------------------------------------------------------------------ where the files are
def model_folder(model):
    """The folder of a model. That of a hub id lies in the hub's cache, where the weights come after all checks."""
    folder = small_files(model)
    if not is_folder(model):
        check_small_files(folder)
        for name, (_, stem) in NETWORKS.items():
            fetch(model, [f"{name}/{file}" for file in weight_files(folder / name, stem)], revision=folder.name)
    return folder


def is_folder(model):
    return bool(str(model)) and Path(model).is_dir()  # "" would be the current folder


@functools.cache  # one revision for a whole run, though the hub may get a new one meanwhile
def small_files(model):
    """The folder of a model in which there may be no weights yet."""
    if is_folder(model):
        return Path(model)
    check_hub_id("model", model, RELEASE)  # or a mistyped path would be looked for on the hub
    return fetch(model, ["*.json", "*.jinja", "*.txt"])


def fetch(model, patterns, revision=None):
    """The folder of a hub id, with all files of these patterns."""
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, revision=revision))
    except Exception as error:  # the network, the hub, a disk
        fix = f"check spelling and network; without one, `hf download {model}` must have filled the cache"
        raise OSError(f"{str(model)!r} cannot be fetched from the hub: {error}; {fix}") from error


def check_hub_id(setting, model, example):
    beside_others = len(Path(model).parts) > 1 and Path(model).parent.is_dir()  # a folder that is not there yet
    if beside_others or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(model)):
        rule = f"the {setting} must be an existing folder or a hub id like {example}"
        raise FileNotFoundError(f"{rule}: got {str(model)!r}")


# ------------------------------------------------------------------------------------------------ checks
def model_words(folder):
    """{"guidance_scale", "shift"} that a model's own folder samples with; ValueError if it is another kind of model."""
    said = {}
    for file, expected in SAMPLING.items():
        said[file] = read_json(folder / file)
        if file == "model_index.json" and said[file].get("_class_name") == "HunyuanVideo15ImageToVideoPipeline":
            raise ValueError(f"the model must be text-to-video: {folder} is image-to-video; take {RELEASE}")
        got = {key: said[file].get(key) for key in expected}
        if got != expected:
            raise ValueError(f"{folder / file} must have {expected}: got {got}; only such a model is supported")
    words = {"guidance_scale": said[GUIDER].get("guidance_scale"), "shift": said[SCHEDULER].get("shift")}
    if said[GUIDER].get("enabled") is False:
        words["guidance_scale"] = 1.0
    for name, value in words.items():
        if type(value) not in (int, float):
            raise ValueError(f"{folder} must say its {name} as a number: got {value!r}; download it again")
    return words


def check_model_words(model, guidance_scale, shift, given):
    """Raise where a run would not sample as the model is made to: trained at another guidance or shift, it is lost.

    given: names of the settings that somebody chose for this run. These win; a default or a preset's setting does not.
    """
    folder = small_files(model)
    files = {"guidance_scale": GUIDER, "shift": SCHEDULER}
    of_run = {"guidance_scale": guidance_scale, "shift": shift}
    told, options = [], []
    for name, value in model_words(folder).items():
        if name not in given and value != of_run[name]:
            told.append(f"{name} {value:g} ({files[name]}) where the run has {of_run[name]:g}")
            options.append(f"--{name} {value:g}")
    if told:
        raise ValueError(
            f"the run must sample as its model does: {model} has {', '.join(told)}; add {' '.join(options)}, or state "
            "the run's own numbers as options to keep them"
        )


def check_model(model):
    """Raise unless the model is a folder whose contents fit together, or can be a hub id. No weight is loaded.

    Returns the tokenizers of a folder, for check_prompts. The contents of a hub id are checked by model_folder: None.
    """
    if not is_folder(model):
        check_hub_id("model", model, RELEASE)
        return None
    networks, tokenizers = check_small_files(Path(model))
    for name, network in networks.items():
        folder = Path(model) / name
        compare_tensors(folder, network, stored_tensors(folder, NETWORKS[name][1]))
    return tokenizers


def check_small_files(folder):
    """({name: network on meta}, tokenizers) of a folder. Raise unless they fit together; no weights are looked at."""
    if list(folder.glob("transformer/*/config.json")):
        raise ValueError(f"{folder} must have the layout of diffusers, not of Tencent's own code; take {RELEASE}")
    missing = [name for name in COMPONENTS if not (folder / name).is_dir()]
    if missing:
        fix = "write it with HunyuanVideo15Pipeline.save_pretrained, or download the whole release"
        raise FileNotFoundError(f"{folder} must hold {', '.join(COMPONENTS)}: no {', '.join(missing)}; {fix}")
    check_pointers(folder)
    model_words(folder)
    networks = {name: meta_network(folder, name) for name in NETWORKS}
    configs = {name: network.config for name, network in networks.items()}
    check_fit(folder, configs)
    for name in ("tokenizer", "tokenizer_2"):  # an empty folder would give the default of its class
        read_json(folder / name / "tokenizer_config.json")
    qwen, byt5 = load_tokenizers(folder)
    known = configs["text_encoder"].vocab_size
    if len(qwen) > known:
        rule = f"the tokenizer's ids must be among the {known:,} of the text encoder"
        raise ValueError(f"{rule}: {folder} has {len(qwen):,}; take both from one release")
    known = configs["text_encoder_2"].vocab_size
    if len(byt5) != known:  # plain ByT5 has 384 ids; the release adds those of colours and fonts
        rule = f"tokenizer_2 must have the {known:,} ids of text_encoder_2"
        raise ValueError(f"{rule}: {folder} has {len(byt5):,}; take both from one release")
    return networks, (qwen, byt5)


def meta_network(folder, name):
    """One network as its config.json describes it, without memory. Raise unless it is of the supported kind."""
    cls, _ = NETWORKS[name]
    path = folder / name / "config.json"
    settings = read_json(path)
    of_transformers = hasattr(cls, "config_class")
    key, kind = ("model_type", cls.config_class.model_type) if of_transformers else ("_class_name", cls.__name__)
    if settings.get(key) != kind:
        fix = "download it again"
        if (name, settings.get(key)) == ("text_encoder", "qwen2_5_vl"):
            fix = "this is the whole vision-language model: load it, and save its language_model there"
        raise ValueError(f'{path} must have "{key}": "{kind}": got {settings.get(key)!r}; {fix}')
    try:
        with torch.device("meta"):
            network = cls(cls.config_class.from_dict(settings)) if of_transformers else cls.from_config(settings)
    except Exception as error:  # a wrong setting can break a library in any way
        raise ValueError(f"{path} must describe a {cls.__name__}: {error!r}; download it again") from error
    got = {key: getattr(network.config, key) for key in REQUIRED[name]}
    if got != REQUIRED[name]:
        raise ValueError(f"{path} must have {REQUIRED[name]}: got {got}; only this text-to-video model is supported")
    return network


def weight_files(folder, stem):
    """The names of a network's safetensors files: those of its index, or the one file."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [f"{stem}.safetensors"]
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        rule = f'{index} must have a "weight_map" of tensors and files'
        raise ValueError(f"{rule}: got {listed!r:.60}; download it again")
    return sorted({Path(file).name for file in listed.values()})  # no file outside of the folder


def stored_tensors(folder, stem):
    """{name: (shape, dtype, file)}, from the headers of a network's safetensors files; they also tell a cut file."""
    stored = {}
    for file in weight_files(folder, stem):
        path = folder / file
        if not path.is_file():
            kinds = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
            others = sorted(other.name for other in folder.iterdir() if other.suffix in kinds)
            fix = "download it again"
            if others:
                fix = f"{', '.join(others[:4])} cannot take its place: download the files without a variant's name"
            raise FileNotFoundError(f"{folder} must hold {path.name}: it is missing; {fix}")
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():
                    tensor = tensors.get_slice(name)
                    stored[name] = tuple(tensor.get_shape()), tensor.get_dtype(), path
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} must be a whole safetensors file: {error}; download it again") from error
    return stored


def compare_tensors(folder, network, stored):
    """Raise unless the stored tensors are those of the network, in shape and kind."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    absent = expected.keys() - stored.keys()
    for one, other in (getattr(network, "_tied_weights_keys", None) or {}).items():  # two names, and one of them stored
        if one in stored or other in stored:
            absent -= {one, other}
    ignored = [*(getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()), r"inv_freq$"]
    foreign = [name for name in stored.keys() - expected.keys() if not any(re.search(rule, name) for rule in ignored)]
    shared = expected.keys() & stored.keys()
    check_tensors(folder, {
        "missing": absent,
        "unexpected": foreign,
        "of another shape": [f"{name} {stored[name][0]}" for name in shared if stored[name][0] != expected[name]],
        "of another type": [f"{name} {stored[name][1]}" for name in shared if stored[name][1] not in WEIGHT_TYPES],
    })  # fmt: skip


def check_tensors(where, problems):
    """Raise if any of the problems has a tensor: {problem: names}. The message names three of each."""
    told = []
    for problem, names in problems.items():
        if names:
            first = sorted(str(name) for name in names)[:3]
            told.append(f"{len(names)} {problem} ({', '.join(first)}{', …' if len(names) > 3 else ''})")
    if told:
        rule = f"{where} must hold exactly the tensors of its config.json"
        raise ValueError(f"{rule}: {'; '.join(told)}; download it again")


def check_fit(model, configs):
    """Raise unless the text encoders' outputs are what the transformer reads."""
    transformer, text, glyphs = configs["transformer"], configs["text_encoder"], configs["text_encoder_2"]
    widths = (text.hidden_size, glyphs.d_model)
    if widths != (transformer.text_embed_dim, transformer.text_embed_2_dim):
        expected = (transformer.text_embed_dim, transformer.text_embed_2_dim)
        rule = f"the text encoders must have the widths {expected} that the transformer reads"
        raise ValueError(f"{rule}: those of {model} have {widths}; take all parts from one release")
    if text.num_hidden_layers < 2:  # the third hidden state from the end is read
        raise ValueError(f"the text encoder must have at least 2 layers: that of {model} has {text.num_hidden_layers}")
    scale = configs["vae"].scaling_factor
    if not isinstance(scale, float) or not 0 < scale < math.inf:
        rule = f"the scaling_factor of {model}/vae must be positive"
        raise ValueError(f"{rule}: got {scale!r}; download its config.json again")


# ------------------------------------------------------------------------------------------------ loading
def load_network(model, name, dtype):
    """One of NETWORKS. A tensor that the files lack would be drawn at random, with no more than a warning."""
    network, info = load_component(
        NETWORKS[name][0], model, name, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    check_tensors(f"{name} of {model}", {"missing": info["missing_keys"], "of another shape": info["mismatched_keys"]})
    return network


@torch.no_grad()
def load_shards(transformer, model):
    """Give each rank its part of a sharded transformer's weights, tensor by tensor.

    If every rank read the model before it is sharded, eight of them would fill 8 × 33 GB of one machine's memory.
    """
    first = own_rank() == 0
    read = weight_reader(model) if first else None
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            continue
        if first:
            stored = read(name.replace(".base_layer", ""))  # PEFT's name for a map with an adapter
            whole = stored.to(parameter.device, parameter.dtype)
        else:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        write_weight(parameter, whole, source=0)


def weight_reader(model):
    """A function name -> tensor of the transformer's weights."""
    stored = stored_tensors(Path(model) / "transformer", NETWORKS["transformer"][1])

    def read(name):
        _, _, path = stored[name]
        with safe_open(path, framework="pt") as tensors:
            return tensors.get_tensor(name)

    return read


def write_weight(parameter, whole, source):
    """Write a tensor into a parameter, or this rank's part of it: of rank `source`'s tensor, or of its own (None)."""
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=source)
    parameter.copy_(whole)


def one_after_another(load):
    """What `load` returns, called by one rank of each machine at a time, so that its host memory holds one copy."""
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", 1))):
        if turn == int(os.environ.get("LOCAL_RANK", 0)):
            loaded = load()
        if dist.is_initialized():
            dist.barrier()
    return loaded


def load_tokenizers(model):
    """(Qwen2Tokenizer, ByT5Tokenizer) of a model, which do what the stock functions take for granted."""
    qwen = load_component(Qwen2Tokenizer, model, "tokenizer")
    byt5 = load_component(ByT5Tokenizer, model, "tokenizer_2")
    fix = "download it again"
    if not qwen.chat_template or qwen.pad_token_id is None:
        got = f"chat template {qwen.chat_template!r:.40}, pad token {qwen.pad_token!r}"
        raise ValueError(f"tokenizer of {model} must have a chat template and a pad token: got {got}; {fix}")
    if qwen.padding_side != "right":
        side = 'set "padding_side": "right" in its tokenizer_config.json'
        raise ValueError(f"tokenizer of {model} must pad on the right: got {qwen.padding_side!r}; {side}")
    try:
        chats = [chat_tokens(qwen, "cat"), chat_tokens(qwen, "dog")]
    except Exception as error:  # the template is a program
        raise ValueError(f"tokenizer of {model} must have a chat template that runs: {error}; {fix}") from error
    common = os.path.commonprefix(chats)  # the ids before the prompt's own are those that all prompts share
    if len(common) != SYSTEM_TOKENS:
        rule = f"must give the system message the {SYSTEM_TOKENS} tokens that the pipeline cuts off before a prompt"
        raise ValueError(f"tokenizer of {model} {rule}: got {len(common)}; {fix}")
    ids = byt5("aé").input_ids
    if ids != [100, 198, 172, 1]:  # three more than each byte, and the end
        raise ValueError(f"tokenizer_2 of {model} must be ByT5's, one id for each byte: got {ids} for 'aé'; {fix}")
    return qwen, byt5


def load_component(cls, model, name, method="from_pretrained", **options):
    """One part of the model, with an error that says which part of which model cannot be loaded."""
    try:
        return getattr(cls, method)(model, subfolder=name, **options)
    except Exception as error:  # files from outside can break a library in any way
        raise OSError(
            f"cannot load {name} of {str(model)!r}: {error or type(error).__name__}; download it again"
        ) from error


# ------------------------------------------------------------------------------------------------ export
def export(policy, folder, shift):
    """Write what stock diffusers loads. Every rank must call it, since it gathers the shards. Rank 0 writes.

    Its scheduler and its guider are those of the run, so that stock diffusers samples as the run did:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        guider = ClassifierFreeGuidance.from_pretrained(folder, subfolder="guider")
    A LoRA is loaded by
        transformer.load_lora_adapter(folder, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    and a full model by
        transformer = HunyuanVideo15Transformer3DModel.from_pretrained(folder)
        HunyuanVideo15Pipeline.from_pretrained(model, transformer=transformer, scheduler=scheduler, guider=guider)
    """
    transformer = policy.module
    lora = getattr(transformer, "peft_config", {}).get("default")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if lora is not None:  # only the adapter is gathered, so most of the model's keys are missing
        options.ignore_frozen_params = True
        options.strict = False
    state = get_model_state_dict(transformer, options=options)
    if own_rank() != 0:
        return
    os.makedirs(folder, exist_ok=True)
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(Path(folder) / "scheduler")
    ClassifierFreeGuidance(guidance_scale=policy.guidance_scale).save_pretrained(Path(folder) / "guider")
    if lora is None:
        plain = meta_transformer(transformer.config)  # a sharded model would save its shards
        plain.load_state_dict(state, assign=True)
        plain.save_pretrained(folder)
    else:  # the file that save_lora_adapter would write; it cannot gather shards
        adapter = get_peft_model_state_dict(transformer, state_dict=state, adapter_name="default")
        settings = json.dumps(lora.to_dict(), default=list, sort_keys=True)
        metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: settings}
        save_file(adapter, Path(folder) / LORA_WEIGHT_NAME_SAFE, metadata=metadata)
    obey_umask(folder)


def obey_umask(folder):
    """Give all files below a folder the mode of other new files: safetensors writes its own for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in Path(folder).rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def meta_transformer(config=None, dtype=torch.float32):
    """The transformer without weights. Without a config: the released one, 54 blocks and 8,326,608,160 parameters."""
    with torch.device("meta"):
        transformer = HunyuanVideo15Transformer3DModel.from_config(dict(config or {}))
    for parameter in transformer.parameters():  # its own `to` warns of modules that it does not have
        parameter.data = parameter.data.to(dtype)
    return transformer
