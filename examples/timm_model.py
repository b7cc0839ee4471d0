"""Pruning one of timm's models. Needs pip install 'fastprune[integrations]'."""

import timm
import torch
from torch.nn import functional

import fastprune
from fastprune import data

torch.manual_seed(0)
images = data.embedded(0, train=256, test=10)
model = timm.create_model("resnet10t", num_classes=10)
# Every layer keeps at least 8 filters, in multiples of 8, by the geometric median.
options = {"scope": "layer", "min_kept": 8, "round_to": 8, "ignore": ["conv1"]}
pruner = fastprune.FilterPruner(model, 0.5, "fpgm", **options, example_input=torch.zeros(1, 3, 32, 32))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for batch in torch.randperm(256).split(32):
    inputs = data.normalize(images.train_images[batch], images.mean, images.std)
    loss = functional.cross_entropy(model(inputs), images.train_labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    pruner.step()
print(pruner.report())
