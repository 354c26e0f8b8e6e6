"""Parses the arguments of a command with the parser of its own `main`, and runs nothing else of it."""

import argparse


class Parsed(BaseException):
    """Leaves `main` right after its parser; no `except Exception` of a command catches it."""


def parsed(main, argv: list[str], monkeypatch) -> argparse.Namespace | None:
    """What main(argv) parses; None for --help and --version. ValueError for what its parser refuses."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_leave(parser, args=None, namespace=None):
        try:
            raise Parsed(parse_args(parser, args, namespace))
        except (ValueError, SystemExit) as error:
            raise Parsed(error) from None

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
        try:
            main(argv)
        except Parsed as result:
            [found] = result.args
            if isinstance(found, ValueError):
                raise found from None
            if isinstance(found, SystemExit) and found.code:  # a plain ArgumentParser refuses
                raise ValueError(f"{argv} is refused") from None
            return None if isinstance(found, SystemExit) else found
    raise AssertionError(f"{main.__module__}.main parses no arguments")
