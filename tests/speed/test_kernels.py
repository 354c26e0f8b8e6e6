"""kernel_cases.py and kernel_builds.py, each in its own process: Triton decides on import how it runs.

With CUDA, the cases run on the GPU, otherwise in Triton's interpreter; other tests must not run in that mode.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if sys.platform == "linux":  # Triton supports only Linux

    @pytest.mark.parametrize("file, interpret", [("kernel_cases.py", not torch.cuda.is_available()),
                                                 ("kernel_builds.py", False)])
    def test_passes(file, interpret, tmp_path):
        env = os.environ | {"TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
        done = subprocess.run(command, cwd=Path(__file__).parents[1] / "helpers", env=env,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
