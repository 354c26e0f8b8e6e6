"""What every command promises: checked flags, one line for a mistake, exit codes."""

import argparse
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import nanoip2p
import train
from nanoip2p import __main__ as package
from nanoip2p.common import cli
from nanoip2p.dataset import layouts

ROOT = Path(__file__).resolve().parents[2]


def run(work):
    return cli.run(work, interrupted="stopped", memory="try less")


def fail(error):
    def work():
        raise error
    return work


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_end_a_command_and_are_given_back(number, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    try:
        assert run(lambda: os.kill(os.getpid(), number)) == 130 and capsys.readouterr().err == "stopped\n"
        assert signal.getsignal(signal.SIGTERM) == before[1]
    finally:
        signal.signal(signal.SIGINT, before[0])


@pytest.mark.parametrize("error, code, line", [
    (ValueError("no such\nfolder"), 2, "error: no such folder"),
    (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device"),
    (FileNotFoundError(2, "No such file", "a.txt"), 2, "error: [Errno 2] No such file: 'a.txt'"),
    (MemoryError(), 2, "error: out of memory; try less"),
    (RuntimeError("CUDA out of memory. Tried to allocate\n2 GiB"), 2, "error: out of memory; try less"),
    *((RuntimeError(text), 2, "error: out of memory; try less") for text in (
        "DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to allocate 9 bytes",
        "std::bad_alloc", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED")),
    (KeyboardInterrupt(), 130, "stopped"),
])
def test_mistakes_are_one_line_and_an_exit_code(error, code, line, capsys):
    assert run(fail(error)) == code
    assert capsys.readouterr().err == line + "\n"


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(fail(RuntimeError("size of tensor a must match")))


def test_warnings_are_notes(capsys):
    assert run(lambda: warnings.warn("the text is cut", stacklevel=1)) == 0
    assert capsys.readouterr().err == "note: the text is cut\n"


@pytest.mark.parametrize("words", [
    ["--n", "0"], ["--n", "1.5"], ["--n", "²"], ["--n", "9" * 30], ["--n"],
    ["--x", "nan"], ["--x", "inf"], ["--x", "much"], ["--nn", "3"], ["--x=--"], ["--n", "--"], ["--p", ""],
    ["--pixels", "10001"],
])
def test_flags_check_themselves(words, capsys):
    parser = cli.make_parser()
    parser.add_argument("--nnn", type=int)  # of which --nn must not be taken for short
    parser.add_argument("--n", type=cli.at_least(1))
    parser.add_argument("--x", type=cli.finite)
    parser.add_argument("--p", type=Path)
    parser.add_argument("--pixels", type=cli.pixels)
    assert parser.parse_args(["--n", "7", "--x", "1e3"]) == argparse.Namespace(
        nnn=None, n=7, x=1000.0, p=None, pixels=None)
    assert run(lambda: parser.parse_args(words)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words[0] in error and "--help" in error


def test_a_second_double_dash_is_refused():
    parser = cli.make_parser()
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--", "-a"]).words == ["-a"]
    with pytest.raises(ValueError, match="a second -- cannot be a value"):
        parser.parse_args(["--", "-a", "--"])


def test_a_message_is_one_printable_line():
    chance = random.Random(0)
    for _ in range(2000):
        letters = [chr(chance.choice((chance.randrange(256), chance.randrange(0x110000)))) for _ in range(
            chance.choice((3, 30, 600)))]
        line = cli.one_line("".join(letters))
        assert line.isprintable() and len(line) <= 500
        line.encode()
    assert cli.one_line("gib, 夜 \n\t x") == "gib, 夜 x"
    assert cli.one_line("a" * 600 + "the advice").endswith("the advice")


def test_the_names_of_broken_pictures_are_printed_escaped(capsys, monkeypatch):
    found = 1, 0, {}, ["a\x1b[2J.png cannot be used"], set()
    monkeypatch.setattr(layouts, "broken_pictures", lambda *_: found)
    assert train.main(["--check", "--data", "x", "--device", "cpu"]) == 2
    assert "  a\\x1b[2J.png cannot be used\n" in capsys.readouterr().out


def test_every_parser_has_a_version(capsys):
    for main in (package.main, cli.make_parser().parse_args):
        with pytest.raises(SystemExit):
            main(["--version"])
        assert capsys.readouterr().out == f"nanoip2p {nanoip2p.__version__}\n"


def test_the_package_lists_its_commands(capsys):
    assert package.main([]) == 0
    assert "nanoip2p-edit" in capsys.readouterr().out


@pytest.mark.parametrize("module, code", [
    ("nanoip2p", 0), ("nanoip2p.unet", 2), ("nanoip2p.dataset.pairs", 2)])
def test_a_module_that_is_no_command_says_so(module, code):
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert (done.stderr == "") if code == 0 else (f"{module} is no command" in done.stderr)
    assert done.stderr.count("\n") == (code > 0)


def test_ctrl_c_during_the_import_of_torch_is_silent(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
                                       "except KeyboardInterrupt:\n    pass\n")
    code = ("import sys\nfrom nanoip2p.common.cli import import_torch\nsys.path.insert(0, sys.argv[1])\n"
            "import_torch()\nprint('went on')")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_help_shows_a_default_of_zero_and_no_empty_one():
    parser = cli.make_parser()
    for name, default in (("--seed", 0), ("--list", []), ("--switch", False), ("--none", None)):
        parser.add_argument(name, default=default, help=f"the {name} one")
    text = parser.format_help()
    assert "the --seed one (default: 0)" in text and text.count("default") == 1


def test_what_is_said_is_one_line_each(capsys):
    cli.say("a\x1b[31m name", "two\nlines", "x" * 2000)
    said = capsys.readouterr().err
    assert said.count("\n") == 3 and said.replace("\n", "").isprintable() and len(said) < 3 * cli.LETTERS
