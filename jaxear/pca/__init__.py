"""Principal component analysis in JAX behind scikit-learn's estimator interface."""

from jaxear.pca.estimator import PCA, PCAError

__all__ = ["PCA", "PCAError"]
