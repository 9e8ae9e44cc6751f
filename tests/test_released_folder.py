"""The released folders, of full size and without weights: accepted, or refused with the word that helps.

The tokenizers are stand-ins here; `python -m tests.released_folder` takes the real vocabulary.
"""

import json
import os
import shutil

import huggingface_hub
import pytest
import released_folder
from safetensors import safe_open

from tiny.videoalign import build_tiny_template
from video import files, videoalign

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return released_folder.build_hunyuan(tmp_path_factory.mktemp("released") / "480p_t2v")


@pytest.fixture
def copy(released, tmp_path):
    """Of links: a file must be replaced, and not written to."""
    return shutil.copytree(released, tmp_path / "copy", copy_function=os.link)


def check(folder, guidance_scale=6.0, shift=5.0, given=()):
    """As a run of the paper's preset is checked."""
    files.check_model_words(str(folder), guidance_scale, shift, given)
    return files.check_model(files.model_folder(str(folder)))


def test_the_released_folder_is_accepted(released):
    with safe_open(released / "vae" / f"{WEIGHTS}.safetensors", "pt") as weights:
        assert len(weights.keys()) == 218
    index = json.loads((released / "transformer" / f"{WEIGHTS}.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 1801 and len(set(index["weight_map"].values())) == 4
    sizes = [file.stat() for file in released.rglob("*.safetensors")]
    assert 50e9 < sum(size.st_size for size in sizes) < 60e9
    assert sum(512 * size.st_blocks for size in sizes) < 50e6  # holes take no disk
    qwen, byt5 = check(released)
    assert len(byt5) == 1510


def test_what_a_download_leaves_is_accepted_and_a_bf16_transformer_in_one_file(copy):
    network, _, stem, _, _ = released_folder.networks("480p_t2v")["transformer"]
    for file in (copy / "transformer").glob("*.safetensors*"):
        file.unlink()
    released_folder.write_network(copy / "transformer", stem, network, "BF16", 20e9)
    released_folder.add_local_dir(copy)
    check(copy)


@pytest.fixture
def hub(released, tmp_path, monkeypatch):
    """The id of a model that is in the hub's cache, on a node without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    files.small_files.cache_clear()
    yield "org/model", released_folder.make_hub_cache(released, tmp_path / "hub", "org/model")
    files.small_files.cache_clear()


def test_a_hub_id_is_the_folder_in_its_cache(hub):
    model, snapshot = hub
    assert files.model_folder(model) == snapshot
    check(model)
    with pytest.raises(OSError, match="'org/other' cannot be fetched from the hub: .*`hf download org/other`"):
        files.model_folder("org/other")


def test_the_small_files_of_a_hub_id_are_checked_before_the_large_ones_are_fetched(hub, monkeypatch):
    model, snapshot = hub
    asked = []

    def fetch(model, allow_patterns, revision):
        asked.append((allow_patterns, revision))
        return snapshot

    monkeypatch.setattr(files, "snapshot_download", fetch)
    files.model_folder(model)
    (small, no_revision), *large = asked
    assert no_revision is None and not any("safetensors" in pattern for pattern in small)
    assert [revision for _, revision in large] == [snapshot.name] * 4  # all of one commit
    assert large[1][0] == [f"vae/{WEIGHTS}.safetensors"] and len(large[0][0]) == 4
    asked.clear()
    files.small_files.cache_clear()
    monkeypatch.setattr(files, "check_small_files", lambda folder: pytest.fail("checked"))
    with pytest.raises(pytest.fail.Exception):
        files.model_folder(model)
    assert len(asked) == 1


IMAGE = "the model must be text-to-video: .* is image-to-video"
OTHER_KINDS = {
    "480p_t2v_distilled": "guidance_scale 1 .* where the run has 6; add --guidance_scale 1, or state",
    "720p_t2v": "shift 9 .* where the run has 5; add --shift 9, or state",
    "480p_i2v": IMAGE,
    "480p_i2v_step_distilled": IMAGE,
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_another_kind_says_what_to_type(copy, kind):
    message = OTHER_KINDS[kind]
    for file in ("model_index.json", *files.SAMPLING):
        (copy / file).unlink(missing_ok=True)
    released_folder.write_words(copy, kind)
    (copy / "transformer" / "config.json").unlink()
    released_folder.write_json(copy / "transformer" / "config.json", released_folder.transformer_config(kind))
    with pytest.raises(ValueError, match=message):
        check(copy)
    if "i2v" not in kind:
        guidance, shift, _ = released_folder.KINDS[kind]
        check(copy, guidance, shift, given=("guidance_scale", "shift"))
        files.check_model_words(copy, 6.0, 5.0, given=("guidance_scale", "shift"))  # an explicit option wins
    else:
        with pytest.raises(ValueError, match=message):
            files.check_model(copy)


def test_another_file_name_is_listed(copy):
    network, _, stem, _, _ = released_folder.networks("480p_t2v")["transformer"]
    for file in (copy / "transformer").glob("*.safetensors*"):
        file.unlink()
    released_folder.write_network(copy / "transformer", stem, network, "BF16", 10e9, variant="bf16")
    with pytest.raises(FileNotFoundError, match=f"it is missing; {WEIGHTS}.bf16-00001-of-00002.safetensors, .*cannot"):
        check(copy)
    shutil.rmtree(copy / "vae")
    (copy / "vae").mkdir()
    released_folder.write_json(copy / "vae" / "config.json", released_folder.VAE)
    (copy / "vae" / f"{WEIGHTS}.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"it is missing; {WEIGHTS}.bin cannot take its place"):
        files.stored_tensors(copy / "vae", WEIGHTS)


def test_videoalign_is_accepted_and_its_folder_named_where_a_checkpoint_is(tmp_path):
    folder = released_folder.build_videoalign(tmp_path / "videoalign")
    repo = build_tiny_template(tmp_path / "repo")
    size = (folder / "checkpoint-11352" / "model.pth").stat().st_size
    assert size == pytest.approx(5_031_072_529, abs=1e5)  # the published length
    videoalign.check_folder(folder, repo)
    with pytest.raises(FileNotFoundError, match=f"it is one of its checkpoints; name the folder above, {folder}"):
        videoalign.check_folder(folder / "checkpoint-11352", repo)
