"""The command line of an exported folder: python FOLDER/recommender --history 1193,661,914"""

import sys
from importlib import import_module
from pathlib import Path

# Not resolved: the files may be links into a cache.
FOLDER = Path(__file__).absolute().parents[1]

if __name__ == "__main__":
    # Run by its path, this file belongs to no package: it is found like any other.
    sys.path.insert(0, str(FOLDER))
    sys.exit(import_module("recommender.command").main(sys.argv[1:], "recommender", str(FOLDER)))
