"""CREST in a loop of your own: a small net on scikit-learn's digits.

    pip install ".[tasks]" && python examples/plain_loop.py

The lines that differ from a loop over a DataLoader are marked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset, random_split

from torchcrest import Crest, CrestConfig  # CREST

STEPS, BATCH = 160, 32


def main() -> None:
    """Train and test."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    train_set, test_set = random_split(data, [1437, 360])
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    config = CrestConfig(batch_size=BATCH)  # CREST
    crest = Crest(net, train_set, config, steps=STEPS)  # CREST: instead of a DataLoader
    for (x, y), weights in crest:  # CREST
        losses = F.cross_entropy(net(x), y, reduction="none")
        (losses * weights).mean().backward()  # CREST: weighted
        optimizer.step()
        optimizer.zero_grad()

    x, y = test_set[:]
    with torch.no_grad():
        accuracy = float((net(x).argmax(1) == y).float().mean())
    print(f"test accuracy {accuracy:.1%} after {STEPS} steps of {BATCH} examples")


if __name__ == "__main__":
    main()
