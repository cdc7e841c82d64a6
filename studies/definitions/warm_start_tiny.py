"""Warm start on the quickstart's model, which takes minutes: what ``warm_start`` asks on a larger one."""

from dataclasses import replace

from studies.definitions import warm_start
from studies.study import recipe

STUDY = replace(warm_start.STUDY, base=recipe("configs/quickstart.yaml"))
