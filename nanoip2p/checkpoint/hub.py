"""Models on the Hugging Face Hub, "owner/name" or "owner/name@revision" -> folders on this machine.

Only files that are read here are fetched. Progress bars, resuming, the cache and offline mode come from
huggingface_hub, which is imported late: it takes its time, and reads the environment as it goes.
"""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

CLIP = "openai/clip-vit-large-patch14"  # whose tokenizer all SD 1.x models share
NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?", re.ASCII)
TIMEOUT = 10  # seconds for the list of files, where the library would wait for ever
# defaults.json and pairs.json are ours, see checkpoint.py and pairs.py
SMALL = r"(defaults|pairs|scheduler/[^/]+|(unet|vae|text_encoder)/config)\.json|tokenizer/[^/]+\.(json|txt)"
STEM = r"(diffusion_pytorch_|pytorch_)?model"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json")
REASONS = {  # by the library's names of errors; each follows "there is no file or folder owner/name, and"
    "GatedRepoError": "the Hub asks you to accept its terms there, then to `hf auth login` or set HF_TOKEN",
    "RepositoryNotFoundError": "the Hub has none, or a private one: then `hf auth login` or set HF_TOKEN",
    "RevisionNotFoundError": "the Hub has no such revision of it",
    "OfflineModeIsEnabled": "the Hub's cache lacks some or all of it: unset HF_HUB_OFFLINE to fetch it",
}


def fetch_weights(name: str) -> Path:
    """A diffusers folder on the Hub -> its copy in the cache, fetched or completed as need be.

    Without a connection, what the cache holds is used. Raises ValueError, in one line, when the Hub knows no
    such model or will not give it away, when it has another layout, and when it cannot be fetched.
    """
    return _snapshot(name, needed_files, "diffusers model (model_index.json; weights of all three networks)")


def needed_files(names: list[str]) -> list[str]:
    """From the paths of all files of a repository, those an SD 1.x model is read from; [] if it is none."""
    needed = ["model_index.json", *(name for name in names if re.fullmatch(SMALL, name))]
    for network in ("unet/", "vae/", "text_encoder/"):
        weights = weight_files([name.removeprefix(network) for name in names if name.startswith(network)])
        if not weights or needed[0] not in names:
            return []
        needed += [network + name for name in weights]
    return needed


def fetch_clip(name: str) -> Path:
    """As fetch_weights, a CLIPModel with its tokenizer and preprocessor_config.json."""
    return _snapshot(name, clip_files, "CLIP (config.json, preprocessor_config.json, weights, tokenizer)")


def clip_files(names: list[str]) -> list[str]:
    """From the paths of all files of a repository, those a CLIPModel is read from; [] if it is none."""
    settings = ["config.json", "preprocessor_config.json"]
    weights, words = weight_files(names), tokenizer_files(names)
    return settings + weights + words if weights and words and set(settings) <= set(names) else []


def weight_files(names: list[str]) -> list[str]:
    """From the names in a network's folder, those of its weights: the first of safetensors and .bin, full
    precision and fp16, one file and shards with their index; [] if there are none."""
    for kind, variant in itertools.product(("safetensors", "bin"), ("", r"\.fp16")):
        shard = rf"{STEM}({variant}-\d+-of-\d+|-\d+-of-\d+{variant})\.{kind}"
        for form in (rf"{STEM}{variant}\.{kind}", rf"{shard}|{STEM}\.{kind}\.index{variant}\.json"):
            if found := [name for name in names if re.fullmatch(form, name)]:
                return found
    return []


def find_tokenizer(checkpoint: Path, given: str | None) -> Path:
    """The folder of the tokenizer for a single file of weights, which comes without one.

    It is `given` (a folder, or a name on the Hub); else beside `checkpoint`, or in tokenizer/ there; else
    CLIP's from the Hub or its cache. Raises ValueError, in one line that says what to fetch, for want of one.
    """
    needs = "tokenizer (vocab.json and merges.txt, or tokenizer.json)"
    near = checkpoint.parent if given is None else Path(given)
    if found := _folder_of(tokenizer_files, near):
        return found
    if given is not None and near.exists():
        raise ValueError(f"{near} holds no {needs}")
    try:
        return _snapshot(given or CLIP, tokenizer_files, needs)
    except ValueError as error:
        if given is not None:
            raise
        raise ValueError(
            f"{checkpoint.name} comes without a tokenizer: put vocab.json and merges.txt of {CLIP} "
            f"beside it, or name their folder with --tokenizer ({error})") from None


def tokenizer_files(names: list[str]) -> list[str]:
    """From the paths of all files of a folder, those of its tokenizer; [] if there is none."""
    for folder in ("", "tokenizer/"):
        for words in (TOKENIZER_FILES[:2], TOKENIZER_FILES[2:3]):
            if all(folder + name in names for name in words):
                here = (folder + name for name in (*words, *TOKENIZER_FILES[3:]))
                return [name for name in here if name in names]
    return []


def _folder_of(choose: Callable[[list[str]], list[str]], root: Path) -> Path | None:
    """Where the first of the files lies that `choose` picks below `root`."""
    paths = (*root.glob("*"), *root.glob("*/*"))
    files = choose([path.relative_to(root).as_posix() for path in paths])
    return (root / files[0]).parent if files else None


def _snapshot(name: str, choose: Callable[[list[str]], list[str]], needs: str) -> Path:
    """_folder_of a repository on the Hub, in the cache."""
    from huggingface_hub import HfApi, snapshot_download

    match = NAME.fullmatch(name)
    if not match:
        raise ValueError(f"there is no file or folder {name}, and a name on the Hub would be owner/name")
    repo, revision = match.groups()
    listed = problem = None
    try:
        listed = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT).siblings
    except Exception as error:  # of several HTTP clients, or of a hotel's login page that comes as the answer
        problem = error
    files = choose([file.rfilename for file in listed or []])
    if listed is not None and not files:
        raise ValueError(f"{name} on the Hub holds no {needs}")
    try:  # from the cache alone, the folder comes with as many files as were ever fetched
        root = snapshot_download(
            repo, revision=revision, allow_patterns=files, local_files_only=listed is None)
        if found := _folder_of(choose, Path(root)):
            return found
    except Exception as error:
        problem = problem or error
    kind, first_line = type(problem).__name__, str(problem).partition("\n")[0]
    if kind == "HfHubHTTPError" and problem.response.status_code in (401, 403):  # what mirrors answer
        kind = "RepositoryNotFoundError"
    unknown = f"it is neither in the Hub's cache nor can it be fetched ({kind}: {first_line})"
    raise ValueError(f"there is no file or folder {name}, and {REASONS.get(kind, unknown)}")
