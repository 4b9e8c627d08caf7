"""What `TaskVector.map` makes of tied entries: they stay tied if the function returns one tensor for both."""

import torch

from rmtllmf.taskvec import TaskVector


def test_ties_are_the_functions_to_keep():
    shared = torch.ones(3)
    vector = TaskVector({"embed": shared, "head": shared, "other": torch.zeros(2)})
    assert vector["embed"] is vector["head"]

    anew = vector.map(lambda name, tensor: tensor * 2)
    assert anew["embed"] is not anew["head"]
    assert torch.equal(anew["embed"], anew["head"])

    known = {}
    kept = vector.map(lambda name, tensor: known.setdefault(id(tensor), tensor * 2))
    assert kept["embed"] is kept["head"]
    same = vector.map(lambda name, tensor: tensor)
    assert same["embed"] is same["head"]
