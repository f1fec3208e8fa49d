"""Whether a local pass gives the right gradients on a network of your own, by a slow and obvious reference.

The implementation of :func:`local_gradients` is just::

    outlets = ...  # of one plain forward, in which nothing is cut
    for unit, decoder, loss_function in ...:
        loss = loss_function(*decoder(outlets[unit.last]).chunk(len(views)))
        torch.autograd.backward(loss, inputs=<weights of the stages in unit.updates, of the decoder and of the loss>)

It keeps the whole network's graph and runs a whole backward for every unit: use it on a small batch.
"""

from locallearn.testing.comparison import assert_local_gradients
from locallearn.testing.reference import LocalGradients, local_gradients

__all__ = ["LocalGradients", "assert_local_gradients", "local_gradients"]
