"""The stages by name, in the order in which they run: first correctness, then speed, then a study."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from fnl_hf.training.models import PRESETS
from gpu import correctness, factorized, optimizers, resuming, study, throughput
from gpu.records import Recorder


class Stage(NamedTuple):
    """A question, and the function that records figures to answer it."""

    question: str
    run: Callable[[Recorder], Any]


STAGES: dict[str, Stage] = {
    "tests": Stage("Do the tests that need a GPU pass?", correctness.run_tests),
    "heads": Stage(
        "Do all heads compute the same values as on the CPU, and which of them wait?", correctness.compare_heads
    ),
    "steps": Stage(
        "Do all optimizers compute the same steps as on the CPU, and which of them wait?",
        correctness.compare_optimizers,
    ),
    "precision": Stage("How much precision do bf16 and TF32 lose?", correctness.measure_precision),
    "varlen": Stage(
        "Does FlashAttention's varlen compute the same as sdpa with document_ids?", correctness.compare_varlen
    ),
    "graphs": Stage("Does torch.compile break the graph, and do CUDA graphs work?", correctness.try_graphs),
    "resume": Stage("Is a resumed run bit-identical, and does FSDP2 train?", resuming.try_resuming),
    "decay": Stage("How much time does the decay take?", optimizers.compare_decay),
    "adamw": Stage(
        "How long does a step of FrobeniusAdamW take compared with torch's AdamW?",
        partial(optimizers.compare_steps, kind="AdamW"),
    ),
    "lamb": Stage(
        "How long does a step of Lamb take compared with pytorch_optimizer's?",
        partial(optimizers.compare_steps, kind="LAMB"),
    ),
    **{
        f"throughput-{preset}-{length}": Stage(
            f"How fast does {preset} train at sequence length {length}?",
            partial(throughput.measure_throughput, preset=preset, length=length),
        )
        for preset in PRESETS
        for length in (128, 512)
    },
    "largest-batch": Stage("What is the largest batch of BERT-Base that fits?", throughput.find_largest_batch),
    "factorized": Stage("At which ratio is a factorized model faster?", factorized.compare_models),
    "conversion": Stage("How long do the SVDs and the conversion of BERT-Large take?", factorized.time_conversions),
    **{
        f"study-{mode}-{size}": Stage(
            f"What are MLM loss and SQuAD F1 of a small BERT with decay {mode} and E {size}?",
            partial(study.train, decay_mode=mode, embedding_size=size),
        )
        for mode in ("none", "weight", "frobenius")
        for size in (512, 256)
    },
}
