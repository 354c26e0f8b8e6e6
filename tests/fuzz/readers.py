"""Everything that nanoip2p reads from outside: for each kind a small valid input, and the code that reads it.

A reader is (write, read). write(folder) makes valid files; read(folder) does what a command does with them.
COVERS says which functions of nanoip2p the readers reach; test_fuzz.py finds functions that no reader covers.
"""

import contextlib
import io
import json
import os
import shutil
import types
import zipfile
from contextlib import contextmanager
from pathlib import Path

import ablate
import torch
from comparing import randomise
from PIL import Image, ImageCms, features
from safetensors.torch import save_file
from tiny_editor import write_tiny_clip, write_tiny_editor
from train_tokenizer import train_tokenizer

import make_dataset
import sample
import train
from nanoip2p.checkpoint.embeddings import add_embedding
from nanoip2p.checkpoint.folder import save_network
from nanoip2p.checkpoint.load import load_model, open_checkpoint
from nanoip2p.checkpoint.lora import apply_loras, file_hash, write_lora
from nanoip2p.checkpoint.marks import marked_schedule
from nanoip2p.checkpoint.save import convert
from nanoip2p.checkpoint.tensors import read_metadata, read_tensors, read_weights
from nanoip2p.clip import CLIPTextConfig, TextEncoder
from nanoip2p.clip_filter import SIMILARITIES, Judge
from nanoip2p.common.files import append, regular
from nanoip2p.common.saving import save_image, save_png
from nanoip2p.dataset import captions, chat, finetune, pairs, show, tables
from nanoip2p.dataset.layouts import broken_pictures, load_picture, read_data
from nanoip2p.editing.masks import read_mask
from nanoip2p.editing.pictures import find_images
from nanoip2p.editing.recipes import read_recipe
from nanoip2p.evaluate import calls, curve, magicbrush
from nanoip2p.images import open_image
from nanoip2p.speed import tune
from nanoip2p.tokenizer import START, load_tokenizer
from nanoip2p.training import run_folder
from nanoip2p.training.cache import Cache
from nanoip2p.unet import UNet, UNetConfig

PICTURE = Image.radial_gradient("L").resize((24, 16)).convert("RGB")
ROW = {"input": "a red house", "edit": "make it night", "output": "a red house at night"}
EPOCH = 10**9  # the modification time of every picture, so that a cache knows them again


