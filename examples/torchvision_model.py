"""Pruning one of torchvision's models, with the optimizer that measures the filters as it steps."""

import torch
import torchvision
from torch.nn import functional

import fastprune
from fastprune import data

torch.manual_seed(0)
images = data.embedded(0, train=256, test=10)
model = torchvision.models.resnet18(num_classes=10)
example = torch.zeros(1, 3, 32, 32)
pruner = fastprune.FilterPruner(
    model, rate=0.6, every=2, until=8, schedule="cubic", ramp_steps=6, example_input=example
)
optimizer = fastprune.optim.PrunedSGD(model.parameters(), lr=0.02, momentum=0.9, pruner=pruner)

for batch in torch.randperm(256).split(32):
    inputs = data.normalize(images.train_images[batch], images.mean, images.std)
    loss = functional.cross_entropy(model(inputs), images.train_labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    pruner.step()
    print(f"rate {pruner.current_rate:.2f}: {sum(pruner.kept().values())} filters kept, loss {loss.item():.3f}")
print(f"masks are {'final' if pruner.frozen else 'not final'}; sparsity {pruner.sparsity():.1f} %")
