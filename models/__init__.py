"""What a network is and can do: tensors, checkpoints, sampling.  No Prefect; data comes from corpora/."""