def write_rows(path: Path, *rows: dict) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_picture(path: Path, **settings) -> None:
    """A small picture in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.save(path, **settings)


def edit(source: Path, **settings) -> None:
    """What sample.py does with weights."""
    load_model(source, **settings).edit(PICTURE, "make it night", steps=2, seed=0, resolution=16)


def read_editor(folder: Path) -> None:
    """A diffusers folder."""
    edit(folder)


def write_small(folder: Path, in_channels: int) -> None:
    """A tiny model whose UNet has one level: most of the time goes into building networks."""
    write_tiny_editor(folder, in_channels=in_channels)
    unet = UNet(UNetConfig(
        in_channels, block_out_channels=(16,), layers_per_block=1, attention_head_dim=2, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=32))
    save_network(randomise(unet), folder / "unet")


def write_painter(folder: Path) -> None:
    """A text-to-image model with pairs.json."""
    write_small(folder, 4)
    (folder / "clip").mkdir()
    (folder / "pairs.json").write_text(json.dumps({"n_samples": 2, "inject": "self", "clip": "clip",
                                                   "min_p2p": 0.1, "max_cfg": 9.0, "steps": 3, "batch": 2}))


def read_painter(folder: Path) -> None:
    """What `make_dataset.py pairs` does with weights."""
    checkpoint = open_checkpoint(folder)
    settings = pairs.pair_settings({}, folder, checkpoint.defaults)
    painter = load_model(checkpoint, edits=False)
    painter.fill_defaults({key: getattr(settings, key) for key in ("steps", "resolution", "sampler")})
    pairs.candidate(pairs.Prompt(0, "a", "b", {}), 0, settings)


def write_single(folder: Path) -> None:
    """A safetensors file with our metadata, and the tokenizer beside it."""
    write_small(folder / "tiny", 8)
    convert(open_checkpoint(folder / "tiny"), folder / "single.safetensors")
    shutil.move(folder / "tiny" / "tokenizer", folder / "tokenizer")
    shutil.rmtree(folder / "tiny")


def read_single(folder: Path) -> None:
    """A single file, and its conversion with the autoencoder of another checkpoint."""
    path = folder / "single.safetensors"
    edit(path)
    convert(open_checkpoint(path, vae=path), folder / "new")
    shutil.rmtree(folder / "new")


def write_marks(folder: Path) -> None:
    """What a single file of another program says about its noise."""
    metadata = {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}
    save_file({"v_pred": torch.empty(0)}, folder / "x.safetensors", metadata)
    (folder / "x.yaml").write_text("model:\n  params:\n    parameterization: v\n")


def read_marks(folder: Path) -> None:
    """The noise schedule."""
    path = folder / "x.safetensors"
    marked_schedule(path, read_tensors(path), read_metadata(path))


def write_pickle(folder: Path) -> None:
    """A network's folder with a pickle, in place of safetensors."""
    tensors = {"conv.weight": torch.ones(2, 3), "conv.bias": torch.zeros(2)}
    torch.save({"state_dict": tensors, "step": 7}, folder / "diffusion_pytorch_model.bin")


def write_packed(folder: Path) -> None:
    """A compressed pickle of many equal numbers, and a tokenizer as transformers 5 saves it."""
    torch.save({"conv.weight": torch.ones(2**16)}, folder / "x.bin")
    with (zipfile.ZipFile(folder / "x.bin") as old, zipfile.ZipFile(
            folder / "diffusion_pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as new):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (folder / "x.bin").unlink()


def write_fast_tokenizer(folder: Path) -> None:
    """The files of transformers 5, and the older ones that list more tokens."""
    train_tokenizer(["a cat on a sofa"] * 3, 540, folder)
    backend = load_tokenizer(folder).backend
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "added_tokens.json").write_text(json.dumps({"<my-cat>": 600}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {
        "content": START, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "model_max_length": 77, "pad_token": "<pad>", "extra_special_tokens": {"style_token": "<style>"},
        "additional_special_tokens": ["<a>", {"content": "<b>"}]}))


def read_tokenizer(folder: Path) -> None:
    """The ids of a text."""
    load_tokenizer(folder)(["a cat on <a> sofa, é 😀"])


def write_embeddings(folder: Path) -> None:
    """Textual inversions of a web UI and of diffusers, and a tokenizer."""
    write_fast_tokenizer(folder)
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 8)}, "name": "toy",
                "step": 9}, folder / "toy.pt")
    save_file({"<cat>": torch.ones(8)}, folder / "learned_embeds.safetensors")


def read_embeddings(folder: Path) -> None:
    """What sample.py does with --embedding."""
    model = types.SimpleNamespace(
        tokenizer=load_tokenizer(folder), text_encoder=TextEncoder(CLIPTextConfig(600, 8, 8, 1, 1)))
    for name in ("toy.pt", "learned_embeds.safetensors"):
        add_embedding(model, folder / name)
    model.text_encoder(model.tokenizer(["a toy <cat>"]))


def write_loras(folder: Path) -> None:
    """LoRAs of kohya, with mid tensors, and of diffusers, with its metadata."""
    base = "lora_unet_down_blocks_0_resnets_0_conv1"
    save_file({f"{base}.lora_down.weight": torch.ones(2, 8, 1, 1), f"{base}.lora_up.weight": torch.ones(8, 2),
               f"{base}.lora_mid.weight": torch.ones(2, 2, 3, 3), f"{base}.alpha": torch.tensor(2.0)},
              folder / "kohya.safetensors")
    write_lora(folder / "diffusers.safetensors", {"conv_in": (torch.ones(1, 4, 3, 3), torch.ones(8, 1))}, 2)


