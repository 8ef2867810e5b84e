"""`penstock key make FILE`: a new secret for a cluster whose processes hear nobody else, and talk encrypted."""

import argparse
from collections.abc import Sequence

from common.net.cluster_key import make_cluster_key


def main(argv: Sequence[str]) -> int:
    """Exit code 0. Raises ConfigError: the file is there already, or cannot be written."""
    parser = argparse.ArgumentParser(prog="penstock key make", description=__doc__)
    parser.add_argument(
        "file", help="Where to write it, with mode 0600; give it to every process as --cluster-key FILE."
    )
    path = parser.parse_args(argv).file
    make_cluster_key(path)
    print(f"{path}: copy it to every machine of the cluster (mode 0600) and start all with --cluster-key {path}")
    return 0
