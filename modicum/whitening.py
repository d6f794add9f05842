"""Features (N, D) on a common scale: each alone, or turned so that no two tell the same."""

import numpy as np

PRIOR = 100  # images' worth of doubt about the least directions: docs/results.md


def standardise(features: np.ndarray, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """`features` (N, D) float32, each column with mean 0 and deviation 1 over the images in `rows`; a constant column becomes 0.

    `rows` are all training images, labelled or not: a handful of labelled ones would tell too little of the deviations.
    """
    train = features[rows]
    mean, deviation = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    constant = deviation < 1e-6 * np.maximum(np.abs(mean), 1e-6)
    scale = np.where(constant, 0.0, 1 / np.where(constant, 1.0, deviation))
    return (features - mean.astype(np.float32)) * scale.astype(np.float32)


def whiten(features: np.ndarray, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """`features` (N, D) float32, standardised and turned: over the images in `rows` all directions vary alike, none with another.

    Between features as they are, the few directions that vary most decide who is near; between these, all do (Jegou and Chum 2012,
    "Negative evidences and co-occurences in image retrieval: the benefit of PCA and whitening", ECCV). From n images the variance of
    the least directions is hardly known, so that each is taken for greater by 100 / n of the greatest.
    """
    scaled = standardise(features, rows)
    seen = scaled[rows]
    variances, directions = np.linalg.eigh((seen.T @ seen / len(seen)).astype(np.float64))
    doubted = variances.clip(0) + PRIOR / len(seen) * variances[-1].clip(1e-12)
    return scaled @ (directions / np.sqrt(doubted)).astype(np.float32)
