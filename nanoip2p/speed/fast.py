"""`--fast`: faster inference. The pictures differ only by rounding.

On a CPU, cpu.py replaces layers. Without --fast, it uses only layers that take no more memory. On CUDA,
torch.compile fuses the operations of the UNet and replays them as a CUDA graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanoip2p.pipeline import Model
from nanoip2p.speed.cpu import WINOGRAD_CHANNELS, lay_out
from nanoip2p.unet import Attend, Attention, Context, Projected, UNet

STEP = 32 * 32  # positions of the latents of one step at 256 x 256 pixels


def speed_up(model: Model, fast: bool | None, say: Callable[[str], None], positions: float = float("inf"),
             injects: bool = False, attention: str = "auto", verbose: bool = False) -> None:
    """Speed up the networks of a model in place, as its device allows. Load and hash the weights before.

    fast None: only on a CPU, if it saves more time than it takes. positions: the latents' h * w, summed over
    pictures and steps. injects: most calls pass `attend`; CUDA compiles nothing.
    attention, on CUDA: "auto" (measured, see tune.py), "sdpa" (torch's choice) or "ours" (where correct), for
    calls without gradients. say: called with a line of text before slow work, and more often if `verbose`.
    """
    unet = model.unet
    if model.device.type == "cpu":
        if attention == "ours":
            say("--attention ours: our kernel needs CUDA; using torch's kernel")
        large = unet.config.block_out_channels[0] >= WINOGRAD_CHANNELS
        if fast is None and (fast := large and positions >= 10 * STEP):
            say("this job is long enough for --fast, faster convolutions (--no-fast leaves them out)")
        if fast or positions >= 2 * STEP:  # laying out takes as long as one step saves
            # The lowest levels have most of the weights, and Winograd's method saves little time there
            lay_out(unet, bool(fast), (*unet.down_blocks[-2:], unet.mid_block, unet.up_blocks[0]))
        if fast:  # without Winograd's method, the autoencoder's large maps gain nothing
            lay_out(model.vae, True)
    elif model.device.type == "cuda" and fast:
        unet.to(memory_format=torch.channels_last)  # the layout of tensor cores
        if attention != "sdpa":
            from nanoip2p.speed import kernels, tune  # these need triton, as torch.compile does
            tuner = tune.Tuner(kernels.fused_attention, attention == "ours", say, verbose)
            for layer in unet.modules():
                if isinstance(layer, Attention):
                    layer.attention = tuner
        if not injects:
            compile_unet(unet, say)
    elif fast:
        say(f"--fast changes nothing on {model.device.type}")


def compile_unet(unet: UNet, say: Callable[[str], None]) -> None:
    """Compile the UNet at the second call of each input size. A call overwrites the last call's output.

    The first call runs without compiling, because tune.py cannot measure while torch.compile records.
    """
    torch._dynamo.config.recompile_limit = 64  # input sizes, each twice with deep_every. torch's default is 8
    say("compiling: the second step at each picture size takes about a minute")
    plain, sizes = unet.forward, set()
    compiled = torch.compile(plain, dynamic=False, mode="reduce-overhead")

    def forward(latents: Tensor, timestep: Tensor | dict, context: Context, *attend: Attend,
                deep: Tensor | bool = False) -> Tensor | tuple[Tensor, Tensor]:
        size = latents.shape, len(context.rows if isinstance(context, Projected) else context), type(deep)
        run = compiled if size in sizes else plain
        sizes.add(size)
        return run(latents, timestep, context, *attend, deep=deep)

    unet.forward = forward
