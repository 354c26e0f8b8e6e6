"""How people word an edit of the nano world: phrasings, synonyms, misspellings, missing articles.

The tables are in wordings.json. Each kind of edit has twenty phrasings: templates with gaps for words. Each
word of a held-out phrasing is also in a phrasing of training (of any kind), because a text encoder has to be
trained on a word to understand it.
"""

import json
import random
import re
from pathlib import Path

HELD_OUT = 2  # no training pair has one of the last two phrasings of a kind; evaluation uses them
PHRASINGS, SYNONYMS, MISSPELLINGS = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8")).values()


def reword(text: str, rng: random.Random) -> str:
    """`text` with some words replaced by synonyms or misspellings, and sometimes without its articles."""
    def other(match: re.Match) -> str:
        for table, odds in ((SYNONYMS, 0.3), (MISSPELLINGS, 0.1)):
            if match[0] in table and rng.random() < odds:
                return table[match[0]][int(rng.random() * len(table[match[0]]))]
        return match[0]

    text = re.sub(r"\w+", other, text)
    if rng.random() < 0.15:
        text = re.sub(r"\b(the|an?) ", "", text)
    return re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r"\ban (?=[^aeiou])", "a ", text))