def read_loras(folder: Path) -> None:
    """What sample.py does with --lora."""
    unet = UNet(UNetConfig(8, 4, (8,), ("DownBlock2D",), ("UpBlock2D",), 1, 1, 8, 4))
    model = types.SimpleNamespace(unet=unet, text_encoder=TextEncoder(CLIPTextConfig(600, 8, 8, 1, 1)))
    for lora in (f"{folder / 'kohya.safetensors'}:0.5", str(folder / "diffusers.safetensors")):
        apply_loras(model, [lora])
        file_hash(lora)


def write_shards(folder: Path) -> None:
    """A network in shards with their index."""
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        save_file({name[24:29]: torch.ones(2)}, folder / name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": 16}, "weight_map": {name[24:29]: name for name in names}}))


def read_judge(folder: Path) -> None:
    """CLIP's folder."""
    judge = Judge.load(folder)
    judge.score([PICTURE], [PICTURE], judge.encode_texts(["a", "b"]))


def write_pictures(folder: Path) -> None:
    """Each raster format, a transparent colour and a colour profile."""
    for suffix in ("png", "jpg", "webp", "tif", "bmp", "gif", *("avif",) * features.check("avif")):
        write_picture(folder / f"picture.{suffix}")
    PICTURE.convert("I;16").save(folder / "grey.png")
    PICTURE.save(folder / "clear.png", transparency=(1, 2, 3))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    PICTURE.save(folder / "profile.tif", icc_profile=profile)


def read_pictures(folder: Path) -> None:
    """What sample.py does with its inputs and its mask."""
    for path in find_images([str(folder)]):
        open_image(path)
        read_mask(types.SimpleNamespace(mask_file=path, mask_invert=True))


RECIPES = ("png", "jpg", "webp")


def write_recipe(folder: Path) -> None:
    """A picture with a recipe, and its input."""
    write_picture(folder / "house.png")
    recipe = {
        "input": [str(folder / "house.png")], "edit": ["make it night"], "turns": False, "n": 1, "negative":
        "", "steps": 4, "resolution": 64, "cfg_text": 3.0, "cfg_image": 1.2, "sampler": "euler", "seed": 5,
        "keep_size": False, "weights": "weights/nano-ip2p", "dtype": "fp32", "batch": 8,
        "version": "0.1.0"}
    for suffix in RECIPES:
        save_image(PICTURE, folder / f"recipe.{suffix}", recipe)


def read_recipe_and_plan(folder: Path) -> None:
    """`sample.py --recipe`, until it loads weights."""
    for suffix in RECIPES:
        path = folder / f"recipe.{suffix}"
        read_recipe(path)
        settings = sample.parse(["--recipe", str(path), "--output", str(folder / "out.png")])
        sample.plan_pictures(settings, find_images(settings.input))


def write_texts(folder: Path) -> None:
    """Captions in all three formats, triplets, answers of an earlier run."""
    (folder / "captions.txt").write_text("a red house\na cat on a sofa\n")
    (folder / "captions.csv").write_text('url,caption\nu1,"a red house"\nu2,"a cat, on a sofa"\n')
    write_rows(folder / "captions.jsonl", {"caption": "a red house", "url": "u1"}, {"input": "a cat"})
    write_rows(folder / "prompts.jsonl", ROW, {**ROW, "url": "u"})
    write_rows(folder / "prompts.dropped.jsonl", {"input": "a cat", "why": "refused"})
    write_rows(folder / "human.jsonl", *[ROW] * 10)


def read_texts(folder: Path) -> None:
    """Each reader of texts goes on where another refuses its file."""
    for read in (*(lambda path=path: captions.read_captions(path) for path in folder.glob("captions.*")),
                 lambda: pairs.read_prompts(folder / "prompts.jsonl"),
                 lambda: captions.known_captions(folder / "prompts.jsonl"),
                 lambda: finetune.prepare(folder / "human.jsonl", folder / "chats.jsonl")):
        try:
            read()
        except ValueError as error:
            refused = error
    if "refused" in locals():
        raise refused


def write_answer(folder: Path) -> None:
    """A chat completion."""
    (folder / "answer.json").write_text(json.dumps({
        "id": "x", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {
            "role": "assistant", "content": '{"edit": "make it night", "output": "a house at night"}'}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}}))


