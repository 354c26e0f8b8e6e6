"""The paper's way to captions: tune a language model on hand-written triplets (section 3.1.1, 700 of them).

The original tuned a completion model on input + "\\n##\\n" -> edit + "\\n%%\\n" + output + "\\nEND". In a
chat the roles say where a text begins and ends, so only the middle mark is left of the three.
"""

import json
from pathlib import Path

import openai
from openai import OpenAI

from nanoip2p.common.files import replacing, tidy
from nanoip2p.dataset.captions import DELIMITER, connect, explain

FEWEST = 10  # examples that OpenAI accepts


def prepare(human: Path, out: Path) -> int:
    """JSONL of "input" (or "caption"), "edit" and "output" -> training data of chats; returns how many.

    Blank lines are none. Raises ValueError with the number of a line that is not such a triplet of texts with
    something in them, or for fewer than ten.
    """
    chats = []
    for number, line in enumerate(human.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
            before = row.get("input", row.get("caption"))
            texts = [tidy(text) for text in (before, row["edit"], row["output"])]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            texts = []
        if not texts or "" in texts:
            raise ValueError(f"{human}, line {number} is not {{input, edit, output}}, texts in UTF-8")
        chats.append({"messages": [{"role": "user", "content": texts[0]},
                                   {"role": "assistant", "content": DELIMITER.join(texts[1:])}]})
    if len(chats) < FEWEST:
        raise ValueError(f"{human} holds {len(chats)} triplets; tuning takes {FEWEST} at least")
    with replacing(out) as temporary:
        temporary.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    return len(chats)


def start(chats: Path, model: str, epochs: int) -> str:
    """Upload what `prepare` wrote, start to tune `model` on it, and return the job's id.

    Raises ValueError, in one line, when the server will not do it.
    """
    content = chats.read_bytes()
    client = connect(OpenAI)
    try:
        file = client.files.create(file=(chats.name, content), purpose="fine-tune")
        method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}}
        return client.fine_tuning.jobs.create(model=model, training_file=file.id, method=method).id
    except openai.APIError as error:
        raise ValueError(explain(error, client)) from None
