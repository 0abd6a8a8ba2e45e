"""The images of each training step: a pure function of (seed, step), whatever the devices."""

import numpy as np
from jaxtyping import Int32
from numpy import ndarray


def indices(
    seed: int, n: int, batch_size: int, start: int, steps: int
) -> Int32[ndarray, "steps batch"]:
    """Return the indices, in 0..n-1, of the images of steps start .. start + steps - 1.

    Training reads one endless stream of epochs in batches of batch_size. Each epoch is a shuffle
    of all n images, so it visits every image once, even if batch_size does not divide n.
    """
    position = np.arange(start * batch_size, (start + steps) * batch_size)
    epoch, place = np.divmod(position, n)
    order = np.empty(len(position), np.int32)
    for number in range(epoch[0], epoch[-1] + 1):
        shuffle = np.random.default_rng([seed, number]).permutation(n)
        chosen = epoch == number
        order[chosen] = shuffle[place[chosen]]
    return order.reshape(steps, batch_size)
