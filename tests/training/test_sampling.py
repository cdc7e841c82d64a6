"""The order of the training data: a function of seed and epoch alone, in whole global batches."""

import json

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

import run_pretrain
from fnl_hf import UserInputError
from fnl_hf.training.sampling import EpochSampler, LengthSampler, find_sampler
from tests.conftest import TINY, assert_same_weights, launch, pretraining


def order(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32 - 1), st.integers(0, 2**20))
def test_an_epoch_is_part_of_a_permutation_in_whole_global_batches(batches, global_batch, seed, epoch):
    length = batches * global_batch + global_batch // 2
    sampler = EpochSampler(length, global_batch, seed)
    indices = order(sampler, epoch)
    assert len(indices) == len(sampler) == batches * global_batch
    assert len(set(indices)) == len(indices) and set(indices) <= set(range(length))
    assert indices == order(EpochSampler(length, global_batch, seed), epoch), "whatever was asked before"


def test_seed_and_epoch_change_the_order_and_nothing_else_does():
    sampler = EpochSampler(101, 5, seed=3)
    first = order(sampler, 0)
    torch.manual_seed(11)
    assert order(sampler, 0) == first != order(sampler, 1)
    assert order(EpochSampler(101, 5, seed=4), 0) != first
    left_out = [set(range(101)) - set(order(sampler, epoch)) for epoch in range(7)]
    assert len({tuple(sorted(indices)) for indices in left_out}) > 1, "each epoch leaves out another sample"
    assert order(EpochSampler(11, 3, seed=3, shuffle=False), 2) == list(range(9))


def test_an_order_by_length_depends_on_seed_and_epoch_alone():
    """It groups as Trainer's does: within a group of 13 batches, a quarter of all, the lengths fall."""
    lengths = torch.randint(1, 100, (211,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthSampler(LengthGroupedSampler(4, lengths=lengths), seed=3)
    first = order(sampler, 1)
    torch.manual_seed(11)
    assert sorted(first) == list(range(211)) and first == order(sampler, 1) != order(sampler, 0)
    assert order(LengthSampler(LengthGroupedSampler(4, lengths=lengths), seed=4), 1) != first
    grouped = [lengths[i] for i in first[4:52]]
    assert grouped == sorted(grouped, reverse=True)


def test_splits_give_the_same_global_batches():
    """Process p of 2 gets each second batch of 3, as Accelerate shares them, with 2 accumulation steps: 12 a step."""
    sampler = EpochSampler(41, 12, seed=3)
    shares = [list(BatchSamplerShard(BatchSampler(sampler, 3, False), 2, process)) for process in range(2)]
    for step in range(3):
        together = [i for share in shares for batch in share[2 * step : 2 * step + 2] for i in batch]
        assert sorted(together) == sorted(list(sampler)[12 * step : 12 * step + 12])
    assert [len(share) for share in shares] == [6, 6]


def test_the_sampler_is_found_below_what_shares_and_skips_batches():
    sampler = EpochSampler(41, 12, seed=3)
    shared = BatchSamplerShard(BatchSampler(sampler, 3, False), 2, 1)
    for loader in (
        DataLoader(range(41), 3, sampler=sampler),
        DataLoader(range(41), batch_sampler=shared),
        skip_first_batches(DataLoader(range(41), batch_sampler=shared), 2),
    ):
        assert find_sampler(loader) is sampler


def test_fewer_samples_than_a_global_batch_are_refused():
    assert len(EpochSampler(12, 12, seed=0)) == 12
    with pytest.raises(UserInputError, match="are 11 samples, fewer than one global batch of 12"):
        EpochSampler(11, 12, seed=0)


@pytest.fixture(scope="module")
def splits(corpus, tmp_path_factory):
    """Runs of 20 steps over 61 sequences, seven steps an epoch, with 8 sequences in a global batch."""
    folder = tmp_path_factory.mktemp("splits")
    # Adam's ε keeps rounding noise of gradients that are zero in theory (key biases) from becoming whole steps.
    common = {
        "config_overrides": TINY + ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0", "max_steps": 20,
        "max_train_samples": 61, "save_strategy": "no", "adam_epsilon": 1e-3,
        "logging_steps": 1,  # Trainer adds only its own process's losses since the last log to train_loss
    }  # fmt: skip
    for name, batch, accumulation in (("whole", 8, 1), ("accumulated", 4, 2)):
        flags = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        run_pretrain.run([str(word) for word in pretraining(corpus, folder / name, **flags, **common)])
    arguments = pretraining(corpus, folder / "processes", per_device_train_batch_size=4, **common)
    launch("run_pretrain.py", *arguments, processes=2)
    return folder


@pytest.mark.parametrize("split", ["accumulated", "processes"])
def test_however_a_global_batch_is_split_the_model_is_the_same(splits, split):
    assert_same_weights(splits / "whole", splits / split, atol=1e-5, rtol=0)
    whole, results = (json.loads((splits / name / "all_results.json").read_text()) for name in ("whole", split))
    for name in ("train_loss", "eval_loss"):
        assert results[name] == pytest.approx(whole[name], abs=1e-4)
    state = json.loads((splits / split / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(20 / 7) and state["num_train_epochs"] == 3


def test_data_seed_and_strategy_change_the_model(corpus, tmp_path):
    common = {"max_steps": 2, "save_strategy": "no", "config_overrides": TINY + ",hidden_dropout_prob=0.0"}
    for name, flags in (("a", {}), ("b", {"data_seed": 7}), ("c", {"data_seed": 8}),
                        ("d", {"train_sampling_strategy": "sequential"})):  # fmt: skip
        run_pretrain.run([str(word) for word in pretraining(corpus, tmp_path / name, **flags, **common)])
    assert_same_weights(tmp_path / "a", tmp_path / "b")  # the run's seed is 7
    for other in ("c", "d"):
        with pytest.raises(AssertionError):
            assert_same_weights(tmp_path / "a", tmp_path / other)
