"""The names of 2022: how the original code lays out Stable Diffusion and InstructPix2Pix in a single file.

The original counts the UNet's blocks through (`input_blocks.0` to `.11`) where diffusers counts levels and
blocks in each, and it has other words for the layers inside. `theirs` turns our names into the original's; to
read a file, it is applied to all names of our networks, and the table that results is used backwards.
"""

import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

from torch import Tensor, nn

from nanoip2p.checkpoint.folder import Network, empty
from nanoip2p.checkpoint.tensors import dtype_names, refuse
from nanoip2p.clip import CLIPTextConfig, TextEncoder
from nanoip2p.unet import UNet, UNetConfig
from nanoip2p.vae import VAE, VAEConfig

PARTS = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}
PREFIXES = {UNet: "model.diffusion_model.", VAE: "first_stage_model.",
            TextEncoder: "cond_stage_model.transformer."}
Shape = Callable[[str], tuple[int, ...]]  # of a tensor by its name; ValueError when a file lacks it
# Ours -> theirs: layers inside a block of the UNet, and whatever occurs in a name of the autoencoder
UNET_WORDS = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
              "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_WORDS = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
             "mid_block.attentions.0": "mid.attn_1", "_blocks": "", "resnets": "block",
             "samplers.0": "sample", "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut",
             "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# Tables that follow from the schedule, counters, indices 0, 1, 2, …, and parts that only training used.
# Other scalars go as well: no network here has any.
IGNORED = re.compile(
    r"betas|(log_one_minus_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_|sqrt_)?alphas_cumprod(_prev)?"
    r"|posterior_\w+|logvar|lvlb_weights|scale_factor|model_ema\.(decay|num_updates)"
    r"|first_stage_model\.(loss|model_ema)\..+"
    r"|cond_stage_model\.(logit_scale|.+\.position_ids|.+projection.*)"
)
# What else comes in such files, told by a line "name (shape)" that only it has; and what is but a part
FAMILIES = {
    "a LoRA": r"lora",
    "a ControlNet": r"^(control_model\.|controlnet_|input_hint_block\.)",
    "a textual inversion": r"^(emb_params |string_to_param|<)",
    "an inpainting model": r"^model\.diffusion_model\.input_blocks\.0\.0\.weight \(\d+, 9,",
    "a Stable Diffusion 2.x checkpoint": r"^cond_stage_model\.model\.|\.attn2\.to_k\.weight \(\d+, 1024\)",
    "an SDXL checkpoint": r"^(conditioner\.|model\.diffusion_model\.label_emb\.)",
    "a Stable Diffusion 3 checkpoint": r"^(model\.diffusion_model\.)?joint_blocks\.",
    "a Flux checkpoint": r"^(model\.diffusion_model\.)?double_blocks\.",
}
FRAGMENTS = {
    "one network of a diffusers folder (name the folder)": r"^(down_blocks|text_model|decoder\.conv_norm)",
    "an autoencoder alone (name it with --vae)": r"^(first_stage_model\.)?(encoder|decoder)\.",
}


@cache
def unet_places(config: UNetConfig) -> dict[str, str]:
    """Our name of each of the UNet's blocks -> theirs. A level takes `per` numbers in a row."""
    places = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    per = config.layers_per_block + 1  # down: residual blocks and down-sampling; up: one more residual block
    for i, up in enumerate(config.up_block_types):
        for j in range(per):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{1 + i * per + j}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{1 + i * per + j}.1"
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{i * per + j}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{i * per + j}.1"
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * per}.0.op"
        after = 2 if up == "CrossAttnUpBlock2D" else 1  # shares the number of the last block
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{i * per + per - 1}.{after}.conv"
    return places | {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
                     "mid_block.resnets.1": "middle_block.2"}


def unet_name(name: str, config: UNetConfig) -> str:
    """Our name of a weight -> theirs: the block's place, the layer in other words, and the rest."""
    places = unet_places(config)
    place = next(place for place in places if name.startswith(place + "."))
    layer, _, leaf = name.removeprefix(place + ".").rpartition(".")
    return ".".join(filter(None, [places[place], UNET_WORDS.get(layer, layer), leaf]))


def vae_name(name: str, config: VAEConfig) -> str:
    """Our name of a weight -> theirs, which count up-sampling levels from the end."""
    last = len(config.block_out_channels) - 1
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{last - int(match[1])}", name)
    for ours, original in VAE_WORDS.items():
        name = name.replace(ours, original)
    return name


