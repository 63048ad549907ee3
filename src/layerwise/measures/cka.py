"""Linear centred kernel alignment of two networks' features."""

from torch import Tensor

from layerwise.errors import InvalidInput
from layerwise.measures.base import refuse_degenerate


def linear_cka(features: Tensor, others: Tensor) -> float:
    """Similarity of two networks' features of the same images, 0 to 1: ‖Y'X‖² / (‖X'X‖ ‖Y'Y‖) of
    centred X and Y.

    Linear centred kernel alignment (Kornblith et al. 2019, equation 3 and section 3; Frobenius
    norms). Rotating or scaling the features changes nothing.

    Shapes: (N, F), (N, G).

    Raises:
        InvalidInput: the numbers of images differ, or one of the two is constant or not finite.
    """
    if len(features) != len(others):
        raise InvalidInput(
            f"features of {len(features)} and of {len(others)} images cannot be compared: give "
            "the same images"
        )
    for values in (features, others):
        refuse_degenerate(values)
    one, two = (values.double() - values.double().mean(0) for values in (features, others))
    return min(
        1.0, float((two.T @ one).square().sum() / ((one.T @ one).norm() * (two.T @ two).norm()))
    )
