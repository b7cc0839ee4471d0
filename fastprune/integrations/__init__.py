"""Filter pruning inside other trainers: ``integrations.lightning`` and ``integrations.transformers``.

Each needs its library: ``pip install 'fastprune[integrations]'``. timm's and torchvision's models need nothing.
"""
