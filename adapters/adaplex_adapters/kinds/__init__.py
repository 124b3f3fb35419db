"""One file for each way in which adapters are saved: from its config and tensors to what the adapter does."""
