"""`python -m torch_csb.bench overhead | quick …`"""

from __future__ import annotations

import argparse
import sys

from torch_csb.bench import overhead, quick


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m torch_csb.bench")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (overhead, quick):
        command = commands.add_parser(
            module.__name__.rpartition(".")[2], help=module.__doc__.splitlines()[0].replace("%", "%%")
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
