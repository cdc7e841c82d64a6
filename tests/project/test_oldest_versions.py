"""The versions that ``make compat`` installs are the lower bounds of pyproject.toml."""

import pytest

from tests.project.oldest_versions import oldest_versions

PYPROJECT = """
[project]
name = "fnl-hf"
dependencies = ["torch>=2.8", "transformers>=5.17,<5.25", "types-PyYAML >= 6.0.12", "numpy<3,>=1.26; os_name != 'nt'"]

[project.optional-dependencies]
images = ["Pillow>=10"]
test = ["fnl-hf[images]", "pytest>=8", "Pillow>=10", "httpx[http2]>=0.27"]
"""


def test_each_lower_bound_is_a_version():
    assert oldest_versions(PYPROJECT) == [
        "torch==2.8", "transformers==5.17", "types-PyYAML==6.0.12", "numpy==1.26", "Pillow==10", "pytest==8",
        "httpx==0.27",
    ]  # fmt: skip


@pytest.mark.parametrize("changed", ["pytest", "pytest<9", "Pillow>=11"])
def test_a_requirement_without_one_lower_bound_is_refused(changed):
    with pytest.raises(ValueError, match=f"{changed} must have one lower bound, the same everywhere"):
        oldest_versions(PYPROJECT.replace('"pytest>=8"', f'"{changed}"'))
