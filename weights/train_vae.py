"""Train the nano world's VAE, for make_nano.py; and `fit`, a training loop for small networks."""

from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from nanoip2p.checkpoint.folder import load_network, save_network
from nanoip2p.common.files import replacing
from nanoip2p.dataset.rendered import draw_edit
from nanoip2p.images import to_tensor
from nanoip2p.objective import learning_rate
from nanoip2p.training import signals
from nanoip2p.vae import VAE, VAEConfig
from nanoip2p.world.scenes import random_scene

SIZE, SCALE_PICTURES = 64, 512  # pixels; pictures that set the scaling factor


def picture(scene) -> torch.Tensor:
    """A scene as (3, 64, 64) in [-1, 1]."""
    return to_tensor(scene.render(SIZE))


def draw_scene(generator):
    """Draw a training scene. Half of them have an edit applied: only an edit can remove all things."""
    scene = random_scene("train", int(torch.randint(2**31, (), generator=generator)))
    return draw_edit(scene.edits(), generator).scene if torch.rand((), generator=generator) < 0.5 else scene


def fit(name: str, model: torch.nn.Module, loss_of_step, steps: int, lr: float, folder: Path) -> None:
    """Train with AdamW. Learning rate: 100 warm-up steps, constant, linear decay to 0 in the last 30%.

    Saves to <folder>/<name>-run.pt every 250 steps and after Ctrl-C. The next call continues from this file.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)
    path, first = folder / f"{name}-run.pt", 0
    if path.exists():
        first, *states = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=10)
    with signals.stop_between_steps() as stop:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr, warmup=100, cooldown=0.3)
            loss, note = loss_of_step(torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix_str(note, refresh=False)
            if stop() or (step + 1) % 250 == 0 or step + 1 == steps:
                with replacing(path) as temporary:
                    torch.save((step + 1, model.state_dict(), optimizer.state_dict()), temporary)
            if stop():
                raise KeyboardInterrupt


def restore(vae: VAE, generator: torch.Generator, device: str, batch: int = 8) -> tuple:
    """Training pictures (B, 3, 64, 64), what the VAE makes of them, and its mean and log variance."""
    x = torch.stack([picture(draw_scene(generator)) for _ in range(batch)]).to(device)
    mean, logvar = vae.encode(x)
    noise = torch.randn(mean.shape, generator=generator).to(device)
    return x, vae.decode(mean + noise * (0.5 * logvar).exp()), mean, logvar


def make_vae(out: Path, device: str, steps: int) -> Path:
    """Train a VAE, 64 x 64 pixels -> 16 x 16 x 4 latents. Loss: L1 and a small KL term for smooth latents.

    Writes it with the scaling factor that gives its latents unit variance, and returns its folder.
    """
    folder = out / "vae"
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8)
    vae = VAE(config).to(device)

    def loss_of_step(generator):
        x, restored, mean, logvar = restore(vae, generator, device)
        l1 = (restored - x).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return l1 + 3e-4 * kl, f"l1 {l1:.4f} kl {kl:.2f}"

    fit("vae", vae, loss_of_step, steps, 1.5e-3, out)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        x = torch.stack([picture(draw_scene(generator)) for _ in range(SCALE_PICTURES)]).to(device)
        scale = 1 / torch.cat([vae.encode(part)[0] for part in x.split(64)]).std().item()
    vae.config = replace(vae.config, scaling_factor=round(scale, 5))
    save_network(vae, folder)
    return folder


def sharpen_vae(start: Path, out: Path, device: str, steps: int) -> Path:
    """Train the decoder of a VAE further, and return the folder of the result.

    The encoder stays as it is, so networks that were trained on its latents stay valid. The loss is the
    squared error plus its logarithm (the PSNR, up to a factor). The logarithm adds weight to easy pictures.
    """
    folder = out / "vae-sharp"
    if (folder / "config.json").exists():
        return folder
    vae = load_network(VAE, start).to(device)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss_of_step(generator):
        x, restored, *_ = restore(vae, generator, device)
        mse = (restored - x).square().mean((1, 2, 3))                     # (B,)
        psnr = -10 * torch.log10(mse / 4).mean()
        return 10 * mse.mean() + 0.02 * mse.log().mean(), f"psnr {psnr:.1f}"

    fit("vae-sharp", torch.nn.ModuleList([vae.decoder, vae.post_quant_conv]), loss_of_step, steps, 1e-3, out)
    save_network(vae, folder)
    return folder
