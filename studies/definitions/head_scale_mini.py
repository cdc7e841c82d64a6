"""The scale of a smaller head on a larger model, three seeds at E = d/2, to confirm ``head_scale``."""

from dataclasses import replace

from studies.definitions import head_scale
from studies.study import recipe

STUDY = replace(
    head_scale.STUDY,
    base=recipe("configs/mini.yaml"),  # E = d/2
    arms={"E128": {init: {"attention_init": init} for init in head_scale.INITS}},
    seeds=(1, 2, 3),
)
