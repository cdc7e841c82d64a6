"""``run_pretrain.py`` with losses that are not finite in one process: started by test_guard.py."""

import os

import run_pretrain
from fnl_hf.runs.command_line import run_script
from tests.training.bad_losses import add_to_losses

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        add_to_losses({2: float("nan"), 5: float("inf")})
    run_script(run_pretrain.run)
