"""What the tests of conversions share: weights that show, and outputs to compare."""

import torch


def random_weights(model):
    """Weights and biases large enough that every part of the model shows in its output."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def outputs(model, batch):
    with torch.no_grad():
        found = model(**batch).to_tuple()
    return [tensor for tensor in found if torch.is_tensor(tensor)]


def assert_same_outputs(first, second, batch, atol=1e-5):
    for ours, theirs in zip(outputs(first, batch), outputs(second, batch), strict=True):
        present = batch["attention_mask"].bool() if ours.shape[:2] == batch["attention_mask"].shape else ...
        torch.testing.assert_close(ours[present], theirs[present], atol=atol, rtol=0)
