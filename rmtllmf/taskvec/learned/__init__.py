"""Rules that need a model and data: what is learned from batches, and the fusion that it gives."""
