"""The stages by name, in the order in which they run: what is wrong first, then how fast it is, then a study."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from fnl_hf.training.models import PRESETS
from gpu import correctness, factorized, optimizers, resuming, study, throughput
from gpu.records import Recorder


class Stage(NamedTuple):
    """A question, and what answers it by recording figures."""

    question: str
    run: Callable[[Recorder], Any]


STAGES: dict[str, Stage] = {
    "tests": Stage("Do the tests pass that need a GPU?", correctness.run_tests),
    "heads": Stage("Do all heads compute what they do on the CPU, and who waits?", correctness.compare_heads),
    "steps": Stage("Do all optimizers step as on the CPU, and who waits?", correctness.compare_optimizers),
    "precision": Stage("What do bf16 and TF32 cost in precision?", correctness.measure_precision),
    "varlen": Stage("Is FlashAttention's varlen what sdpa computes with document_ids?", correctness.compare_varlen),
    "graphs": Stage("Does torch.compile break the graph, and do CUDA graphs work?", correctness.try_graphs),
    "resume": Stage("Is a resumed run equal to the last bit, and does FSDP2 train?", resuming.try_resuming),
    "decay": Stage("What does the decay cost?", optimizers.compare_decay),
    "adamw": Stage(
        "What does FrobeniusAdamW cost beside torch's AdamW?", partial(optimizers.compare_steps, kind="AdamW")
    ),
    "lamb": Stage("What does Lamb cost beside pytorch_optimizer's?", partial(optimizers.compare_steps, kind="LAMB")),
    **{
        f"throughput-{preset}-{length}": Stage(
            f"How fast is {preset} at sequence {length}?",
            partial(throughput.measure_throughput, preset=preset, length=length),
        )
        for preset in PRESETS
        for length in (128, 512)
    },
    "largest-batch": Stage("Which batch of BERT-Base fits?", throughput.find_largest_batch),
    "factorized": Stage("At which ratio is a factorized model faster?", factorized.compare_models),
    "conversion": Stage("How long are SVDs, and the conversion of BERT-Large?", factorized.time_conversions),
    **{
        f"study-{mode}-{size}": Stage(
            f"MLM loss and SQuAD F1 of a small BERT, decay {mode}, E {size}?",
            partial(study.train, decay_mode=mode, embedding_size=size),
        )
        for mode in ("none", "weight", "frobenius")
        for size in (512, 256)
    },
}