def theirs(model: nn.Module) -> dict[str, str]:
    """Every weight of a network: our name -> theirs, with their prefix. CLIP's differ in nothing else."""
    rename = {UNet: unet_name, VAE: vae_name}.get(type(model), lambda name, config: name)
    return {name: PREFIXES[type(model)] + rename(name, model.config) for name in model.state_dict()}


def ema_name(name: str) -> str:
    """model.diffusion_model.out.0.bias -> model_ema.diffusion_modelout0bias"""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def is_projection(name: str) -> bool:
    """Whether their name is a weight of the autoencoder's attention: a 1x1 convolution there, linear here."""
    return ".mid.attn_1." in name and name.endswith("weight") and not name.endswith("norm.weight")


def to_original(model: nn.Module, ema: bool = False) -> dict[str, Tensor]:
    """A network's weights under the original's names (ema: of the averaged weights). Nothing is copied."""
    table = theirs(model)
    return {ema_name(table[name]) if ema else table[name]:
            tensor[:, :, None, None] if is_projection(table[name]) else tensor
            for name, tensor in model.state_dict().items()}


def to_ours(model: nn.Module, tensors: dict[str, Tensor], ema: bool = False) -> dict[str, Tensor]:
    """The inverse of to_original: those of the tensors that belong to the network, under our names."""
    table = {ema_name(name) if ema else name: ours for ours, name in theirs(model).items()}
    return {table[name]: tensor.flatten(1) if is_projection(name) else tensor
            for name, tensor in tensors.items() if name in table}


def find_networks(read: Callable[[], dict[str, Tensor]], path: Path, raw_weights: bool = False,
                  configs: dict[str, dict] | None = None) -> tuple[str, dict[str, Network]]:
    """What a single file holds, in words, and its three networks by the names in PARTS.

    read: maps the file's tensors. Configs are read off the shapes, except those given in `configs`. Averaged
    (EMA) weights are taken where the file has them, unless `raw_weights`. Raises ValueError, in one line, for
    another family's file and for tensors that have no place here.
    """
    tensors = weights(read(), path)
    if any(name.startswith(PREFIXES[UNet]) for name in tensors):
        refuse_others(tensors, FAMILIES, path)
    else:
        refuse_others(tensors, FAMILIES | FRAGMENTS, path)
        raise ValueError(f"{path} is no Stable Diffusion checkpoint; it holds {', '.join([*tensors][:3])} …")
    models = {part: empty(cls, (configs or {}).get(part) or infer(cls, tensors, path), path)
              for part, cls in PARTS.items()}
    known = {name for model in models.values() for name in theirs(model).values()}
    known |= {ema_name(name) for name in known}
    refuse(path, "has unknown", [name for name in tensors if name not in known])
    has_ema = any(name.startswith("model_ema.") for name in tensors)
    ema = has_ema and not raw_weights
    unet = models["unet"].config
    kind = "an InstructPix2Pix" if unet.in_channels > unet.out_channels else "a Stable Diffusion 1.x"
    which = "EMA weights" if ema else "raw weights" if has_ema else "no EMA copy"
    found = (f"{kind} checkpoint in the layout of 2022, {unet.in_channels} input channels, {which}, "
             f"{dtype_names(tensors.values())}")

    def read_part(part: str) -> dict[str, Tensor]:
        return to_ours(models[part], weights(read(), path), ema and part == "unet")

    return found, {part: Network(model, partial(read_part, part), path) for part, model in models.items()}


def find_vae(read: Callable[[], dict[str, Tensor]], path: Path, config: dict | None = None) -> Network:
    """The autoencoder of a file of its own, in the original's names or diffusers', or of a whole checkpoint.

    Without `config` it is read off the shapes; errors as find_networks.
    """
    def read_prefixed() -> dict[str, Tensor]:
        tensors = weights(read(), path)
        inside = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIXES[VAE])}
        return VAE.published_names(
            weights(inside or {PREFIXES[VAE] + name: tensor for name, tensor in tensors.items()}, path))

    refuse_others(weights(read(), path), FAMILIES, path)
    tensors = read_prefixed()
    model = empty(VAE, config or infer(VAE, tensors, path), path)
    if PREFIXES[VAE] + "encoder.conv_norm_out.weight" in tensors:  # diffusers' names, and so ours
        return Network(model, lambda: {name.removeprefix(PREFIXES[VAE]): tensor
                                       for name, tensor in read_prefixed().items()}, path)
    known = set(theirs(model).values())
    refuse(path, "has unknown", [name for name in tensors if name not in known])
    return Network(model, lambda: to_ours(model, read_prefixed()), path)


