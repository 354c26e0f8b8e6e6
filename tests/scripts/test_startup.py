"""What commands import: --help and wrong flags no torch, and work only what it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanoip2p import prompt_to_prompt, samplers
from nanoip2p.checkpoint.folder import build_without_memory
from nanoip2p.checkpoint.tensors import DTYPES
from nanoip2p.clip import CLIPTextConfig, TextEncoder
from nanoip2p.common import cli
from nanoip2p.dataset.layouts import SPLITS

ROOT = Path(__file__).resolve().parents[2]
SUBCOMMANDS = {
    "sample.py": [""], "train.py": [""], "nanoip2p/__main__.py": [""],
    "nanoip2p/app/__main__.py": [""],
    "nanoip2p/checkpoint/__main__.py": ["", "merge"],
    "make_dataset.py": ["", "captions", "captions prepare-finetune", "captions finetune", "pairs", "pair",
                        "show"],
    "nanoip2p/evaluate/__main__.py": ["", "scenes", "captions", "curve", "calls", "magicbrush"]}
NEEDLESS = {"torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "sympy", "openai", "matplotlib",
            "pyarrow", "gguf", "huggingface_hub", "triton"}
# Runs each argv as `python script` or `python -m` do; the last line of its output lists codes and modules
PROBE = """
import json, runpy, sys
commands, codes = json.loads(sys.argv[1]), []
sys.path.insert(0, "")
for sys.argv in commands:
    try:
        codes.append(runpy.run_path(sys.argv[0], run_name="__main__"))
    except SystemExit as error:
        codes.append(error.code)
print()
print(json.dumps([codes, list(sys.modules)]))
"""


def modules(*commands):
    """The exit codes of commands that run one after another, and the names of all modules they imported."""
    words = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run([sys.executable, "-c", PROBE, words], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    codes, names = json.loads(done.stdout.splitlines()[-1])
    return codes, set(names)


@pytest.mark.parametrize("script", SUBCOMMANDS)
def test_help_and_wrong_flags_need_no_torch(script):
    commands = [[script, *words.split(), flag] for words in SUBCOMMANDS[script]
                for flag in ("--help", "--version", "--no-such-flag")]
    codes, names = modules(*commands)
    assert codes == [0, 0, 2] * len(SUBCOMMANDS[script]), commands
    assert not names & {"torch", "openai", "tokenizers", "safetensors"}


def test_an_edit_imports_what_it_needs(tmp_path):
    codes, names = modules(["sample.py", "--input", "weights/nano-ip2p/examples/house.png", "--edit", "red",
                            "--steps", 1, "--device", "cpu", "--output", tmp_path / "night.png"])
    assert (codes, (tmp_path / "night.png").exists()) == ([0], True)
    assert "torch" in names and not names & NEEDLESS


def test_a_check_of_training_imports_what_it_needs():
    codes, names = modules(["train.py", "--check", "--data", "scenes", "--pairs", 40, "--device", "cpu",
                            "--weights", "weights/nano-sd"])
    assert codes == [0] and "torch" in names and not names & NEEDLESS


def test_pairs_import_what_they_need(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"input": "a red house", "edit": "paint it blue", "output": "a blue house"}')
    codes, names = modules(["make_dataset.py", "pairs", "--prompts", prompts, "--out", tmp_path / "out",
                            "--weights", "weights/nano-sd", "--n-samples", 1, "--steps", 1, "--dtype", "fp32",
                            "--device", "cpu"])
    assert codes == [0] and (tmp_path / "out" / "0000000").exists() and not names & NEEDLESS


def test_the_names_in_flags_are_those_of_the_tables():
    assert cli.SAMPLERS == tuple(sorted(samplers.SAMPLERS)) and cli.DTYPES == tuple(sorted(DTYPES))
    assert cli.MODES == prompt_to_prompt.MODES and list(SPLITS) == ["train", "validation", "test"]


def test_only_networks_that_get_their_weights_from_a_file_are_built_without_initial_values():
    config = CLIPTextConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                            num_attention_heads=2)
    before = torch.get_rng_state()
    empty = build_without_memory(TextEncoder, config.to_json(), Path("x"))
    assert all(weight.is_meta for weight in empty.parameters()) and torch.equal(before, torch.get_rng_state())
    built = TextEncoder(config)
    assert built.state_dict().keys() == empty.state_dict().keys()
    for name, weight in built.named_parameters():
        assert weight.shape == empty.get_parameter(name).shape
        if name.endswith("embedding.weight"):
            assert abs(weight.std() / 0.02 - 1) < 0.1, name
