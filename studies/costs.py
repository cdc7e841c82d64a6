"""The cost of recipes for GPUs: hours, estimated from the FLOPs of their matrix multiplications."""

from collections.abc import Iterable, Mapping, Sequence

from fnl_hf.bert.configuration_fnl_bert import FnlBertConfig
from fnl_hf.reports.flops import data_sheet_peak, training_flops
from fnl_hf.training.models import preset_config
from studies.study import recipe

GPU = "H100"
UTILIZATION = 0.4  # of the peak, assumed
GPUS = (1, 8, 64)


def recipe_flops(flags: Mapping) -> float:
    """FLOPs of a whole run whose last layer and head compute the masked positions only."""
    overrides = dict(pair.split("=") for pair in flags["config_overrides"].split(","))
    config = FnlBertConfig(
        **preset_config(flags["preset"]),
        vocab_size=int(overrides["vocab_size"]),
        attention_embedding_size=flags["attention_embedding_size"],
    )
    length = flags["max_seq_length"]
    predicted = round(flags["mlm_probability"] * length)
    sequences = flags["max_steps"] * flags["global_train_batch_size"]
    return sequences * training_flops(config, length, predicted, predicted)


def cost_rows(recipes: Mapping[str, Sequence[str]]) -> Iterable[list[str]]:
    """Rows of name, FLOPs and hours on each number of GPUs. A recipe has a file for each phase; a later file overrides
    the earlier ones."""
    peak = data_sheet_peak(GPU, "bfloat16")
    assert peak is not None
    for name, phases in recipes.items():
        flags: dict = {}
        total = 0.0
        for file in phases:
            flags |= {flag: value for flag, value in recipe(file).items() if value is not None}
            total += recipe_flops(flags)
        hours = [total / (UTILIZATION * peak * count * 3600) for count in GPUS]
        yield [name, f"{total:.2g}", *(f"{value:.3g}" for value in hours)]


COST_HEADER = ["", "FLOPs", *(f"hours on {count} {GPU} at {UTILIZATION:.0%} of the peak" for count in GPUS)]
