"""Fine-tune a language model on hand-written triplets (section 3.1.1 of the paper, which wrote 700).

The original tuned a completion model, with marks around each text. In a chat, only the mark between
instruction and edited caption is needed.
"""

import json
from pathlib import Path

import openai

from nanoip2p.common.files import read_rows, replacing, tidy
from nanoip2p.dataset.captions import DELIMITER, connect, explain

FEWEST = 10  # examples that OpenAI accepts


def prepare(human: Path, out: Path) -> int:
    """JSONL of "input" (or "caption"), "edit" and "output" -> training data as chats; returns how many.

    Raises ValueError, naming the line, for a line that is no such triplet of texts, and for fewer than ten.
    """
    chats = []
    for number, row in read_rows(human, ".jsonl"):
        found = (row.get("input", row.get("caption")), row.get("edit"), row.get("output"))
        texts = [tidy(text) for text in found if isinstance(text, str) and text.strip()]
        if len(texts) < 3:
            raise ValueError(f"{human}, line {number} is not {{input, edit, output}}, three texts")
        chats.append({"messages": [{"role": "user", "content": texts[0]},
                                   {"role": "assistant", "content": DELIMITER.join(texts[1:])}]})
    if len(chats) < FEWEST:
        raise ValueError(f"{human} holds {len(chats)} triplets; tuning takes {FEWEST} at least")
    with replacing(out) as temporary:
        temporary.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    return len(chats)


def start(chats: Path, model: str, epochs: int) -> str:
    """Upload the file that `prepare` wrote, start to fine-tune `model` on it, and return the job's id.

    Raises ValueError, in one line, if the server refuses.
    """
    content, client = chats.read_bytes(), connect()
    try:
        file = client.files.create(file=(chats.name, content), purpose="fine-tune")
        method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}}
        return client.fine_tuning.jobs.create(model=model, training_file=file.id, method=method).id
    except openai.APIError as error:
        raise ValueError(explain(error, client)) from None
