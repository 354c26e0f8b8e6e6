"""The commands of nanoip2p. Once installed, the first three also have the names in the second column.

    sample.py         nanoip2p-edit        edit pictures by instruction
    make_dataset.py   nanoip2p-dataset     captions -> instructions -> pairs of pictures
    train.py          nanoip2p-train       pairs of pictures -> an editor
    python -m nanoip2p.app                 edit pictures on a page in the browser
    python -m nanoip2p.checkpoint          inspect a checkpoint, or convert it
    python -m nanoip2p.evaluate            score an editor or a text-to-image model

Each command has --help.
"""

import sys

from nanoip2p.common import cli


def main(argv: list[str] | None = None) -> int:
    """Print this file's docstring and return the exit code, see cli.run."""
    parser = cli.make_parser(prog="python -m nanoip2p", description=__doc__)
    return cli.run(lambda: (parser.parse_args(argv), print(__doc__.strip())), "interrupted", "")


if __name__ == "__main__":
    sys.exit(main())
