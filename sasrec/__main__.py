"""The commands for people who use a model: python -m sasrec recommend, python -m sasrec serve."""

import sys

USAGE = """\
usage: python -m sasrec COMMAND [options]; --help after a command lists its options

  recommend   recommend items after a history, with an exported model
  serve       an HTTP service, and a page to try models on"""


def main(arguments: list[str]) -> int:
    # Each command imports what it needs, and nothing more.
    if arguments[:1] == ["recommend"]:
        from sasrec.deploy.recommender import command

        return command.main(arguments[1:], "python -m sasrec recommend")
    if arguments[:1] == ["serve"]:
        from sasrec.deploy import serve

        return serve.main(arguments[1:])
    asked = arguments[:1] in (["-h"], ["--help"])
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
