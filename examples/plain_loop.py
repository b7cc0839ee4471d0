"""Pruning in a plain training loop: three lines of it are fastprune's."""

import torch
from torch.nn import functional

import fastprune
from fastprune import data, models

torch.manual_seed(0)
images = data.embedded(0, train=512, test=256)
model = models.create("resnet20")
pruner = fastprune.FilterPruner(model, rate=0.5, example_input=torch.zeros(1, 3, 32, 32))  # 1
decorrelation = fastprune.Decorrelation(model, "covariance", alpha=0.01)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

for epoch in range(2):
    model.train()
    for batch in torch.randperm(512).split(32):
        inputs = data.normalize(images.train_images[batch], images.mean, images.std)
        loss = functional.cross_entropy(model(inputs), images.train_labels[batch]) + decorrelation()  # 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()  # 3
    model.eval()
    with torch.no_grad():
        predicted = model(data.normalize(images.test_images, images.mean, images.std)).argmax(1)
    accuracy = (predicted == images.test_labels).float().mean()
    print(f"epoch {epoch}: test accuracy {accuracy:.1%}, sparsity {pruner.sparsity():.1f} %")
print(pruner.report())
