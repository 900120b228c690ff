"""One-shot coresets for convex models: scikit-learn's logistic and ridge regression with sample_weight.

Both are trained on a weighted coreset, on a random subset of the same size (from each class its share, each example
standing for as many as the others, so that the penalty weighs as much as with all the data), and on everything;
means and standard deviations over splits into training and test data.

    pip install ".[tasks]" && python examples/convex.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes, load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from torchcrest import coreset

Array = NDArray[Any]
Fit = Callable[[Array, Array, "Array | None"], Any]


def fit_logistic(x: Array, y: Array, weights: Array | None) -> Any:
    """Logistic regression; the penalty stands beside a sum over examples, so weights must add up to all."""
    return LogisticRegression(C=0.1, max_iter=2000).fit(x, y, sample_weight=weights)


def fit_ridge(x: Array, y: Array, weights: Array | None) -> Any:
    """Ridge regression."""
    return Ridge(alpha=10.0).fit(x, y, sample_weight=weights)


def digits(split: int) -> tuple[Array, Array, Array, Array]:
    """1,797 pictures of digits, 64 pixels each."""
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x / 16, y, test_size=0.25, stratify=y, random_state=split)
    return x_train, x_test, y_train, y_test


def diabetes(split: int) -> tuple[Array, Array, Array, Array]:
    """442 patients, 10 measurements each, and how far their disease went; all standardised."""
    x, y = load_diabetes(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.25, random_state=split)
    inputs, targets = StandardScaler().fit(x_train), StandardScaler().fit(y_train[:, None])
    y_train, y_test = (targets.transform(each[:, None])[:, 0] for each in (y_train, y_test))
    return inputs.transform(x_train), inputs.transform(x_test), y_train, y_test


def compare(
    fit: Fit, data: tuple[Array, Array, Array, Array], share: float, seed: int
) -> dict[str, tuple[float, float]]:
    """Train on a coreset, on a random subset and on everything.

    Returns:
        For each the score on the test data, and how far its coefficients are from those of everything, relative
        to their norm.
    """
    x, x_test, y, y_test = data
    n, size = len(x), round(share * len(x))
    whole = fit(x, y, None)
    classes = np.issubdtype(y.dtype, np.integer)
    if classes:
        picked, weights = coreset(x, size, y)  # each class gets its share
    else:
        picked, weights = coreset(np.column_stack([x, y]), size)  # the target is a feature like the others
    drawn, _ = train_test_split(np.arange(n), train_size=size, stratify=y if classes else None, random_state=seed)
    models = {
        "all": whole,
        "coreset": fit(x[picked], y[picked], weights),
        "random": fit(x[drawn], y[drawn], np.full(size, n / size)),
    }

    def apart(model: Any) -> float:
        return float(np.linalg.norm(model.coef_ - whole.coef_) / np.linalg.norm(whole.coef_))

    return {name: (float(model.score(x_test, y_test)), apart(model)) for name, model in models.items()}


def main() -> None:
    """Print a row for each task and size."""
    print(f"{'test score':27}  size   {'all':17}{'coreset':17}{'random':17}coefficients off: coreset, random")
    tasks: list[tuple[str, Fit, Callable[[int], Any]]] = [
        ("digits, logistic (accuracy)", fit_logistic, digits),
        ("diabetes, ridge (R^2)", fit_ridge, diabetes),
    ]
    for name, fit, load in tasks:
        for share in (0.05, 0.1, 0.2):
            found = [compare(fit, load(split), share, seed=split) for split in range(10)]
            scores, off = ({key: [each[key][k] for each in found] for key in found[0]} for k in (0, 1))
            words = [f"{np.mean(scores[key]):.3f} ± {np.std(scores[key], ddof=1):.3f}" for key in scores]
            print(
                f"{name:27} {share:4.0%}   {'    '.join(words)}   "
                f"{np.mean(off['coreset']):.2f}, {np.mean(off['random']):.2f}"
            )


if __name__ == "__main__":
    main()
