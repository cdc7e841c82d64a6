"""``run_pretrain.py``, once for each command line in a JSON file, with FSDP2 on CPU processes.

Accelerate offers FSDP on accelerators only, and elsewhere silently trains data parallel: here it takes the CPU for one.
test_fsdp.py starts it with the environment that ``accelerate launch`` makes of configs/accelerate/fsdp2.yaml.
"""

import json
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

import run_pretrain
from fnl_hf.runs.command_line import run_script

INITIALIZE = AcceleratorState.__init__


def initialize(self, *args, **kwargs):
    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    INITIALIZE(self, *args, **kwargs)


class ShardingCallback(TrainerCallback):
    """Tells test_fsdp.py that it was no data parallel training."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        print(f"sharded in step {state.global_step}.", flush=True)


def run(argv):
    for command in json.loads(Path(argv[0]).read_text(encoding="utf-8")):
        run_pretrain.run(command)


if __name__ == "__main__":
    AcceleratorState.__init__ = initialize
    DEFAULT_CALLBACKS.append(ShardingCallback)
    run_script(run)
