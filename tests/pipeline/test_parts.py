"""Where parts are looked for, what is said of those that are missing or damaged, and the image condition's end."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import official_vae_weights, tiny_text_model, tiny_vae
from safetensors.torch import load_file, save_file

from lingbot_kernels.components.folders import BadPart, MissingParts, find_parts
from lingbot_kernels.components.image import ImageCondition, fitting_size, image_pixels, open_image, settled_after
from lingbot_kernels.components.text import clean
from lingbot_kernels.pipeline import LingBotWorldPipeline, latent_scale


def load(folder: Path, **options: object) -> LingBotWorldPipeline:
    return LingBotWorldPipeline.from_pretrained(folder, device="cpu", **options)


@pytest.fixture
def copy(diffusers_layout: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(diffusers_layout, tmp_path / "copy"))


def test_both_layouts_are_found(diffusers_layout, official_layout):
    parts = find_parts(diffusers_layout)
    assert [path.name for path in (parts.transformer, parts.text_encoder, parts.tokenizer, parts.vae)] == [
        "transformer", "text_encoder", "tokenizer", "vae",
    ]  # fmt: skip
    parts = find_parts(official_layout)
    assert parts.transformer == official_layout / "."
    assert parts.text_encoder.name == "models_t5_umt5-xxl-enc-bf16.pth" and parts.vae.name == "Wan2.1_VAE.pth"
    assert parts.tokenizer == official_layout / "google" / "umt5-xxl"


def test_what_a_folder_lacks_may_lie_in_another(official_layout, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(official_layout / name, alone)
    with pytest.raises(MissingParts) as caught:
        find_parts(alone)
    assert [line.split(":")[0] for line in caught.value.missing] == ["text encoder", "tokenizer", "vae"]
    parts = find_parts(alone, assets=official_layout)
    assert parts.transformer == alone / "." and parts.vae.parent == official_layout
    with pytest.raises(MissingParts, match="transformer: no safetensors shards in student/"):
        find_parts(alone, assets=official_layout, transformer="student")
    shutil.copytree(alone, alone / "student")
    assert find_parts(alone, assets=official_layout, transformer="student").transformer == alone / "student"


@pytest.mark.parametrize("part", ("transformer", "text_encoder", "tokenizer", "vae"))
def test_each_missing_part_is_named_alone(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(MissingParts, match=f"1 part is missing\n  {part.replace('_', ' ')}: no "):
        load(copy)


@pytest.mark.parametrize(
    ("part", "file"),
    (
        ("text encoder", "text_encoder/model.safetensors"),
        ("vae", "vae/diffusion_pytorch_model.safetensors"),
        ("transformer", "transformer/diffusion_pytorch_model.safetensors"),
        ("tokenizer", "tokenizer/tokenizer.json"),
    ),
)
def test_a_damaged_file_is_named(copy, part, file):
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=Path(file).parts[0]) as caught:
        load(copy)
    assert part == "transformer" or str(caught.value).startswith(part)


@pytest.mark.parametrize(
    ("part", "file"),
    (("text encoder", "text_encoder/model.safetensors"), ("vae", "vae/diffusion_pytorch_model.safetensors")),
)
def test_a_missing_weight_is_never_made_up(copy, part, file):
    weights = load_file(copy / file)
    gone = sorted(name for name in weights if name.endswith("weight") and "shared" not in name)[-1]
    del weights[gone]
    save_file(weights, copy / file, metadata={"format": "pt"})
    with pytest.raises(BadPart, match=f"{part}: .*1 weights are missing .*such as {gone}"):
        load(copy)


def test_official_files_are_checked(official_layout, tmp_path):
    folder = Path(shutil.copytree(official_layout, tmp_path / "copy"))
    weights = official_vae_weights()
    del weights["decoder.conv1.weight"]
    torch.save(weights, folder / "Wan2.1_VAE.pth")
    with pytest.raises(BadPart, match=r"(?s)vae: .*decoder\.conv_in\.weight"):
        load(folder)
    (folder / "Wan2.1_VAE.pth").write_bytes(b"no weights")
    with pytest.raises(BadPart, match=r"vae: .*Wan2\.1_VAE\.pth: can't be read"):
        load(folder)
    shutil.copy(official_layout / "Wan2.1_VAE.pth", folder)
    torch.save({"blocks.0.attn.r.weight": torch.zeros(1)}, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(BadPart, match=r"text encoder: .*blocks\.0\.attn\.r\.weight is no weight of a umT5 encoder"):
        load(folder)
    torch.save([1], folder / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(BadPart, match=r"text encoder: .*must hold a dict of tensors"):
        load(folder)


def test_the_official_encoder_gives_the_same_embeddings(official_layout):
    encoder = load(official_layout).text_encoder
    ids = torch.tensor([[4, 3, 7, 1]])
    with torch.no_grad():
        expected = tiny_text_model()(ids).last_hidden_state
        assert torch.equal(encoder.model(ids).last_hidden_state, expected)


def test_without_the_extra_it_says_what_to_install(diffusers_layout, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers.*pip install 'lingbot-kernels\[pipeline\]'"):
        load(diffusers_layout)


def test_prompts_are_cleaned_as_the_official_code_does():
    assert clean("  a &amp;amp; b\n\t c ") == "a & b c"
    assert clean("caf\u00c3\u00a9") == "caf\u00e9"


def test_the_condition_repeats_itself_bit_for_bit_once_its_caches_do(picture):
    vae = tiny_vae()
    pixels = image_pixels(picture, 16, 24)
    settled = settled_after(vae.encoder)
    assert settled == 34
    lazy, whole = (ImageCondition(vae, pixels, latent_scale(vae, torch.device("cpu"))) for _ in range(2))
    whole._settled = 10**6  # encodes every frame
    expected = whole.chunk(0, settled + 5)
    got = torch.cat([lazy.chunk(start, 3) for start in range(0, settled + 5, 3)], 2)
    assert torch.equal(got[:, :, : settled + 5], expected)
    assert lazy.encoded == settled + 1 and lazy._caches == []

    video = torch.zeros(1, 3, 4 * 8 + 1, 16, 24)
    video[:, :, 0] = pixels
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    direct = (vae.encode(video).latent_dist.mode() - mean) / std
    torch.testing.assert_close(got[:, 4:, :9], direct, rtol=1e-5, atol=2e-6)
    assert (got[:, :4, 0] == 1).all() and (got[:, :4, 1:] == 0).all()


@pytest.mark.parametrize("mode", ("RGBA", "L", "P"))
def test_images_of_other_modes_become_rgb(picture, tmp_path, mode):
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.fromarray(picture).convert(mode).save(path)
    assert open_image(path).mode == "RGB"
    pixels = image_pixels(path, 32, 48)
    assert pixels.shape == (3, 32, 48) and pixels.dtype == torch.float32
    assert pixels.abs().max() < 1.3  # bicubic interpolation overshoots a little


def test_an_image_of_sixteen_bits_is_refused(tmp_path):
    from PIL import Image

    path = tmp_path / "deep.png"
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
    with pytest.raises(ValueError, match="image: got mode 'I;16', must be one of RGB"):
        open_image(path)


def test_sizes_that_fit_an_image():
    # 480 * 832 * (480 / 832) is a hair below 480^2 in floating point, in the official code as here.
    assert fitting_size(832, 480, (2, 2)) == (464, 832)
    assert fitting_size(100, 100, (2, 2)) == (624, 624)
    assert fitting_size(480, 832, (2, 2)) == (832, 480)
    with pytest.raises(ValueError, match="image: got 900x100 pixels, must be at most 8 times as long as wide"):
        fitting_size(900, 100, (2, 2))
