"""Odd values for every flag of every command: parsed, or refused as cli.run refuses."""

import argparse
import importlib
import math
import random
from functools import partial

import pytest

import make_dataset
import sample
import train
from nanoip2p.common import cli

MODULES = {"checkpoint": "nanoip2p.checkpoint.__main__", "evaluate": "nanoip2p.evaluate.__main__"}
# main, and what a command does with its words before it opens a file
COMMANDS = {"sample": (sample.main, sample.parse), "train": (train.main, train.parse),
            "make_dataset": (make_dataset.main, make_dataset.parse),
            **{name: (importlib.import_module(module).main, None) for name, module in MODULES.items()}}
COMMANDS["merge"] = (lambda words: COMMANDS["checkpoint"][0](["merge", *words]), None)
NEEDED = {"sample": ["--input", "a", "--edit", "b", "--output", "c"], "train": ["--check", "--data", "a"],
          "merge": ["A", "out"]}
ODD = ("", " ", "0", "-1", "1", "9" * 30, "9" * 5000, "1e400", "-1e308", "nan", "inf", "-inf", "0x10", "٣",
       "1_0", "--", "-", "=", "==", "a=--", "\x1b[2J", "a\nb", "\udcff", "夜", "x" * 10_000, "../x", "*", "[",
       "{}", "None", "true")


def parsers_of(main, monkeypatch):
    """The parsers of a command: (words that choose a subcommand, parser)."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, *_: found.append(parser) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([])
    found = [([], found[0])]
    for words, parser in found:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [([*words, name], below) for name, below in action.choices.items()]
    return found


def odd_words(parser, chance):
    """Flags of the parser, some twice, each with a value that is odd, valid or missing; and loose words."""
    words = []
    for _ in range(chance.randrange(1, 6)):
        action = chance.choice([one for one in parser._actions if one.dest not in ("help", "version")])
        count = chance.choice((0, 1, 1, 1, 2, 3))
        values = [chance.choice((*ODD, *(action.choices or ()))) for _ in range(count)]
        if not action.option_strings:
            words += values
        elif chance.random() < 0.5 and values:
            words.append(f"{action.option_strings[0]}={values[0]}")
        else:
            words += [action.option_strings[0], *values]
    return words


@pytest.mark.parametrize("name", COMMANDS)
def test_odd_words_are_parsed_or_refused(name, monkeypatch, capsys):
    main, parse = COMMANDS[name]
    parsers, chance, passed = parsers_of(main, monkeypatch), random.Random(name), 0
    parse = parse or parsers[0][1].parse_args  # made once: that takes longer than parsing
    for turn in range(250):
        before, parser = parsers[turn % len(parsers)]
        words, result = [*NEEDED.get(name, []), *before, *odd_words(parser, chance)], []
        code = cli.run(partial(lambda words, result: result.append(parse(words)), words, result), "", "")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (code == 2) and code in (0, 2), words
        assert all(line.isprintable() and len(line) <= 507 for line in lines), words
        for key, value in vars(result[0]).items() if code == 0 else ():
            assert value != [] or key in ("lora", "reweight", "window"), (key, words)
            assert not isinstance(value, float) or math.isfinite(value), (key, words)
        passed += code == 0
    assert passed
