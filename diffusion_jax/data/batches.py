"""Which images a training step sees: a pure function of (seed, step), on any number of devices."""

import numpy as np
from jaxtyping import Int32
from numpy import ndarray


def indices(
    seed: int, n: int, batch_size: int, start: int, steps: int
) -> Int32[ndarray, "steps batch"]:
    """The images of steps start .. start + steps - 1, as numbers in 0..n-1.

    Training reads one endless stream of epochs, each a shuffle of all n images, in batches of
    batch_size: an epoch visits every image once, also where batch_size does not divide n.
    """
    position = np.arange(start * batch_size, (start + steps) * batch_size)
    epoch, place = np.divmod(position, n)
    order = np.empty(len(position), np.int32)
    for number in range(epoch[0], epoch[-1] + 1):
        shuffle = np.random.default_rng([seed, number]).permutation(n)
        chosen = epoch == number
        order[chosen] = shuffle[place[chosen]]
    return order.reshape(steps, batch_size)
