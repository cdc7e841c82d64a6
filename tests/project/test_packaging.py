"""The wheel holds everything that an installed fnl_hf needs, the sdist all files of the repository."""

import subprocess
import sys
import tarfile

import pytest

from tests.conftest import ROOT

CODE = """
import sys
import fnl_hf
from fnl_hf.squad.features import load_sample
from fnl_hf.squad import fnl_squad
from fnl_hf.publishing.cards import TEMPLATE_FILE
import evaluate
assert fnl_hf.__file__.startswith(sys.argv[1]), fnl_hf.__file__
assert len(load_sample("train")) + len(load_sample("validation")) >= 80
evaluate.load(fnl_squad.__file__, "v1.1")
assert TEMPLATE_FILE.is_file()
for name in fnl_hf.__all__:
    getattr(fnl_hf, name)
"""


def test_a_wheel_builds_and_installs(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(wheel, check=True, capture_output=True)
    (built,) = tmp_path.glob("fnl_hf-*.whl")
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(target), str(built)], check=True)
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n{CODE}"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, str(target)], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git knows the files of the repository")
def test_an_sdist_holds_what_the_repository_holds(tmp_path):
    """Tests and documentation of the sdist run on these files."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True, cwd=ROOT)
    (built,) = tmp_path.glob("fnl_hf-*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    assert {name for name in tracked if (ROOT / name).exists()} - names == set()
    assert not [name for name in names if name.split("/")[0] in (".git", ".venv", "output", "dist")]
