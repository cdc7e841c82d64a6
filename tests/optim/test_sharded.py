"""Optimizers and training on 2 and 3 processes, sharded (FSDP2) and replicated (DDP), and what they refuse.

tests/optim/sharded_worker.py computes figures once for each number of processes; the tests here name what they must be.
"""

import json
import os
from functools import partial
from unittest.mock import Mock, patch

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fnl_hf import (
    FrobeniusAdamW,
    FrobeniusLamb,
    FrobeniusMuon,
    FrobeniusSGD,
    Lamb,
    frobenius_param_groups,
    register_product,
)
from fnl_hf.optim import local_factors
from fnl_hf.optim.local_factors import LocalFactor
from fnl_hf.optim.sharding import Sharding
from tests.conftest import launch, needs_muon
from tests.optim import sharded_training, sharded_worker  # noqa: F401  which make the checks
from tests.optim.worker_checks import CHECKS

TOLERANCE = 1e-6
MUON = pytest.param(FrobeniusMuon, marks=needs_muon)
NOTICEABLE = 1e-3


@pytest.fixture(scope="module", params=(2, 3), ids="{}_processes".format)
def figures(request, tmp_path_factory):
    """{check: the figures of each process}; xdist's workers share one launch."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / f"sharded_{request.param}"
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        if not (folder / f"{request.param - 1}.json").exists():
            launch("tests/optim/sharded_worker.py", folder, processes=request.param)
    return partial(read_figures, folder, request.param)


def read_figures(folder, processes, check):
    found = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))[check] for rank in range(processes)]
    failed = [process["traceback"] for process in found if "traceback" in process]
    assert not failed, "\n".join(failed)
    return found


def cases(check):
    """The names of a check that is made for several: "check[name]"."""
    return [name.removeprefix(f"{check}[").removesuffix("]") for name in CHECKS if name.startswith(f"{check}[")]


def for_each(check):
    return pytest.mark.parametrize("case", cases(check))


def assert_small(differences):
    for name, value in differences.items():
        assert value <= TOLERANCE, (name, value)


def test_a_process_holds_what_its_cut_says_and_heads_straddle(figures):
    found = figures("cuts")
    assert all(process["right"] for process in found)
    assert all(rows > 0 for rows in found[0]["left_over"]) and len(found[0]["left_over"]) == 4
    if len(found) == 3:
        assert {"linear.1.weight", "deep.1.weight"} <= set(found[2]["empty"])


@for_each("equal")
def test_sharded_training_equals_unsharded(figures, case):
    for process in figures(f"equal[{case}]"):
        assert process["difference"] <= TOLERANCE
        assert process["effect"] > NOTICEABLE  # of the decay: without it the first line would prove nothing


@for_each("attention_views")
def test_sharded_training_with_factors_that_are_parts_of_parameters(figures, case):
    for process in figures(f"attention_views[{case}]"):
        for rotary in (True, False):
            assert process[f"rotary {rotary}"] <= TOLERANCE
            assert process[f"effect {rotary}"] > NOTICEABLE


def test_replicas_with_such_factors_stay_equal(figures):
    for process in figures("attention_views_under_ddp"):
        assert process == {"equal": True, "kinds": ["qk", "vo"] * 2}


@for_each("factorized_layers")
def test_factorized_layers_train_alike_on_several_processes(figures, case):
    for process in figures(f"factorized_layers[{case}]"):
        assert process["difference"] <= TOLERANCE and process["effect"] > NOTICEABLE


def test_lamb_clips_by_the_norm_over_all_processes(figures):
    for process in figures("plain_lamb_clips"):
        assert process["difference"] <= TOLERANCE and process["effect"] > NOTICEABLE


def test_frozen_and_idle_factors_stay_and_their_partners_decay_alike(figures):
    for process in figures("frozen_and_idle"):
        assert process["still"] == process["expected"]
        assert_small(process["differences"])


def test_products_of_two_dtypes_are_not_mixed(figures):
    for process in figures("two_dtypes"):
        assert_small(process)


@pytest.mark.parametrize("case, gathers", [("columns", 0), ("columns_of_output", 1)])
def test_attention_may_be_cut_along_dimension_1(figures, case, gathers):
    for process in figures(f"attention_cut[{case}]"):
        assert process["calls"]["all_gather"] == gathers
        assert_small(process["differences"])


@for_each("rank_cut")
def test_outer_factors_may_be_cut_along_their_rank_in_dimension_1(figures, case):
    for process in figures(f"rank_cut[{case}]"):
        assert_small(process)


@for_each("convolutions_cut")
def test_convolutions_may_be_cut_along_any_dimension(figures, case):
    for process in figures(f"convolutions_cut[{case}]"):
        assert_small(process)


@for_each("hybrid")
def test_hybrid_sharding_equals_unsharded(figures, case):
    for process in figures(f"hybrid[{case}]"):
        assert_small(process)


def test_two_replicas_of_two_shards_equal_unsharded(tmp_path):
    launch("tests/optim/sharded_worker.py", tmp_path, processes=4)
    for process in read_figures(tmp_path, 4, "four_processes"):
        assert_small(process)


@for_each("one_factor_whole")
def test_one_factor_may_stay_whole(figures, case):
    for process in figures(f"one_factor_whole[{case}]"):
        assert_small(process)


@for_each("collectives_per_step")
def test_a_step_takes_few_collectives_whatever_the_number_of_parameters(figures, case):
    reductions = 3 if "lamb" in case else 1  # LAMB: also the norm of the gradients and those of weights and updates
    for process in figures(f"collectives_per_step[{case}]"):
        for size in ("small", "large"):
            assert process[size] == {"all_gather": 1, "all_reduce": reductions, "all": 1 + reductions}


@pytest.mark.parametrize("case, reductions", [("qk", 0), ("linear", 1)])
def test_nothing_is_gathered_where_no_head_straddles(figures, case, reductions):
    for process in figures(f"collectives_without_straddling[{case}]"):
        assert process == {"all_gather": 0, "all_reduce": reductions, "all": reductions}


@for_each("data_parallel")
def test_ddp_replicas_stay_equal_to_the_last_bit(figures, case):
    for process in figures(f"data_parallel[{case}]"):
        assert process["equal"]
        # A bias of the keys shifts all scores of a query alike: its gradient is 0 but for rounding.
        assert all(name.endswith("key.bias") for name in process["still"])


def test_gradients_of_fsdp2_train_as_those_of_ddp(figures):
    assert_small({"sgd": max(process["difference"] for process in figures("backward_through_fsdp2"))})


def test_layers_of_the_meta_device_are_initialized_after_they_are_sharded(figures):
    for process in figures("meta_layers"):
        assert len(process) == 11 and set(process.values()) == {0.0}


@for_each("checkpoint")
def test_a_distributed_checkpoint_continues_sharded_or_not(figures, case):
    for process in figures(f"checkpoint[{case}]"):
        assert process["difference"] <= TOLERANCE
        assert process["loaded"] == process["saved"]
        assert {"name": "qk", "product": "qk", "num_heads": 3}.items() <= process["loaded"][0].items()


@for_each("training")
def test_training_sharded_equals_one_process(figures, case):
    """Twenty steps with accumulation and clipping, the same global batches; the embeddings stay tied."""
    for process in figures(f"training[{case}]"):
        assert process["difference"] <= 1e-5 and process["norms"] <= 1e-5
        assert process["effect"] > 0.1 and process["clipped"] == 20 and process["tied"]


@for_each("trainer_checkpoint")
def test_trainers_checkpoint_continues_sharded_or_not(figures, case):
    # Muon iterates in bfloat16, which turns rounding of a gradient into parts of a step of 2e-3 an entry.
    tolerance = 2e-3 if "muon" in case else 1e-5
    for process in figures(f"trainer_checkpoint[{case}]"):
        assert process["before"] == 0.0 and process["after"] <= tolerance


@for_each("skipped_step")
def test_a_sharded_step_can_be_skipped(figures, case):
    assert all(
        process == {"weights": True, "state": True, "moved": True} for process in figures(f"skipped_step[{case}]")
    )


def test_a_sharded_model_is_saved_with_the_files_of_a_whole_one(figures):
    main = figures("saved_model")[0]  # the others write none
    assert main["equal"] and {"model.safetensors", "modeling_fnl_bert.py"} <= set(main["files"])


def test_unsupported_placements_are_refused_by_name(figures):
    for process in figures("refused_placements"):
        assert "placements (Shard(dim=0), Shard(dim=1))" in process["two"]
        assert "placements (Partial(sum),)" in process["partial"]
        assert "middle factor of shape (2, 6) is sharded along dimension 1" in process["middle"]
        assert process["whole"] is None


@for_each("refused_fsdp1")
def test_fsdp1_is_refused(figures, case):
    for process in figures(f"refused_fsdp1[{case}]"):
        assert len(process) == 4 and all("FSDP1" in message for message in process.values()), process


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 7, bias=False), nn.Linear(5, 3, bias=False)
        register_product(self, "linear", "left.weight", "right.weight")


def flattened(parameters, together):
    """What ZeRO-1 and ZeRO-2 leave in a group: flat tensors, one for each parameter or one for all."""
    flat = [p.detach().flatten() for p in parameters]
    flat = [nn.Parameter(tensor) for tensor in ([torch.cat(flat)] if together else flat)]
    for parameter in flat:
        parameter.grad = torch.ones_like(parameter)
    return flat


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("optimizer_class", [FrobeniusAdamW, FrobeniusSGD, FrobeniusLamb, Lamb, MUON])
def test_parameters_that_were_flattened_after_construction_are_refused(optimizer_class, together):
    optimizer = optimizer_class(frobenius_param_groups(Pair(), 0.01))
    optimizer.param_groups[0]["params"] = flattened(optimizer.param_groups[0]["params"], together)
    with pytest.raises(ValueError, match="ZeRO"):
        optimizer.step()


@pytest.mark.parametrize("make", [frobenius_param_groups, lambda model: Lamb(model.parameters())])
def test_parameters_of_zero_3_are_refused(make):
    model = Pair()
    model.left.weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO"):
        make(model)


def test_a_refused_group_leaves_nothing_behind():
    vector, matrix = (nn.Parameter(torch.ones(shape)) for shape in ((5,), (4, 4)))
    optimizer = FrobeniusLamb([vector])
    with pytest.raises(ValueError, match="num_heads"):
        optimizer.add_param_group({"params": list(Pair().parameters()), "product": "linear", "num_heads": 2})
    optimizer.add_param_group({"params": [matrix]})
    vector.grad, matrix.grad = torch.ones(5), torch.ones(4, 4)
    optimizer.step()
    assert (matrix < 1).all() and (vector < 1).all()


@settings(deadline=None, max_examples=300)
@given(heads=st.integers(1, 9), rank=st.integers(1, 9), world=st.integers(1, 12))
def test_rows_are_dealt_out_as_torch_chunks_them_and_split_heads_are_noticed(heads, rank, world):
    size = heads * rank
    sharding = Sharding(0, size, 0, world, None)
    chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(world)]
    chunks += [[]] * (world - len(chunks))
    assert [list(range(*sharding.rows_of(process))) for process in range(world)] == chunks
    holders = [{process for process, rows in enumerate(chunks) if head in {row // rank for row in rows}}
               for head in range(heads)]  # fmt: skip
    assert sharding.splits_heads(rank) == any(len(processes) > 1 for processes in holders)


@settings(deadline=None, max_examples=300)
@given(heads=st.integers(1, 9), rank=st.integers(1, 9), world=st.integers(1, 12), rank_dim=st.sampled_from([0, 1]))
def test_a_process_knows_the_heads_of_its_rows(heads, rank, world, rank_dim):
    """Its rows, picked from those of the heads that it works on, are its chunk of the weight."""
    weight = torch.randn((heads * rank, 4) if rank_dim == 0 else (4, heads * rank))
    rows = weight.movedim(rank_dim, 0)
    chunks = list(rows.chunk(world)) + [rows[:0]] * (world - len(rows.chunk(world)))
    for process, chunk in enumerate(chunks):
        found = Mock(return_value=Sharding(rank_dim, heads * rank, process, world, None))
        here = Mock(return_value=chunk.movedim(0, rank_dim))
        with patch.multiple(local_factors, sharding_of=found, local=here):
            factor = LocalFactor(weight, weight, heads, rank_dim)
        if factor.is_gathered:
            factor.set_gathered(rows)
        assert torch.equal(factor.rows.flatten(0, 1)[factor.local_rows], chunk)
        assert torch.equal(factor.rows, rows.unflatten(0, (heads, rank))[factor.heads])
