"""The wheel holds everything that an installed fnl_hf needs."""

import subprocess
import sys

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
