"""Linear centred kernel alignment of two networks' features."""

from torch import Tensor

from layerwise.errors import InvalidInput
from layerwise.measures.base import refuse_degenerate


def linear_cka(features: Tensor, others: Tensor) -> float:
    """Similarity of two networks' features of the same images, from 0 to 1.

    Linear centred kernel alignment, ‖Y'X‖² / (‖X'X‖ ‖Y'Y‖) of centred X and Y with Frobenius norms
    (Kornblith et al. 2019, equation 3 and section 3). Rotating or scaling the features changes
    nothing.

    Shapes: (N, F), (N, G).

    Raises:
        InvalidInput: the numbers of images differ, or the features of one network are constant or
            not finite.
    """
    if len(features) != len(others):
        raise InvalidInput(
            f"Cannot compare features of {len(features)} and of {len(others)} images: they must be "
            "of the same images. Give features of both networks for the same images."
        )
    for values in (features, others):
        refuse_degenerate(values)
    x, y = (values.double() - values.double().mean(0) for values in (features, others))
    return min(1.0, float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())))
