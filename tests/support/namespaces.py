"""Network namespaces for tests: each process has a network of its own on one bridge, and can be cut off from all others.

A cut takes the host's end of the process' cable down: nothing arrives, nothing is refused, no connection ends. What is not
network stays as it is: Unix sockets, shared memory, signals. That is the dangerous case, a process that everybody takes for
dead and that can still write into their memory.

Needs root (or CAP_SYS_ADMIN and CAP_NET_ADMIN) and iproute2. All names carry the number of the process that made them, so that
runs side by side do not meet, and a later run removes what a killed one left behind.
"""

import itertools
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = re.compile(r"pn(\d+)x\d+n\d+")
_LINK = re.compile(r"pn(\d+)x\d+[hb]\d*")
_runs = itertools.count()


class NotPermitted(Exception):
    """This system lets us make no network namespaces; the text says why."""


class Network:
    """A bridge in our own namespace, and a namespace per process. Owns all of them until `close`."""

    def __init__(self) -> None:
        """Raises NotPermitted."""
        if shutil.which("ip") is None:
            raise NotPermitted("there is no `ip` command (package iproute2)")
        _remove_of_the_dead()
        self._mark = f"pn{os.getpid()}x{next(_runs)}"  # links have names of 15 characters at most
        self._bridge = f"{self._mark}b"
        self._numbers: dict[str, int] = {}
        self._subnet = _free_subnet()
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("address", "add", f"{self._subnet}.1/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        except subprocess.CalledProcessError as error:
            self.close()
            raise NotPermitted(f"cannot make a bridge: {error.stderr.strip()}") from error

    def add(self, name: str) -> str:
        """A namespace for the process of that name; its address. Raises NotPermitted."""
        number = len(self._numbers) + 2
        space, outer, inner = self._space(number), self._cable(number), f"{self._mark}i{number}"
        try:
            _ip("netns", "add", space)
            self._numbers[name] = number
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            _ip("link", "set", inner, "netns", space)
            _ip("link", "set", outer, "master", self._bridge, "up")
            _ip("-n", space, "address", "add", f"{self._subnet}.{number}/24", "dev", inner)
            _ip("-n", space, "link", "set", inner, "up")
            _ip("-n", space, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            raise NotPermitted(f"cannot make a namespace for {name}: {error.stderr.strip()}") from error
        return f"{self._subnet}.{number}"

    def inside(self, name: str) -> list[str]:
        """What to put before a command so that it runs in the namespace; the process keeps its number."""
        return ["ip", "netns", "exec", self._space(self._numbers[name])]

    def file(self, name: str) -> str:
        """The namespace as a file, for a process that enters it by itself."""
        return f"/run/netns/{self._space(self._numbers[name])}"

    def cut(self, name: str) -> None:
        """From now on nothing goes in or out."""
        _ip("link", "set", self._cable(self._numbers[name]), "down")

    def mend(self, name: str) -> None:
        """The end of a cut; connections go on where they stood, as soon as TCP tries again."""
        _ip("link", "set", self._cable(self._numbers[name]), "up")

    def close(self) -> None:
        """Remove everything; a second call changes nothing. The processes inside must have ended."""
        for number in self._numbers.values():
            _try_ip("link", "delete", self._cable(number))
            _try_ip("netns", "delete", self._space(number))
        self._numbers.clear()
        _try_ip("link", "delete", self._bridge)

    def _space(self, number: int) -> str:
        return f"{self._mark}n{number}"

    def _cable(self, number: int) -> str:
        return f"{self._mark}h{number}"


@contextmanager
def network() -> Iterator[Network]:
    """Namespaces that are gone afterwards, whatever happened. Raises NotPermitted."""
    made = Network()
    try:
        yield made
    finally:
        made.close()


def why_not() -> str:
    """Why this system makes no namespaces; empty if it does."""
    try:
        with network() as made:
            made.add("try")
            subprocess.run([*made.inside("try"), "true"], check=True, capture_output=True)
    except (NotPermitted, subprocess.CalledProcessError) as error:
        return str(error)
    return ""


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def _try_ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=False, capture_output=True)


def _free_subnet() -> str:
    """The first three numbers of a /24 of 10.0.0.0/8 that no interface here is in."""
    taken = set(re.findall(r"inet (\d+\.\d+\.\d+)\.", _ip("-4", "address", "show")))
    while True:
        subnet = f"10.{random.randrange(200, 250)}.{random.randrange(1, 255)}"
        if subnet not in taken:
            return subnet


def _remove_of_the_dead() -> None:
    """What runs have left that were killed themselves."""
    for name, pid in ((m.group(), int(m.group(1))) for m in _NAME.finditer(_listed("netns", "list"))):
        if not Path(f"/proc/{pid}").exists():
            _try_ip("netns", "delete", name)
    for name, pid in ((m.group(), int(m.group(1))) for m in _LINK.finditer(_listed("-o", "link", "show"))):
        if not Path(f"/proc/{pid}").exists():
            _try_ip("link", "delete", name)


def _listed(*words: str) -> str:
    return subprocess.run(["ip", *words], check=False, capture_output=True, text=True).stdout
