"""The cross-covariance of image and text features, and the losses that CovMatch (arXiv 2510.18583) computes from it.

If the towers are frozen and linear heads G_v and G_l are trained on their features, the contrastive loss depends on the
data only through the cross-covariance C. With P = G_v^T G_l, this loss is -<C, P> + rho/2 ||P||^2. The loss has its
minimum at P = C / rho, so heads trained on the synthetic pairs reach C_S / rho. CovMatch makes C_S / rho equal to
C_T, the cross-covariance of the real pairs. Symbols: n pairs, V and L widths of image and text features, K joint width.
"""

from jaxtyping import Float
from torch import Tensor


def cross_covariance(image: Float[Tensor, "n V"], text: Float[Tensor, "n L"]) -> Float[Tensor, "V L"]:
    """Return C = 1/(n-1) sum of (h_v - mean)(h_l - mean)^T. Raises `ValueError` for fewer than two pairs."""
    if len(image) < 2:
        raise ValueError(f"a covariance needs at least 2 pairs, found {len(image)}; raise the batch size")
    return (image - image.mean(dim=0)).T @ (text - text.mean(dim=0)) / (len(image) - 1)


def linear_contrast(
    head_image: Float[Tensor, "K V"], head_text: Float[Tensor, "K L"], covariance: Float[Tensor, "V L"], rho: float
) -> Float[Tensor, ""]:
    """Return the contrastive loss of linear heads: -Tr(G_v C G_l^T) + rho/2 ||G_v^T G_l||^2."""
    product = head_image.T @ head_text
    return -(covariance * product).sum() + rho / 2 * product.square().sum()


def covariance_loss(real: Float[Tensor, "V L"], synthetic: Float[Tensor, "V L"], rho: float) -> Float[Tensor, ""]:
    """Return || rho C_T - C_S ||_F^2; C_T is the cross-covariance of the real pairs, C_S of the synthetic pairs."""
    return (rho * real - synthetic).square().sum()


def mean_loss(real: Float[Tensor, "n K"], synthetic: Float[Tensor, "m K"]) -> Float[Tensor, ""]:
    """Return the squared distance between the mean features of the real and the synthetic pairs."""
    return (real.mean(dim=0) - synthetic.mean(dim=0)).square().sum()
