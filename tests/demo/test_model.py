"""The demo's model: dense and top-k arms are the same but for the keys."""

import torch

from sparse_attn.demo.model import GPT


def test_the_two_arms_start_equal_and_agree_when_every_key_is_kept():
    ids = torch.randint(0, 20, (2, 32))
    models = []
    for top_k in (None, 32, 4):
        torch.manual_seed(0)
        model = GPT(20, 32, top_k)
        torch.manual_seed(1)
        for parameter in model.parameters():  # the output matrices start at zero, which would hide everything
            torch.nn.init.normal_(parameter, std=0.1)
        models.append(model)
    dense, all_keys, few_keys = (model(ids) for model in models)
    torch.testing.assert_close(dense, all_keys, rtol=1e-4, atol=1e-4)
    assert (dense - few_keys).abs().max() > 1e-3


def test_generating_leaves_the_mode_as_it_was():
    model = GPT(20, 32, 4)
    for training in (True, False):
        model.train(training)
        characters = model.generate([1, 2], 3, seed=0)
        next(characters)
        assert all(m.training == training for m in model.modules())
        assert len(list(characters)) == 2
        assert all(m.training == training for m in model.modules())
