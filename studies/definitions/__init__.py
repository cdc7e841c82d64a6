"""One file for each study: its name is the study's name, and its ``STUDY`` defines the comparison."""

import importlib
import pkgutil

from studies.study import Study


def load_studies() -> dict[str, Study]:
    """All studies by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").STUDY for name in names}