def weights(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Without what is IGNORED; some programs put `state_dict.` before names, or leave out `text_model.`

    ValueError, naming `path`, for a weight in two of these spellings.
    """
    bare, found = re.compile(rf"^({PREFIXES[TextEncoder]})(embeddings|encoder|final)"), {}
    named = ((name.removeprefix("state_dict."), tensor) for name, tensor in tensors.items() if tensor.ndim)
    for name, tensor in named:
        name = bare.sub(r"\1text_model.\2", name)
        if name in found:
            raise ValueError(f"{path}: {name} comes twice, in two spellings")
        if not IGNORED.fullmatch(name):
            found[name] = tensor
    return found


def refuse_others(tensors: dict[str, Tensor], families: dict[str, str], path: Path) -> None:
    """ValueError that says what a file is when it is no Stable Diffusion 1.x checkpoint."""
    content = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    for kind, pattern in families.items():
        if re.search(pattern, content, re.MULTILINE):
            raise ValueError(f"{path}: this is {kind}; nanoip2p reads Stable Diffusion 1.x")


def infer(cls: type, tensors: dict[str, Tensor], path: Path) -> dict:
    """Read the config of a network off the names and shapes in a file. ValueError names what is missing."""
    def shape(name: str) -> tuple[int, ...]:
        tensor = tensors.get(PREFIXES[cls] + name)
        if tensor is None or tensor.ndim < 2 or 0 in tensor.shape:
            raise ValueError(f"{path}: no complete Stable Diffusion 1.x checkpoint, it lacks {name} or its "
                             "shape is odd")
        return tensor.shape

    names = {name.removeprefix(PREFIXES[cls]) for name in tensors}
    return {UNet: infer_unet, VAE: infer_vae, TextEncoder: infer_text}[cls](names, shape)


def count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers stand where `pattern` has its group. (The largest could be anything.)"""
    return len({match[1] for match in (re.match(pattern, name) for name in names) if match})


def infer_unet(names: set[str], shape: Shape) -> dict:
    """The number of heads, 8, cannot be seen."""
    blocks = count(names, r"input_blocks\.(\d+)\.")
    per = next((i for i in range(1, blocks) if f"input_blocks.{i}.0.op.weight" in names), blocks)  # a level
    levels = range(1, blocks, per)  # at a residual block of each

    def types(side: str, direction: str) -> list[str]:
        attends = (f"{side}_blocks.{i}.1.proj_in.weight" in names for i in levels)
        return ["CrossAttn" * has + f"{direction}Block2D" for has in attends]

    return dict(
        in_channels=shape("input_blocks.0.0.weight")[1], out_channels=shape("out.2.weight")[0],
        cross_attention_dim=shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        layers_per_block=per - 1, down_block_types=types("input", "Down"),
        up_block_types=types("output", "Up"),
        block_out_channels=[shape(f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in levels])


def infer_vae(names: set[str], shape: Shape) -> dict:
    """Of diffusers' names too; the scale of the latents cannot be seen."""
    spellings = "encoder.down.{}.block.{}.conv2.weight", "encoder.down_blocks.{}.resnets.{}.conv2.weight"
    block = next((block for block in spellings if block.format(0, 0) in names), spellings[0])
    levels = range(count(names, block.format(r"(\d+)", 0)))
    return dict(
        in_channels=shape("encoder.conv_in.weight")[1], out_channels=shape("decoder.conv_out.weight")[0],
        latent_channels=shape("decoder.conv_in.weight")[1],
        layers_per_block=count(names, block.format(0, r"(\d+)")),
        block_out_channels=[shape(block.format(i, 0))[0] for i in levels])


def infer_text(names: set[str], shape: Shape) -> dict:
    """Heads are 64 wide, as in every CLIP."""
    vocabulary, width = shape("text_model.embeddings.token_embedding.weight")[:2]
    return CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, projection_dim=width, num_attention_heads=width // 64 or 1,
        intermediate_size=shape("text_model.encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=count(names, r"text_model\.encoder\.layers\.(\d+)\."),
        max_position_embeddings=shape("text_model.embeddings.position_embedding.weight")[0]).to_json()
