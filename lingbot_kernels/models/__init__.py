"""The model, assembled from the ops in the order data flows."""
