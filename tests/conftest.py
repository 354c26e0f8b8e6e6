"""Lets tests say `from comparing import ...` and `import nanoip2p` wherever pytest is started from."""

import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS / "benchmarks"), str(TESTS.parent / "weights"),
                str(TESTS.parent)]
torch.set_num_threads(min(torch.get_num_threads(), 2))  # more would only wait on each other
pytest_plugins = ["chat_server"]  # fixtures: server, ask
