"""Download models "owner/name" or "owner/name@revision" from the Hugging Face Hub.

Downloads only the files that nanoip2p reads. huggingface_hub provides progress bars, resuming, the cache and
offline mode. We import huggingface_hub late, because the import is slow and reads the environment.
"""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

CLIP = "openai/clip-vit-large-patch14"  # all SD 1.x models use its tokenizer
NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?", re.ASCII)
TIMEOUT = 10  # seconds for the list of files; huggingface_hub has no default timeout
# Small files of a model. defaults.json (see load.py) and pairs.json (see dataset/pairs.py) are nanoip2p's own
SMALL = r"(defaults|pairs|scheduler/[^/]+|(unet|vae|text_encoder)/config)\.json|tokenizer/[^/]+\.(json|txt)"
STEM = r"(diffusion_pytorch_|pytorch_)?model"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json")
TOKENIZER = "tokenizer (vocab.json and merges.txt, or tokenizer.json)"
cache_only = set()  # names that came from a file, not from the user: they are never fetched
REASONS = {  # error of huggingface_hub -> end of the message "there is no file or folder owner/name, and ..."
    "GatedRepoError": "the model's terms must be accepted on the Hub; then `hf auth login` or set HF_TOKEN",
    "RepositoryNotFoundError": "the Hub has no such model; for a private one `hf auth login` or set HF_TOKEN",
    "RevisionNotFoundError": "the Hub has no such revision of it",
    "CacheOnly": "the Hub's cache lacks files of the model; name it again with its flag to fetch it",
    "OfflineModeIsEnabled": "the Hub's cache lacks files of the model; unset HF_HUB_OFFLINE to download them",
}


def fetch_weights(name: str, raw: bool = False) -> Path:
    """Download the missing files of a diffusers model on the Hub; return its folder in the cache.

    raw: see weight_files. If the Hub has no such model, refuses access or cannot be reached, uses the cache.
    Raises ValueError if the cache then lacks files, if a download fails, or if the layout is another one.
    """
    return _fetch(name, lambda names: needed_files(names, raw),
                  "diffusers model (model_index.json; weights of all three networks)")


def fetch_clip(name: str) -> Path:
    """Like fetch_weights, for a transformers CLIPModel with tokenizer and preprocessor_config.json."""
    return _fetch(name, clip_files, "CLIP (config.json, preprocessor_config.json, weights, tokenizer)")


def find_tokenizer(checkpoint: Path, given: str | None) -> Path:
    """Find the tokenizer folder for a single-file checkpoint, which contains no tokenizer.

    Uses `given` (a folder, or a name on the Hub) if it is not None; else the files in the checkpoint's folder
    or its subfolder tokenizer/; else CLIP's tokenizer from the Hub. ValueError says which files to download.
    """
    near = checkpoint.parent if given is None else Path(given)
    if found := _folder_of(tokenizer_files, near):
        return found
    if given is not None:
        if near.exists():
            raise ValueError(f"{near} holds no {TOKENIZER}")
        return _fetch(given, tokenizer_files, TOKENIZER)
    try:
        return _fetch(CLIP, tokenizer_files, TOKENIZER)
    except ValueError as error:
        raise ValueError(f"{checkpoint.name} comes without a tokenizer: put vocab.json and merges.txt of "
                         f"{CLIP} beside it, or name their folder with --tokenizer ({error})") from None


# Each function below selects paths from the list of a repository's files; [] if a required file is missing.

def needed_files(names: list[str], raw: bool = False) -> list[str]:
    """The files of a Stable Diffusion 1.x model in diffusers' layout. raw: see weight_files."""
    weights = [weight_files(names, network, raw) for network in ("unet/", "vae/", "text_encoder/")]
    if "model_index.json" not in names or not all(weights):
        return []
    return ["model_index.json", *(name for name in names if re.fullmatch(SMALL, name)), *sum(weights, [])]


def clip_files(names: list[str]) -> list[str]:
    """The files of a CLIPModel."""
    settings = ["config.json", "preprocessor_config.json"]
    weights, tokenizer = weight_files(names), tokenizer_files(names)
    return settings + weights + tokenizer if weights and tokenizer and set(settings) <= set(names) else []


def tokenizer_files(names: list[str]) -> list[str]:
    """The files of a tokenizer, at the top or in tokenizer/. Prefers vocab.json to tokenizer.json."""
    for folder in ("", "tokenizer/"):
        for required in (TOKENIZER_FILES[:2], TOKENIZER_FILES[2:3]):
            if all(folder + name in names for name in required):
                return [folder + name for name in (*required, *TOKENIZER_FILES[3:]) if folder + name in names]
    return []


def weight_files(names: list[str], folder: str = "", raw: bool = False) -> list[str]:
    """The files of one copy of a network's weights. Prefers safetensors to .bin, full precision to fp16, and
    one file to shards with their index. raw: prefers non_ema files (diffusers' name for weights that were not
    averaged). Without raw, leaves these out."""
    kinds, raws = ("safetensors", "bin"), [r"\.non_ema"] * raw
    for kind, variant in (*itertools.product(kinds, raws), *itertools.product(kinds, ("", r"\.fp16"))):
        shards = rf"{STEM}({variant}-\d+-of-\d+|-\d+-of-\d+{variant})\.{kind}"
        for form in (rf"{STEM}{variant}\.{kind}", rf"{shards}|{STEM}\.{kind}\.index{variant}\.json"):
            if found := [name for name in names if re.fullmatch(f"{folder}({form})", name)]:
                return found
    return []


def _folder_of(choose: Callable[[list[str]], list[str]], root: Path) -> Path | None:
    """The folder (below `root`) of the first file that `choose` returns; None if it returns no files."""
    files = choose([path.relative_to(root).as_posix() for path in (*root.glob("*"), *root.glob("*/*"))])
    return (root / files[0]).parent if files else None


def _fetch(name: str, choose: Callable[[list[str]], list[str]], needs: str) -> Path:
    """Download the files that `choose` returns; return their cache folder. needs: these files in words."""
    from huggingface_hub import HfApi, snapshot_download

    if not (match := NAME.fullmatch(name)):
        raise ValueError(f"there is no file or folder {name}, and a name on the Hub would be owner/name")
    repo, revision = match.groups()
    try:
        info = None if name in cache_only else HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
        files, problem = info and choose([file.rfilename for file in info.siblings]), None
    except Exception as error:  # of any HTTP client, or from parsing a Wi-Fi login page
        files, problem = None, error
    if files == []:
        raise ValueError(f"{name} on the Hub holds no {needs}")
    try:  # the cached folder may be incomplete: it has only the files of earlier downloads
        root = snapshot_download(
            repo, revision=revision, allow_patterns=files or [], local_files_only=files is None)
        if found := _folder_of(choose, Path(root)):
            return found
    except Exception as error:
        problem = problem or error
    kind = "CacheOnly" if name in cache_only else type(problem).__name__
    if kind == "HfHubHTTPError" and problem.response.status_code in (401, 403):  # some mirrors answer so
        kind = "RepositoryNotFoundError"
    first_line = str(problem).partition("\n")[0]
    unknown = f"it is neither in the Hub's cache nor can it be fetched ({kind}: {first_line})"
    raise ValueError(f"there is no file or folder {name}, and {REASONS.get(kind, unknown)}")
