"""The principal directions of a model's latent codes, and how they are kept in a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxear.errors import UserError
from jaxear.files import replacing
from jaxear.inference import Codec, decode_codes, encode_images
from jaxear.model import load_model
from jaxear.pca import PCA
from jaxear.pixels import PixelModel
from jaxear.vae import EarVAE

FORMAT = "jaxear-eigenears-1"


class EigenEars:
    """The principal directions in which the codes of ears vary.

    Made by `fit` or `load`. A score is a code's coordinate on a component in standard deviations of
    the ears that it was fitted to: 0 is the mean ear, -2 and +2 lie near the ends of what is usual.

    Attributes:
        model: the model that encodes and decodes; a `PixelModel` for classic, linear eigenears.
        mean_: the mean code [d].
        components_: unit vectors of the codes' space, one per component [k, d].
        explained_variance_: variance of the codes along each [k].
        explained_variance_ratio_: the same as a share of the codes' total variance [k].
        n_samples_: how many ears it was fitted to.
    """

    def __init__(self, model: Codec, arrays: dict[str, np.ndarray], n_samples: int):
        self.model = model
        self.mean_ = arrays["mean"]
        self.components_ = arrays["components"]
        self.explained_variance_ = arrays["explained_variance"]
        self.explained_variance_ratio_ = arrays["explained_variance_ratio"]
        self.n_samples_ = n_samples

    @property
    def n_components(self) -> int:
        return len(self.components_)

    @classmethod
    def fit(cls, model: Codec, images: np.ndarray, n_components: int = 16) -> EigenEars:
        """Principal components of the mean codes of images.

        Args:
            model: a trained model.
            images: [n, H, W, 3], uint8 or floats in [0, 1], prepared as for training.
            n_components: how many to keep.

        Raises:
            UserError: fewer images, or latent dimensions, than components.
        """
        return cls.fit_codes(model, encode_images(model, images)[0], n_components)

    @classmethod
    def fit_codes(cls, model: Codec, codes: np.ndarray, n_components: int = 16) -> EigenEars:
        """As `fit`, from the mean codes [n, d] of images that a model has encoded already."""
        available = min(len(codes) - 1, model.latent_dim)
        if not 1 <= n_components <= available:
            raise UserError(
                f"{n_components} components cannot be had from {len(codes)} images and codes of "
                f"{model.latent_dim} numbers; ask for {max(available, 1)} at most."
            )
        pca = PCA(n_components=n_components, random_state=0).fit(codes)
        arrays = {
            "mean": pca.mean_,
            "components": pca.components_,
            "explained_variance": pca.explained_variance_,
            "explained_variance_ratio": pca.explained_variance_ratio_,
        }
        return cls(model, {k: np.asarray(v, np.float32) for k, v in arrays.items()}, len(codes))

    def project(self, images: np.ndarray) -> np.ndarray:
        """Images [n, H, W, 3] -> scores [n, k] in standard deviations."""
        return self.project_codes(encode_images(self.model, images)[0])

    def project_codes(self, codes: np.ndarray) -> np.ndarray:
        """Codes [n, d] -> scores [n, k] in standard deviations."""
        return (codes - self.mean_) @ self.components_.T / self._deviations

    def synthesize(self, scores: np.ndarray) -> np.ndarray:
        """Scores [n, k] (k or fewer, the rest being 0) -> images [n, H, W, 3] in [0, 1]."""
        scores = np.atleast_2d(np.asarray(scores, np.float32))
        k = scores.shape[1]
        if k > self.n_components:
            raise UserError(f"There are {self.n_components} components, but {k} scores per ear.")
        codes = self.mean_ + (scores * self._deviations[:k]) @ self.components_[:k]
        return decode_codes(self.model, codes)

    def traverse(self, component: int, scores: Sequence[float]) -> np.ndarray:
        """The mean ear moved along one component (from 0) -> images [len(scores), H, W, 3]."""
        grid = np.zeros((len(scores), component + 1), np.float32)
        grid[:, component] = scores
        return self.synthesize(grid)

    def traverses(self, scores: Sequence[float] | np.ndarray) -> np.ndarray:
        """The mean ear moved along every component by itself, all decoded in one go.

        Returns:
            images [k, len(scores), H, W, 3].
        """
        grid = np.eye(self.n_components, dtype=np.float32)[:, None] * np.reshape(scores, (-1, 1))
        images = self.synthesize(grid.reshape(-1, self.n_components))
        return images.reshape(self.n_components, len(scores), *images.shape[1:])

    @property
    def _deviations(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.explained_variance_, 1e-12))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the components as safetensors.

        A model is named by its run, relative to the file; pixels need none.

        Raises:
            UserError: the model does not come from a run, so that `load` could not find it.
        """
        path = Path(path)
        metadata = {"format": FORMAT, "n_samples": str(self.n_samples_)}
        if isinstance(self.model, PixelModel):
            height, width = self.model.image_size
            metadata |= {"pixels": f"{height}x{width}"}
        elif isinstance(self.model, EarVAE) and self.model.run_dir is not None:
            metadata |= {
                "run": os.path.relpath(self.model.run_dir, path.parent),
                "checkpoint": str(self.model.checkpoint),
            }
        else:
            raise UserError("Only eigenears of a model made by load_model(run_dir) can be saved.")
        arrays = {
            "mean": self.mean_,
            "components": self.components_,
            "explained_variance": self.explained_variance_,
            "explained_variance_ratio": self.explained_variance_ratio_,
        }
        with replacing(path) as temporary:
            save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Codec | None = None) -> EigenEars:
        """Read what `save` wrote, and the model from its run (unless `model` is given).

        Raises:
            UserError: not such a file, or its run has gone.
        """
        path = Path(path)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as eigenears: {error}") from error
        if metadata.get("format") != FORMAT:
            raise UserError(
                f"{path} does not hold eigenears; `jaxear eigenears` makes such a file."
            )
        if model is None and "pixels" in metadata:
            height, width = metadata["pixels"].split("x")
            model = PixelModel((int(height), int(width)))
        elif model is None:
            run_dir = path.parent / metadata["run"]
            model = load_model(os.path.normpath(run_dir), checkpoint=int(metadata["checkpoint"]))
        return cls(model, arrays, int(metadata["n_samples"]))


def without_pose(model: Codec, codes: np.ndarray) -> np.ndarray:
    """Codes [n, d] of a model with its mean pose in place of each one's own: what then varies is
    the ear, its light and what is around it, and not where it lies.

    Raises:
        UserError: the model's codes have no pose.
    """
    check_pose(model)
    codes = np.array(codes)
    codes[:, : model.n_pose] = codes[:, : model.n_pose].mean(axis=0)
    return codes


def check_pose(model: Codec) -> None:
    """Refuse a model whose codes have no pose.

    Raises:
        UserError: it is one.
    """
    if model.n_pose == 0:
        raise UserError(
            "Only the codes of a model that was trained with --pixel-registration (as "
            "configs/many_ears.yaml) know its pose."
        )