def read_answer(folder: Path) -> None:
    """The answer's bytes, as they come from the server."""
    reply = chat.read_object(regular(folder / "answer.json").read_bytes())
    chat.spent_tokens(reply, 100)
    with contextlib.suppress(chat.Unusable):
        chat.read_answer(reply, "a red house")


def write_verdict(folder: Path) -> None:
    """A moderation, with the id that a file or job would have."""
    (folder / "verdict.json").write_text(json.dumps({"id": "file-7", "results": [{"flagged": False}] * 2}))


def read_verdict(folder: Path) -> None:
    """The two answers other than chat completions."""
    verdict = chat.read_object(regular(folder / "verdict.json").read_bytes())
    with contextlib.suppress(ValueError):
        chat.read_flags(verdict, 2)
    print(finetune.identity(verdict))


def write_attention(folder: Path) -> None:
    """The kernels of attention that tune.py remembers."""
    table = {"a card": {"a case": "flash", "another": "(64, 32, 4, 2)"}}
    (folder / "attention.json").write_text(json.dumps(table))


def read_attention(folder: Path) -> None:
    """An unusable file is a line and an empty table."""
    table = tune.read(folder / "attention.json", print)
    assert all(kernel in tune.KERNELS for cases in table.values() for kernel in cases.values())


def write_original(folder: Path) -> None:
    """The layout of the paper, as `pairs` writes it."""
    for number in range(3):
        prompt = folder / f"{number:07d}"
        for seed in (5, 71):
            for i in range(2):
                write_picture(prompt / f"{seed}_{i}.jpg")
        rows = [{"seed": seed, "p2p_threshold": 0.3, "cfg_scale": 8.0, **dict.fromkeys(SIMILARITIES, 0.8)}
                for seed in (5, 71)]
        (prompt / "prompt.json").write_text(json.dumps(ROW))
        write_rows(prompt / "metadata.jsonl", *rows)
        write_rows(prompt / "candidates.jsonl", *rows)
    (folder / "seeds.json").write_text(json.dumps([[f"{n:07d}", ["5", "71"]] for n in range(3)]))
    job = {"clip_threshold": 0.2, "clip_dir_threshold": 0.2, "clip_img_threshold": 0.7, "n_samples": 2}
    (folder / "job.json").write_text(json.dumps({"job": job, "dtype": "fp32"}))


def read_layout(folder: Path) -> None:
    """What train.py --check and training do with a folder of pairs."""
    tables._column.cache_clear()  # each input has the same path
    broken_pictures(folder, 16)
    for item in read_data(folder):
        for pair in item:
            load_picture(pair.before, 16)
            load_picture(pair.after, 16)


def read_original(folder: Path) -> None:
    """Training, and `make_dataset.py show`."""
    read_layout(folder)
    found = show.read_pairs(folder)
    show.statistics(folder, found)
    show.contact_sheet(found, 2, 0)
    pairs.is_finished(folder, pairs.Prompt(0, ROW["input"], ROW["output"], ROW))
    pairs.finish_job(folder, [])
    make_dataset.job_dtype(folder, None, torch.device("cpu"))


