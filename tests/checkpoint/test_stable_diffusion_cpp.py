"""stable-diffusion.cpp, through cyllama, opens the single file that we write, where cyllama is installed."""

import json
import struct

import pytest
import torch

from nanoip2p.checkpoint.single_file import to_original
from nanoip2p.clip import CLIPTextConfig, TextEncoder
from nanoip2p.unet import UNet, UNetConfig
from nanoip2p.vae import VAE, VAEConfig

PARTS = ((UNet, UNetConfig(in_channels=8)), (VAE, VAEConfig()), (TextEncoder, CLIPTextConfig()))


def write_sparse(path):
    """A file of full width in fp16, as `nanoip2p.checkpoint` writes it. Zeros take no room on the disk."""
    header, end = {}, 0
    for network, config in PARTS:
        with torch.device("meta"):
            model = network(config)
        for name, tensor in to_original(model).items():
            begin, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return len(header)


def test_it_finds_an_editor_with_all_tensors(tmp_path):
    sd = pytest.importorskip("cyllama.sd")
    assert write_sparse(tmp_path / "editor.safetensors") == 1130
    lines = []
    sd.set_log_callback(lambda level, text: lines.append(text.strip()))
    try:
        with sd.SDContext(sd.SDContextParams(model_path=str(tmp_path / "editor.safetensors"))) as context:
            assert context.is_valid
    finally:
        sd.set_log_callback(None)
        (tmp_path / "editor.safetensors").unlink()
    log = "\n".join(lines)
    assert "Version: Instruct-Pix2Pix" in log and "Weight type stat:                      f16: 1130" in log
    for part, count in (("clip", 196), ("unet", 686), ("vae", 248)):
        assert any(f"{part} params backend buffer" in line and f"({count} tensors)" in line for line in lines)
    assert "loading tensors completed" in log
    assert "not in model file" not in log and "unknown tensor" not in log
