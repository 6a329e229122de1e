"""DataLoaders with random numbers of their own."""

import itertools

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from tuned_run import Noisy, make_images, make_model

import qdq
from qdq.qat.epochs import begin_epoch, find_generators


class Indexed(torch.utils.data.Dataset):
    """Images that say which ones they are by one pixel; with noise from torch's global numbers."""

    def __len__(self):
        return 39

    def __getitem__(self, index):
        image = Noisy().images[index] + 0.1 * torch.randn(3, 12, 12)
        image[0, 0, 0] = index
        return image


def with_generator(workers=0, **options):
    return DataLoader(
        Indexed(),
        batch_size=8,
        shuffle=True,
        num_workers=workers,
        generator=torch.Generator(),
        **options,
    )


def with_sampler():
    return DataLoader(
        Indexed(), batch_size=8, sampler=RandomSampler(Indexed(), generator=torch.Generator())
    )


def with_replacement():
    sampler = RandomSampler(
        Indexed(), replacement=True, num_samples=39, generator=torch.Generator()
    )
    return DataLoader(Indexed(), batch_sampler=BatchSampler(sampler, 8, False))


LOADERS = [with_generator, lambda: with_generator(2), with_sampler, with_replacement]
NAMES = ["generator", "generator and workers", "sampler", "batch sampler"]


def tune(loader, interrupt_at=None, **options):
    """Nine steps of eight images; the order of the images, and losses and model."""
    model, seen = make_model(), []

    def look(_, inputs):
        if torch.is_grad_enabled():
            seen.append(inputs[0][:, 0, 0, 0].round().int().tolist())
            if len(seen) == interrupt_at:
                raise KeyboardInterrupt

    model.register_forward_pre_hook(look)
    tuning = qdq.finetune(model, loader, schedule=qdq.Schedule(steps=9, lr=1e-3), **options)
    return seen, tuning.losses, model.state_dict()


@pytest.mark.parametrize("make", LOADERS, ids=NAMES)
def test_a_resumed_run_sees_the_batches_of_one_that_was_not_killed(tmp_path, make):
    order, losses, weights = tune(make())
    assert order[0] != order[5]  # the first batches of two epochs
    with pytest.raises(KeyboardInterrupt):
        tune(make(), interrupt_at=8, folder=tmp_path)
    loader = make()
    for generator in find_generators(loader):
        generator.manual_seed(77)  # where it was before does not count
    rest, resumed, found = tune(loader, folder=tmp_path)
    assert rest == order[7:]
    assert resumed == losses
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("make", LOADERS, ids=NAMES)
def test_the_generators_of_the_user_stay_as_they_were(tmp_path, make):
    loader = make()
    (generator,) = {id(each): each for each in find_generators(loader)}.values()
    before = generator.get_state()
    tune(loader, folder=tmp_path)
    assert torch.equal(generator.get_state(), before)


def test_every_sampler_is_told_the_epoch_once():
    class Sampler(RandomSampler):
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs += (epoch,)

    plain, nested = Sampler(Indexed()), Sampler(Indexed())
    tune(DataLoader(Indexed(), batch_size=8, sampler=plain))
    tune(DataLoader(Indexed(), batch_sampler=BatchSampler(nested, 8, False)))
    assert plain.epochs == nested.epochs == (0, 1)


def test_persistent_workers_are_warned_of_where_a_run_may_be_resumed(tmp_path, caplog):
    """Torch seeds them once: their numbers go on in the next epoch, where those of new ones begin with a seed."""
    noise = {}
    for is_kept in (True, False):
        loader = with_generator(1, persistent_workers=is_kept)
        for epoch in range(2):
            begin_epoch(loader, 0, epoch)
            noise[is_kept, epoch] = torch.cat(list(loader))
        begin_epoch(loader, 0, 1)
        noise[is_kept, "again"] = torch.cat(list(loader))
        del loader
    assert torch.equal(noise[False, "again"], noise[False, 1])
    assert not torch.equal(noise[True, "again"], noise[True, 1])

    batches = with_generator(1, persistent_workers=True)
    schedule = qdq.Schedule(steps=1)
    qdq.finetune(make_model(), batches, schedule=schedule)
    assert "persistent_workers" not in caplog.text
    qdq.finetune(make_model(), batches, schedule=schedule, folder=tmp_path)
    assert caplog.text.count("persistent_workers carry their random numbers") == 1


def test_batches_that_have_no_generator_are_left_alone():
    assert find_generators([make_images(8, 1)]) == []
    assert find_generators(itertools.count()) == []
    assert find_generators(DataLoader(Indexed())) == []