def write_jsonl(folder: Path) -> None:
    """pairs.jsonl with pictures beside it."""
    write_picture(folder / "pictures" / "a.png")
    write_picture(folder / "pictures" / "b.png")
    row = {"input": "pictures/a.png", "edit": "make it night", "output": "pictures/b.png",
           "input_caption": "a house", "output_caption": "a house at night"}
    write_rows(folder / "pairs.jsonl", row, row)


def write_parquet(folder: Path) -> None:
    """The columns of the paper's dataset on the Hub."""
    import pyarrow
    import pyarrow.parquet
    write_picture(folder / "a.png")
    picture = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    (folder / "a.png").unlink()
    table = {"original_prompt": ["a house"] * 3, "original_image": [picture] * 3, "edit_prompt": ["x"] * 3,
             "edited_prompt": ["a house at night"] * 3, "edited_image": [picture] * 3}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "train.parquet")


def write_tar(folder: Path) -> None:
    """Two rows of webdataset, and an image folder's list."""
    import tarfile
    write_picture(folder / "a.png")
    with tarfile.open(folder / "train.tar", "w") as file:
        for name, content in (("1.input.png", None), ("1.output.png", None), ("1.edit.txt", b"x"),
                              ("2.input.png", None), ("2.output.png", None), ("2.json", b'{"edit": "y"}')):
            about = tarfile.TarInfo(name)
            content = content or (folder / "a.png").read_bytes()
            about.size, about.mtime = len(content), 1.5
            file.addfile(about, io.BytesIO(content))
    (folder / "a.png").unlink()


def write_magicbrush(folder: Path) -> None:
    """One session of two turns."""
    for name in ("242-input.png", "242-output1.png", "242-output2.png"):
        write_picture(folder / "images" / "242" / name)
    turns = [{"input": "242-input.png", "instruction": "make it night", "output": "242-output1.png"},
             {"input": "242-output1.png", "instruction": "add a cat", "output": "242-output2.png"}]
    (folder / "edit_turns.json").write_text(json.dumps(turns))
    (folder / "global_descriptions.json").write_text(json.dumps(
        {"242": {"242-input.png": "a", "242-output1.png": "b", "242-output2.png": "c"}}))


def read_magicbrush(folder: Path) -> None:
    """Training, and the names of the benchmark's folders."""
    read_layout(folder)
    for name, turns in magicbrush.read_sessions(folder).items():
        save_png(PICTURE, folder / "out" / name / f"{name}_{len(turns)}.png", {})


def write_run(folder: Path) -> None:
    """A training run of two steps."""
    settings = train.parse(["--preset", "nano", "--weights", "weights/nano-sd", "--data", "scenes",
                            "--steps", "2", "--out", str(folder)])
    tensors = {name: {"x": torch.ones(2)} for name in run_folder.FILES}
    state = {"batch": 32, "items": 4000, "settings": settings.to_json()}
    run_folder.write_checkpoint(folder, 2, tensors, state, 2)
    for step in (1, 2):
        append(folder / "log.jsonl", {"step": step, "loss": 0.5})


def read_run(folder: Path) -> None:
    """`train.py --resume`, until it loads weights."""
    config = train.parse(["--resume", str(folder)])
    train.fill_in(config, types.SimpleNamespace(count=1, device=torch.device("cpu")), 4000)
    run_folder.Log(folder, 1)
    run_folder.plot_log(folder)


def write_cache(folder: Path) -> None:
    """A cache of latents of two pairs."""
    write_jsonl(folder / "data")
    write_tiny_editor(folder / "weights")
    with working_in(folder):
        open_cache(folder).fill(load_model(folder / "weights"))
    shutil.rmtree(folder / "weights")


MODELS = {}


def open_cache(folder: Path) -> Cache:
    """The cache of the pairs in data/, with a model that is made once."""
    if not MODELS:
        MODELS["tiny"] = load_model(folder / "weights")
    for path in (folder / "data").rglob("*.png"):
        os.utime(path, (EPOCH, EPOCH))
    found = [pair for item in read_data(Path("data")) for pair in item]
    return Cache(Path("cache"), found, MODELS["tiny"], 16, True)


