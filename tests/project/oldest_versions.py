"""Prints the oldest versions that pyproject.toml admits, as pip's constraints: ``make compat`` installs them."""

import re
import sys
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,]+\])?(?P<bounds>[^;]*)")


def oldest_versions(pyproject: str) -> list[str]:
    """``name==lower bound`` of each requirement of the package and its extras, in the order in which they are given.

    Args:
        pyproject: the text of a ``pyproject.toml``.

    Raises:
        ValueError: a requirement has no lower bound, or another one in another place.
    """
    project = tomllib.loads(pyproject)["project"]
    extras = project.get("optional-dependencies", {}).values()
    versions: dict[str, str] = {}
    for requirement in (*project["dependencies"], *(each for extra in extras for each in extra)):
        match = REQUIREMENT.match(requirement)
        if match is None or match["name"] == project["name"]:  # an extra that holds others
            continue
        bound = re.search(r">=\s*([\w.]+)", match["bounds"])
        if bound is None or versions.setdefault(match["name"], bound[1]) != bound[1]:
            raise ValueError(f"{requirement} must have one lower bound, the same everywhere")
    return [f"{name}=={version}" for name, version in versions.items()]


if __name__ == "__main__":
    print("\n".join(oldest_versions(Path(sys.argv[1]).read_text(encoding="utf-8"))))
