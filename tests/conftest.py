"""Lets tests say `from comparing import ...` and `import nanoip2p` wherever pytest is started from."""

import re
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [*(str(TESTS / name) for name in ("helpers", "benchmarks", "fuzz", "parity")),
                str(TESTS.parent / "weights"), str(TESTS.parent)]
torch.set_num_threads(1)  # after work in several threads, forked children of a test can hang
pytest_plugins = ["chat_server", "train_fixtures"]

# Names of tests at the widths of Stable Diffusion, of tests that repeat a comparison in many slow cases, and
# of tests that count operations, compile, or start Python anew
FULL = re.compile(r"sd-1\.5|vit-l-14|the_size_of_stable_diffusion|on_the_shipped_nano_weights|"
                  r"maps_of_hertz(_with_every_setting|_with_settings_in|\[(?!more words))|"
                  r"test_flops|other_spacings|importing_the_package|without_cuda|compiles_whole|reference_reacts")


def pytest_collection_modifyitems(items):
    """Marks these tests as `full`; `make test-fast` leaves them out."""
    for item in items:
        if FULL.search(item.nodeid):
            item.add_marker(pytest.mark.full)
