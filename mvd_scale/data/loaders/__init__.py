"""Data loaders: iterators over batches of training clips, of test views, and of the views of a single video."""
