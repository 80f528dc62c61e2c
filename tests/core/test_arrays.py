import numpy as np
import pytest
import torch

from rmdd.core.arrays import in_chunks
from rmdd.core.threads import one_thread, torch_threads


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_chunks_are_joined_in_order(size):
    rows = np.arange(10)
    assert np.array_equal(in_chunks(lambda some: some[:, None] * 2, rows, size), rows[:, None] * 2)
    joined = in_chunks(lambda some: torch.from_numpy(some), rows, size)
    assert joined.tolist() == rows.tolist()


def test_the_number_of_threads_is_restored_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1), one_thread():
        assert torch.get_num_threads() in (1, before + 1)
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    with torch_threads(None):
        assert torch.get_num_threads() == before
