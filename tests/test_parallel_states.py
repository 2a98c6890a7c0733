"""Weights and optimizer states of divided models: in parts, gathered, handed out, bit for bit."""

import pytest
import torch
from conftest import SLOW
from rank_processes import run_ranks
from small import make_model
from test_parallel_training import backward, divide, inputs_of

from comemo.train import ranks
from comemo.train.parallel import state as states
from comemo.train.parallel.gradients import split_by_mesh

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("ranks are forks on the CPU"),
]
OTHERS = [
    (2, {"tensor": 2}),
    pytest.param(4, {"tensor": 2}, marks=SLOW),
    pytest.param(3, {}, marks=SLOW),
    pytest.param(4, {"tensor": 2, "replicas": 2}, marks=SLOW),
]


@pytest.fixture(scope="module")
def whole():
    return make_model(heads=4).cpu().requires_grad_(True).train()


@pytest.fixture(scope="module")
def groups(whole):
    """Half of the parameters in each group, by name."""
    names = [name for name, _ in whole.named_parameters()]
    return [names[::2], names[1::2]]


def make_optimizer(model, groups):
    parameters = dict(model.named_parameters())
    rates = (1e-2, 1e-3)
    made = [
        {"params": [parameters[name] for name in names], "lr": rate}
        for names, rate in zip(groups, rates, strict=True)
    ]
    return torch.optim.AdamW(split_by_mesh(made))


def gathered(model, optimizer, groups, sharing):
    weights = states.whole_weights(model, sharing.tensor)
    optimizer = states.whole_optimizer(model, optimizer, groups, sharing.tensor)
    return (weights, optimizer) if ranks.is_first() else None


def train_two_steps(whole, groups, plan, folder):
    """Trained weights and states; also in parts, in a folder."""
    model, sharing = divide(whole, plan)
    optimizer = make_optimizer(model, groups)
    for _ in range(2):
        model.zero_grad()
        backward(model, inputs_of(whole, 0), sharing.readers)
        optimizer.step()
    states.write_parts(folder, model, optimizer, sharing.tensor)
    return gathered(model, optimizer, groups, sharing)


def assert_same(found, wanted):
    assert found[0].keys() == wanted[0].keys()
    for name, weight in wanted[0].items():
        assert torch.equal(found[0][name], weight), name
    ours, theirs = found[1], wanted[1]
    assert [g["lr"] for g in ours["param_groups"]] == [g["lr"] for g in theirs["param_groups"]]
    assert [g["params"] for g in ours["param_groups"]] == [
        g["params"] for g in theirs["param_groups"]
    ]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, moments in theirs["state"].items():
        for name, moment in moments.items():
            assert torch.equal(ours["state"][number][name], moment), (number, name)


@pytest.fixture(scope="module", params=[{}, pytest.param({"tensor": 2}, marks=SLOW)])
def trained(request, whole, groups, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = run_ranks(2, train_two_steps, whole, groups, request.param, folder)
    torch.set_num_threads(threads)
    return folder, results[0]


@pytest.mark.parametrize(("count", "plan"), OTHERS)
def test_parts_are_read_by_other_ranks(whole, groups, trained, count, plan):
    folder, wanted = trained

    def read():
        model, sharing = divide(whole, plan)
        optimizer = make_optimizer(model, groups)
        states.read_parts(folder, model, optimizer, sharing.tensor)
        return gathered(model, optimizer, groups, sharing)

    assert_same(run_ranks(count, read)[0], wanted)


def test_parts_are_read_by_one_process(whole, groups, trained):
    folder, wanted = trained
    model = make_model(heads=4).cpu()
    states.read_whole(folder, model)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, wanted[0][name]), name
    alone = make_model(heads=4).cpu().requires_grad_(True)
    optimizer = make_optimizer(alone, groups)
    states.read_parts(folder, alone, optimizer, 1)
    assert_same((dict(alone.named_parameters()), optimizer.state_dict()), wanted)


@pytest.mark.parametrize(("count", "plan"), OTHERS)
def test_a_state_of_one_process_is_handed_out(whole, groups, trained, count, plan):
    _, wanted = trained

    def hand_out():
        model, sharing = divide(whole, plan)
        optimizer = make_optimizer(model, groups)
        given = wanted[1] if ranks.is_first() else None
        states.hand_out_optimizer(model, optimizer, given, groups, sharing.tensor)
        return gathered(model, optimizer, groups, sharing)

    weights, optimizer = run_ranks(count, hand_out)[0]
    assert_same((wanted[0], optimizer), wanted)
    assert weights.keys() == wanted[0].keys()


def test_a_disk_that_is_full_on_one_rank_is_an_error_of_all(whole, groups, tmp_path):
    def write():
        model, sharing = divide(whole, {})
        optimizer = make_optimizer(model, groups)
        if ranks.rank() == 1:

            def full(*args, **kwargs):
                raise OSError(28, "No space left on device")

            torch.save = full
        with pytest.raises(OSError, match="No space left on device"):
            states.write_parts(tmp_path, model, optimizer, sharing.tensor)
        return True

    assert run_ranks(2, write) == [True, True]
