"""Metric learning on CIFAR-10: eight dimensions by triplets and cross entropy."""
