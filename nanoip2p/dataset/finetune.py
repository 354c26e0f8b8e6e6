"""Fine-tune a language model on hand-written triplets (the paper used 700, section 3.1.1).

The original fine-tuned a completion model, with a delimiter after each text. A chat model needs only the
delimiter between instruction and edited caption.
"""

import json
from pathlib import Path

import openai

from nanoip2p.common.cli import one_line
from nanoip2p.common.files import regular, replacing, tidy
from nanoip2p.common.schema import checked
from nanoip2p.dataset import chat
from nanoip2p.dataset.pairs import read_prompts

FEWEST = 10  # smallest number of examples that OpenAI accepts
UPLOAD = 3600.0  # seconds for an upload; OpenAI accepts 512 MB


def prepare(human: Path, out: Path) -> int:
    """Convert JSONL rows of "input" (or "caption"), "edit", "output" to training chats; return their number.

    Raises ValueError for a line that lacks one of the texts, and for fewer than FEWEST lines.
    """
    prompts, bad = read_prompts(human)
    if bad:
        raise ValueError(f"{human}, {bad[0]}; each line needs three texts: input, edit, output")
    if len(prompts) < FEWEST:
        raise ValueError(f"{human} holds {len(prompts)} triplets; fine-tuning needs {FEWEST} or more")
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for prompt in prompts:
            question = {"role": "user", "content": tidy(prompt.source)}
            answer = f"{tidy(prompt.record['edit'])}{chat.DELIMITER}{tidy(prompt.output)}"
            file.write(json.dumps({"messages": [question, {"role": "assistant", "content": answer}]}) + "\n")
    return len(prompts)


async def start(chats: Path, model: str, epochs: int) -> str:
    """Upload the file that `prepare` wrote, start a fine-tuning job of `model`, and return the job's id.

    Raises ValueError if the server refuses.
    """
    content, client = regular(chats).read_bytes(), chat.connect(total=UPLOAD)
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}}
    try:
        async with client:
            file = identity(await chat.ask(client.files, file=(chats.name, content), purpose="fine-tune"))
            job = await chat.ask(client.fine_tuning.jobs, model=model, training_file=file, method=method)
            return identity(job)
    except openai.APIError as error:
        raise ValueError(chat.explain(error, client)) from None


def identity(answer: dict) -> str:
    """The id of a file or job. Raises ValueError if the server's answer has none."""
    return one_line(checked(answer.get("id"), str, "the server's answer: id"))