@contextmanager
def working_in(folder: Path):
    """Change the working folder: a cache knows its pictures by their paths, and the copies lie elsewhere."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def read_cache(folder: Path) -> None:
    """What training does with a cache."""
    with working_in(folder):
        cache = open_cache(folder).open()
        for item in read_data(Path("data")):
            for pair in item:
                cache.get(pair, True)


def write_curve(folder: Path) -> None:
    """Points of figure 8."""
    write_rows(folder / "curve.jsonl", *[{
        "method": "editor", "weights": "w", "networks": "n", "cfg_text": 2.0, "data": "scenes", "n": 4,
        "cfg_image": scale, "direction": 0.1, "image": 0.9, "direction_error": 0.01, "image_error": 0.01}
        for scale in (0.2, 1.0)])
    read_curve(folder)  # matplotlib writes its cache of fonts when it first draws
    (folder / "curve.png").unlink()


def read_curve(folder: Path) -> None:
    """The plot, and the search for a point."""
    rows = curve.read_points(folder / "curve.jsonl")
    curve.plot(folder / "curve.png", lambda axes: curve.draw(rows, axes))


def write_calls(folder: Path) -> None:
    """Points of success over network calls."""
    write_rows(folder / "calls.jsonl", *[{
        "weights": "weights/nano-ip2p", "networks": "0123456789abcdef", "sampler": "lcm", "calls": 4 * i,
        "n": 140, "success": 0.25 * i, "error": 0.02, "psnr": None} for i in (1, 2)])
    read_calls(folder)  # as above
    (folder / "calls.png").unlink()


def read_calls(folder: Path) -> None:
    """The points, and the plot that is drawn from them."""
    rows = calls.checked_rows(folder / "calls.jsonl", calls.KINDS)
    calls.plot(folder / "calls.png", lambda axes: calls.draw(rows, axes))


def write_scores(folder: Path) -> None:
    """The scores of two ablated editors."""
    write_rows(folder / "ablate.jsonl", *[{
        "variant": "P2P: cross", "seed": seed, "prompts": 400, "steps": 600, "n": 210, "unchanged": 25.0,
        "sampler": "dpmpp_2m", "sampling_steps": 4, **dict.fromkeys(ablate.MEASURES, 0.5)}
        for seed in (0, 1)])


def read_scores(folder: Path) -> None:
    """The table."""
    ablate.table(ablate.read_scores(folder / "ablate.jsonl"))


READERS = {
    "editor": (write_tiny_editor, read_editor), "painter": (write_painter, read_painter),
    "single file": (write_single, read_single), "marks": (write_marks, read_marks),
    "pickle": (write_pickle, read_weights),
    "packed": (write_packed, read_weights), "tokenizer": (write_fast_tokenizer, read_tokenizer),
    "embeddings": (write_embeddings, read_embeddings),
    "loras": (write_loras, read_loras),
    "shards": (write_shards, read_weights), "clip": (write_tiny_clip, read_judge),
    "pictures": (write_pictures, read_pictures), "recipe": (write_recipe, read_recipe_and_plan),
    "texts": (write_texts, read_texts), "answer": (write_answer, read_answer),
    "verdict": (write_verdict, read_verdict), "attention": (write_attention, read_attention),
    "original layout": (write_original, read_original), "pairs.jsonl": (write_jsonl, read_layout),
    "parquet": (write_parquet, read_layout), "tar": (write_tar, read_layout),
    "magicbrush": (write_magicbrush, read_magicbrush),
    "run": (write_run, read_run), "cache": (write_cache, read_cache), "curve": (write_curve, read_curve),
    "calls": (write_calls, read_calls),
    "ablate": (write_scores, read_scores)}
