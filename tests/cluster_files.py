"""Find open ports, credentials and unpinned versions in the files of `clusters/` and `jobs/`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CLUSTERS = ROOT / "clusters"
RAY = "2.60.0"

OPEN = {
    "a port open to all addresses": re.compile(r"0\.0\.0\.0/0|(?<![0-9a-f:])::/0"),
    "the dashboard on all interfaces": re.compile(r"dashboard[-_]host[= ]+(?!127\.0\.0\.1)\S"),
}
OPEN_KEYS = {"hostNetwork": {True}, "serviceType": {"LoadBalancer", "NodePort"}, "dashboard-host": {"0.0.0.0", "::"}}
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|AccountKey=|\bgh[pousr]_\w{20,}|\bsk-\w{20,}|\bxox[abp]-|(?:TOKEN|SECRET|PASSWORD|KEY)=[^\s$~/]"
)
SECRET_KEYS = re.compile(r"password|secret|credential|token|access_?key", re.IGNORECASE)
MOVING = re.compile(r"\b(?:latest|nightly|master|main|HEAD)\b")
INSTALLED = re.compile(r"[\w.-]+(?:\[[\w,-]+\])?(?P<version>==[\w.]+)?$")


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every scalar of a YAML document, with the path of keys that leads to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from leaves(inner, (*path, str(place)))
    else:
        yield path, value


def problems(document: Any) -> list[str]:
    """Return the security and version problems of a cluster file, one line each."""
    result = []
    for path, value in leaves(document):
        text, where = str(value), ".".join(path)
        result += [f"{where}: {what}" for what, pattern in OPEN.items() if pattern.search(text)]
        if value in OPEN_KEYS.get(path[-1], set()):
            result.append(f"{where}: {value} opens a port to all addresses")
        if SECRET.search(text) or (SECRET_KEYS.search(path[-1]) and is_literal(text)):
            result.append(f"{where}: a credential")
        if path[-1] in ("image", "imageVersion") and not pinned(path[-1], text):
            result.append(f"{where}: '{text}' is not pinned")
        result += [f"{where}: {name} is not pinned" for name in loose(text)]
    return result


def is_literal(text: str) -> bool:
    """Return whether a value is a secret itself; otherwise it is the path of a file with the secret."""
    return not text.startswith(("~", "/"))


def pinned(key: str, text: str) -> bool:
    version = text if key == "imageVersion" else text.rpartition("/")[2].partition(":")[2]
    return bool(version) and not MOVING.search(version)


def loose(command: str) -> list[str]:
    """Return the packages that a shell command installs with pip without an exact version."""
    result = []
    for part in re.findall(r"pip3? install\s+([^&|;\n]*)", command):
        words = [w.strip("\"'") for w in part.split() if not w.startswith("-")]
        named = [w for w in words if not w.startswith((".", "~", "/"))]
        result += [w for w in named if not ((hit := INSTALLED.fullmatch(w)) and hit["version"])]
    return result
