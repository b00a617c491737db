"""The baselines that backpropagate: FedAvg and FedSGD."""
